"""Several ranks: torchrun and Ray Train give the same bits, whoever is killed on the way."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from harness.run_dir import RunDir
from tests.integration import tiny
from tests.integration.test_train_resume import trace
from tests.integration.waiting import command_line, descendants, kill, running, wait_for

pytestmark = [pytest.mark.ffcv, pytest.mark.integration]
ONE_THREAD = {"OMP_NUM_THREADS": "1"}
EPOCHS = ("pretrain.epochs=3", "search.epochs=12", "finetune.epochs=3")


@pytest.fixture(scope="module")
def recipe_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    data = tiny.write_data(tmp_path_factory.mktemp("tiny"))
    return tiny.recipe_file(data, "workers = 2\n")


def train(recipe_file: Path, run_dir: Path, *options: str) -> list[str]:
    sets = [part for override in EPOCHS for part in ("--set", override)]
    return ["-m", "harness", "train", str(recipe_file), *sets, "--run-dir", str(run_dir), *options]


def torchrun(recipe_file: Path, run_dir: Path) -> list[str]:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    return launcher + train(recipe_file, run_dir)


def finish(command: list[str], log: Path) -> None:
    with running(command, log, ONE_THREAD) as process:
        assert process.wait(150) == 0, log.read_text()


@pytest.fixture(scope="module")
def undisturbed(recipe_file: Path, tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    folder = tmp_path_factory.mktemp("torchrun")
    finish(torchrun(recipe_file, folder / "run"), folder / "log")
    return RunDir(folder / "run")


def epochs_done(run: RunDir, stage: str) -> int:
    return sum(r["kind"] == "metrics" and r["stage"] == stage for r in run.metrics())


def starts(run: RunDir) -> int:
    return len(json.loads(run.provenance_path.read_text())["starts"]) if run.provenance_path.exists() else 0


@pytest.mark.timeout(300)
def test_torchrun_with_a_killed_rank_goes_on_when_run_again(recipe_file: Path, tmp_path: Path, undisturbed: RunDir):
    run = RunDir(tmp_path / "run")
    with running(torchrun(recipe_file, run.path), tmp_path / "log", ONE_THREAD) as launcher:
        wait_for(lambda: epochs_done(run, "search") >= 2, 120, "search under torchrun")
        ranks = [pid for pid in descendants(launcher.pid) if "-m harness train" in command_line(pid)]
        kill(next(pid for pid in ranks if pid != main_rank(run)))
        assert launcher.wait(60) != 0
    assert run.result() is None
    with running(torchrun(recipe_file, run.path), tmp_path / "left", ONE_THREAD) as launcher:
        before = epochs_done(run, "search")
        wait_for(lambda: epochs_done(run, "search") > before, 90, "going on under torchrun")
        launcher.terminate()  # torchrun passes it on to its ranks
        assert launcher.wait(60) != 0
    assert "run the same command again to go on" in (tmp_path / "left").read_text()
    assert run.result() is None
    finish(torchrun(recipe_file, run.path), tmp_path / "log")
    assert starts(run) == 3
    assert trace(run) == trace(undisturbed)


@pytest.mark.timeout(200)
def test_a_loss_that_is_not_finite_on_one_rank_stops_all_of_them(recipe_file: Path, tmp_path: Path):
    spec = tiny.spec(recipe_file.parent / "data", tmp_path / "run", "run.workers=2")
    (tmp_path / "spec.json").write_text(spec.model_dump_json(by_alias=True))
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*launcher, "-m", "tests.integration.disturbed", str(tmp_path / "spec.json"), "nan:9:1"]
    with running(command, tmp_path / "log", ONE_THREAD) as process:
        assert process.wait(100) != 0
    error = RunDir(spec.run_dir).error()
    assert error is not None
    assert "the loss is nan in pretrain (step 9, batch 3 of epoch 1, rank 1, images [" in error["message"]
    assert "checkpoints/pretrain-00000008.pt" in error["message"]
    assert (tmp_path / "log").read_text().count(f"error: {error['message']}") == 2


@pytest.mark.timeout(200)
def test_a_rank_that_stands_still_is_named_and_the_others_do_not_wait_for_ever(recipe_file: Path, tmp_path: Path):
    run = RunDir(tmp_path / "run")
    sets = ["search.method=full_precision", "pretrain.epochs=1000", "run.stall_limit_s=10"]
    command = torchrun(recipe_file, run.path) + [part for override in sets for part in ("--set", override)]
    with running(command, tmp_path / "log", ONE_THREAD) as launcher:
        wait_for(lambda: epochs_done(run, "pretrain") >= 2, 90, "training under torchrun")
        ranks = [pid for pid in descendants(launcher.pid) if "-m harness train" in command_line(pid)]
        still = next(pid for pid in ranks if pid != main_rank(run))
        os.kill(still, signal.SIGSTOP)
        wait_for((run.path / "stall.json").exists, 90, "the watchdog's verdict")
        wait_for(lambda: not Path(f"/proc/{main_rank(run)}").exists(), 60, "the end of the rank that waited")
    message = json.loads((run.path / "stall.json").read_text())["message"]
    assert "no progress for 10 s (run.stall_limit_s); rank 1 (process " in message
    assert f"process {still} on" in message
    assert "tells nothing any more" in message


def workers_of(driver: subprocess.Popen[bytes]) -> list[int]:
    return [pid for pid in descendants(driver.pid) if "RayTrainWorker" in command_line(pid)]


def main_rank(run: RunDir) -> int:
    return int((run.path / "lock").read_text().split()[1])


@pytest.mark.ray
@pytest.mark.timeout(400)
def test_ray_train_gives_torchruns_bits_though_workers_driver_and_head_are_killed(
    recipe_file: Path, tmp_path: Path, undisturbed: RunDir
):
    run, log = RunDir(tmp_path / "run"), tmp_path / "log"
    command = [sys.executable, *train(recipe_file, run.path, "--ray")]
    with running(command, log, ONE_THREAD) as driver:
        wait_for(lambda: epochs_done(run, "search") >= 2, 120, "search under Ray Train")
        before = epochs_done(run, "search")
        kill(next(pid for pid in workers_of(driver) if pid != main_rank(run)))
        wait_for(lambda: starts(run) == 2 and epochs_done(run, "search") > before, 90, "a group after a rank died")
        before = epochs_done(run, "search")
        kill(main_rank(run))
        wait_for(lambda: starts(run) == 3 and epochs_done(run, "search") > before, 90, "a group after rank 0 died")
        driver.terminate()
        assert driver.wait(60) == 85
    assert "run the same command again" in log.read_text()
    with running(command, log, ONE_THREAD) as driver:
        before = epochs_done(run, "search")
        wait_for(lambda: epochs_done(run, "search") > before, 90, "going on after SIGTERM")
        head = [pid for pid in descendants(driver.pid) if "gcs_server" in command_line(pid)]
        assert len(head) == 1
        kill(*head, driver.pid)
    assert run.result() is None
    finish(command, log)
    assert starts(run) == 5
    assert trace(run) == trace(undisturbed)
    result = run.result()
    assert result is not None
    assert result["stack"]["launcher"].startswith("ray.train 2.")
    assert (result["stack"]["world_size"], result["stack"]["backend"]) == (2, "gloo")
