"""What kills a run must not change it: every disturbed run ends with the weights and metrics of the undisturbed one."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import sbs
from harness import stages
from harness.checkpoint import load_weights, weights_digest
from harness.config import TrialSpec
from harness.errors import Preempted, TrainingError, UserError
from harness.ray_worker import fit
from harness.run_dir import RunDir
from harness.step import Stepper
from tests.integration import tiny

pytestmark = [pytest.mark.ffcv, pytest.mark.integration]
MACHINE = ("speed/", "system/")


@pytest.fixture(scope="module", autouse=True)
def _eager():
    sbs.use_compiled(False)
    yield
    sbs.use_compiled(True)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_data(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def undisturbed(data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    spec = tiny.spec(data, tmp_path_factory.mktemp("undisturbed"))
    stages.run(spec)
    return trace(RunDir(spec.run_dir))


def trace(run: RunDir) -> dict[str, Any]:
    """What two equal runs have in common: bits of the weights, policy, figures of every epoch, final figures."""
    result = run.result()
    assert result is not None
    records = [record for record in run.metrics() if record["kind"] == "metrics"]
    return {
        "weights": weights_digest(load_weights(run.weights_path)),
        "policy": json.loads(run.policy_path.read_text()) if run.policy_path.exists() else None,
        "metrics": [
            (r["stage"], r["epoch"], r["step"], {k: v for k, v in r["metrics"].items() if not k.startswith(MACHINE)})
            for r in records
        ],
        "layers": [(r.get("layers"), r.get("margins"), r.get("flips")) for r in records],
        "result": {k: v for k, v in result.items() if k not in {"timings_s", "stack", "label", "key"}},
    }


def disturbed(spec: TrialSpec, *where: str) -> subprocess.CompletedProcess[str]:
    """Run a trial in a process of its own and disturb it."""
    path = RunDir(spec.run_dir).create().path / "spec.json"
    path.write_text(spec.model_dump_json(by_alias=True))
    command = [sys.executable, "-m", "tests.integration.disturbed", str(path), *where]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)


def starts(spec: TrialSpec) -> int:
    return len(json.loads(RunDir(spec.run_dir).provenance_path.read_text())["starts"])


def test_the_same_trial_twice_gives_the_same_bits_and_trains_once(
    data: Path, tmp_path: Path, undisturbed: dict[str, Any]
):
    spec = tiny.spec(data, tmp_path)
    first = stages.run(spec)
    run = RunDir(tmp_path)
    assert trace(run) == undisturbed
    before = run.metrics_path.read_bytes()
    assert stages.run(spec) == first
    assert run.metrics_path.read_bytes() == before
    assert starts(spec) == 1


def test_search_and_compressed_network_agree_to_the_last_bit(undisturbed: dict[str, Any]):
    figures = {(stage, epoch): metrics for stage, epoch, _, metrics in undisturbed["metrics"]}
    for name in ("top1", "top5", "val_loss"):
        assert figures["compress", 0][f"compress/{name}"] == figures["search", 4][f"search/{name}"]
        assert figures["report", 0][f"final/{name}"] == figures["finetune", 2][f"finetune/{name}"]
    assert undisturbed["result"]["pruned_share"] > 0
    assert 2 < undisturbed["result"]["mean_weight_bits"] < 8


@pytest.mark.timeout(300)
def test_kills_in_every_stage_change_nothing(data: Path, tmp_path: Path, undisturbed: dict[str, Any]):
    # 6 steps an epoch: pretrain 0-11, search 12-35, finetune 36-47; a checkpoint every 2 steps. Gates move from 28 on;
    # the evaluation is that of step 30, after which batch norms have been estimated anew.
    spec, run = tiny.spec(data, tmp_path), RunDir(tmp_path)
    killed = ["step:3", "writing:2", "step:31", "evaluating:1", "stage:compress", "step:41", "stage:report"]
    for where in killed:
        assert disturbed(spec, where).returncode == -9, where
    assert disturbed(spec, "nothing").returncode == 0
    assert trace(run) == undisturbed
    assert starts(spec) == len(killed) + 1
    assert not list(tmp_path.glob("*/.*")), "half-written files stayed behind"
    records = run.metrics()
    assert [r["seq"] for r in records] == list(range(1, len(records) + 1))
    checkpoints = [r for r in records if r["kind"] == "checkpoint"]
    assert all(r["covers"] < r["seq"] for r in checkpoints)
    covered = [r["covers"] for r in checkpoints]
    assert covered == sorted(covered)
    assert covered[-1] == records[-2]["seq"] - 1  # nothing but the report lies beyond the last stage's end


@pytest.mark.timeout(300)
def test_requests_to_leave_end_with_85_and_a_checkpoint(data: Path, tmp_path: Path, undisturbed: dict[str, Any]):
    spec = tiny.spec(data, tmp_path, "run.checkpoint_every_steps=null")
    for where, stage in [("usr2:5", "pretrain"), ("term:29", "search"), ("term-eval:2", "search")]:
        left = disturbed(spec, where)
        assert left.returncode == 85, left.stderr
        assert f"during {stage} as asked" in left.stderr
        assert "run the same command again" in left.stderr
        assert "Traceback" not in left.stderr
        assert any((tmp_path / "checkpoints").glob(f"{stage}-*.pt"))
    stages.run(spec)
    assert trace(RunDir(tmp_path)) == undisturbed


def test_a_stop_file_makes_a_run_leave_and_it_goes_on_without(data: Path, tmp_path: Path, undisturbed: dict[str, Any]):
    spec = tiny.spec(data, tmp_path)
    run = RunDir(tmp_path).create()
    run.request_stop()
    with pytest.raises(Preempted, match=r"during pretrain"):
        stages.run(spec)
    with pytest.raises(Preempted, match=r"left as asked"):
        fit(tiny.spec(data, tmp_path, "run.workers=2"), inside_tune=False)  # without starting a group: there is no Ray
    assert run.result() is None
    assert run.metrics() == []  # not a step was made
    run.clear_stop()
    stages.run(spec)
    assert trace(run) == undisturbed


def test_damaged_checkpoints_are_skipped(data: Path, tmp_path: Path, undisturbed: dict[str, Any], caplog: Any):
    spec = tiny.spec(data, tmp_path, "run.checkpoint_every_steps=4")
    assert disturbed(spec, "step:23").returncode == -9  # one epoch of the search is recorded, and lies beyond step 16
    older, newest = sorted((tmp_path / "checkpoints").glob("search-*.pt"))
    newest.write_bytes(newest.read_bytes()[:-1000])
    stages.run(spec)
    assert f"checkpoint {newest} is damaged" in caplog.text
    assert str(older) not in caplog.text
    assert trace(RunDir(tmp_path)) == undisturbed


def test_a_loss_that_is_not_finite_stops_the_trial_and_names_the_place(data: Path, tmp_path: Path):
    spec = tiny.spec(data, tmp_path, "finetune.lr=1e30", "finetune.warmup_epochs=0", "finetune.ema_decay=null")
    with pytest.raises(TrainingError) as caught:
        stages.run(spec)
    message = str(caught.value)
    assert "in finetune (step 3" in message  # from 36 on
    assert "of epoch 0, rank 0" in message
    assert f"last good checkpoint is {tmp_path}/stages/compress.pt" in message
    error = RunDir(tmp_path).error()
    assert error == {"message": message, "stage": "finetune"}


def test_the_last_good_checkpoint_is_named(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    poison(monkeypatch, step=9)
    spec = tiny.spec(data, tmp_path)
    with pytest.raises(TrainingError) as caught:
        stages.run(spec)
    assert "pretrain (step 9, batch 3 of epoch 1, rank 0, images [" in str(caught.value)
    assert f"last good checkpoint is {tmp_path}/checkpoints/pretrain-00000008.pt" in str(caught.value)


def test_weights_that_the_last_step_spoilt_are_no_outcome(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    original: Callable[..., Any] = Stepper.step

    def spoilt(self: Stepper, images: Any, labels: Any, number: int, *rest: Any) -> Any:
        found = original(self, images, labels, number, *rest)
        if number == 11:
            next(self.job.net.parameters()).data.fill_(float("inf"))
        return found

    monkeypatch.setattr(Stepper, "step", spoilt)
    with pytest.raises(TrainingError, match="a weight is not finite in pretrain after step 12; the last good"):
        stages.run(tiny.spec(data, tmp_path, "run.checkpoint_every_steps=7"))
    assert not (tmp_path / "stages" / "pretrain.pt").exists()


def poison(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """Make the loss of one step of the pretraining NaN."""
    original: Callable[..., Any] = Stepper.step

    def poisoned(self: Stepper, images: Any, labels: Any, number: int, *rest: Any) -> Any:
        sums, loss = original(self, images, labels, number, *rest)
        return sums, loss * float("nan") if number == step else loss

    monkeypatch.setattr(Stepper, "step", poisoned)


def test_stages_are_shared_through_the_cache(data: Path, tmp_path: Path):
    def trial(name: str, *overrides: str) -> RunDir:
        spec = tiny.spec(data, tmp_path / name, *overrides)
        stages.run(spec.model_copy(update={"stage_cache": str(tmp_path / "cache")}))
        return RunDir(tmp_path / name)

    trial("first")
    second = trial("second", "finetune.epochs=1")
    assert {r["stage"] for r in second.metrics()} == {"finetune", "report"}
    alone = tiny.spec(data, tmp_path / "alone", "finetune.epochs=1")
    stages.run(alone)
    assert trace(second)["weights"] == trace(RunDir(tmp_path / "alone"))["weights"]
    other_search = trial("third", "search.lambda=0.5", "search.epochs=1")
    assert {r["stage"] for r in other_search.metrics()} == {"search", "compress", "finetune", "report"}


def test_given_weights_replace_the_pretraining(data: Path, tmp_path: Path, undisturbed: dict[str, Any]):
    full = tiny.spec(data, tmp_path / "full", "search.method=full_precision")
    assert stages.run(full)["bop_reduction"] == 1.0
    weights = RunDir(full.run_dir).weights_path
    spec = tiny.spec(data, tmp_path / "sbs").model_copy(update={"init": str(weights)})
    stages.run(spec)
    assert trace(RunDir(spec.run_dir))["weights"] == undisturbed["weights"]
    assert RunDir(spec.run_dir).metrics()[0]["stage"] == "search"
    with pytest.raises(UserError, match=r"weights do not fit model.name = 'resnet32'"):
        stages.run(tiny.spec(data, tmp_path / "other", "model.name=resnet32").model_copy(update={"init": str(weights)}))
    assert RunDir(tmp_path / "other").error() is not None


def test_a_run_goes_on_from_its_remote_copy_on_another_machine(data: Path, tmp_path: Path, undisturbed: dict[str, Any]):
    remote = f"run.remote=file://{tmp_path}/bucket"
    here, there = tmp_path / "here" / "trial", tmp_path / "there" / "trial"
    assert disturbed(tiny.spec(data, here, remote), "step:21").returncode == -9
    shutil.rmtree(here)
    spec = tiny.spec(data, there, remote)
    stages.run(spec)
    assert trace(RunDir(there)) == undisturbed
    assert starts(spec) == 2
    copy = RunDir(tmp_path / "bucket" / "trial")
    assert trace(copy) == undisturbed
    assert not list(copy.checkpoints.glob("*-[0-9]*"))
    with pytest.raises(UserError, match=r"run.remote = 'nonsense://x'"):
        stages.run(tiny.spec(data, tmp_path / "other", "run.remote=nonsense://x"))
    error = RunDir(tmp_path / "other").error()  # Ray would try again without it
    assert error is not None
    assert "nonsense" in error["message"]
