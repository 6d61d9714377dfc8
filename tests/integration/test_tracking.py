"""The mirror and the rebuilding of stores against real sqlite stores."""

import json
import shutil
from pathlib import Path

import pytest

from harness.run_dir import RunDir, write_json
from harness.tracking.cli import sync
from harness.tracking.copying import Place, sync_sweep, sync_trial
from harness.tracking.mirror import Mirror
from tests.integration.fake_trial import expected, write_trial
from tests.integration.mlflow_stores import PLACE, append_epoch, contents, describe_sweep, spec, sqlite_store
from tests.integration.waiting import wait_for

pytestmark = [pytest.mark.integration, pytest.mark.timeout(240)]


def test_a_lost_store_is_rebuilt_and_twice_gives_the_same(tmp_path: Path):
    folder = describe_sweep(tmp_path)
    for number in range(3):
        run = write_trial(spec(tmp_path, number))
        (run.path / "changes-0123abcd.diff").write_text("-a\n+b\n")
    first = sqlite_store(tmp_path / "first")
    with Mirror(first, PLACE, folder, poll_s=0.1) as mirror:
        for run in sorted((folder / "trials").iterdir()):
            mirror.ended(RunDir(run), "FINISHED")
        assert mirror.close() is None
    original = contents(first)
    assert set(original) == {"exp", "trial0", "trial1", "trial2"}
    assert original["trial1"]["status"] == "FINISHED"
    assert original["trial1"]["end"] == 1700000003000
    assert {"policy.json", "layers.png", "search.png", "search.csv", "changes-0123abcd.diff"} <= set(
        original["trial1"]["files"]
    )
    shutil.rmtree(tmp_path / "first")
    rebuilt = sqlite_store(tmp_path / "second")
    assert sync_sweep(rebuilt, folder) == 3
    assert contents(rebuilt) == original
    assert sync_sweep(rebuilt, folder) == 3
    assert contents(rebuilt) == original
    found = sorted(rebuilt.summaries("exp") or [], key=lambda row: row["key"])
    assert found == [summary_of(folder / "trials" / f"trial{number}") for number in range(3)]


def summary_of(path: Path) -> dict:
    from harness.tracking import record

    found = record.summary(RunDir(path))
    assert found is not None
    return found


def test_only_settled_records_are_sent_and_a_resume_supersedes_nothing(tmp_path: Path):
    made = spec(tmp_path)
    run = RunDir(made.run_dir)
    write_json(run.config_path, made.recipe.to_dict())
    append_epoch(run, 1)
    with run.metrics_path.open("a") as file:  # beyond the checkpoint: a resume will write this epoch again
        lost = {"seq": 3, "time": 1.7e9 + 5, "kind": "metrics", "stage": "search", "epoch": 2, "step": 20}
        file.write(json.dumps(lost | {"metrics": {"search/loss": 99.0}}) + "\n")
    store = sqlite_store(tmp_path / "store")
    with Mirror(store, Place("exp"), poll_s=0.05) as mirror:
        mirror.watch(run)
        wait_for((run.path / "mlflow.json").exists, 60, "the first record")
        assert contents(store)["trial0"]["status"] == "RUNNING"
        text = run.metrics_path.read_text().splitlines(keepends=True)
        run.metrics_path.write_text("".join(text[:2]))
        append_epoch(run, 2)
        append_epoch(run, 3)
        write_json(run.result_path, expected(made))
        mirror.ended(run, "FINISHED")
        assert mirror.close() is None
    history = contents(store)["trial0"]["history"]
    assert [(step, value) for step, _, value in history["search/loss"]] == [(10, 1.0), (20, 0.5), (30, 1 / 3)]
    assert [step for step, *_ in history["final/top1"]] == [30]


@pytest.mark.parametrize(("files", "status"), [("result", "FINISHED"), ("error", "FAILED"), ("", "KILLED")])
def test_status_for_every_way_to_end(tmp_path: Path, files: str, status: str):
    made = spec(tmp_path)
    run = write_trial(made, finish=files == "result")
    if files == "error":
        write_json(run.error_path, {"message": "the loss is nan", "stage": "search"})
    store = sqlite_store(tmp_path / "store")
    sync_trial(store, run)
    found = contents(store)["trial0"]
    assert found["status"] == status
    assert found["tags"].get("harness.error") == ("the loss is nan" if files == "error" else None)


def test_a_lone_trial_leaves_no_parent_running(tmp_path: Path):
    """With its sweep's folder around it the parent is that sweep; taken elsewhere, it ends like the trial."""
    folder = describe_sweep(tmp_path)
    run = write_trial(spec(tmp_path))
    at_home = sqlite_store(tmp_path / "home")
    assert sync_sweep(at_home, run.path) == 1
    parent = contents(at_home)["exp"]
    assert (parent["status"], parent["start"], parent["end"]) == ("FINISHED", 1000, 2000)
    assert parent["history"]["h"] == [(0, 2000, 2.5)]
    shutil.copytree(run.path, tmp_path / "taken" / "away" / "trial0")
    elsewhere = sqlite_store(tmp_path / "elsewhere")
    assert sync_sweep(elsewhere, tmp_path / "taken" / "away" / "trial0") == 1
    found = contents(elsewhere)
    assert [found[name]["status"] for name in ("exp", "trial0")] == ["FINISHED", "FINISHED"]
    assert found["exp"]["end"] == found["trial0"]["end"]
    told = json.loads((folder / "tracking.json").read_text())
    write_json(folder / "tracking.json", told | {"status": "RUNNING", "end_ms": None})
    assert sync_sweep(at_home, folder) == 1
    parent = contents(at_home)["exp"]
    assert (parent["status"], parent["end"]) == ("KILLED", 1700000003000), "its driver is gone"


def test_a_folder_of_runs_is_sent_with_its_lone_trials(tmp_path: Path):
    """One that goes on after it was sent is the same run when it has finished."""
    folder = describe_sweep(tmp_path)
    write_trial(spec(tmp_path))
    made = spec(tmp_path, 1).model_copy(update={"run_dir": str(folder.parent / "first"), "label": "lone"})
    lone = write_trial(made, finish=False)
    write_json(lone.path / "trial.json", {"key": made.key, "label": made.label, "experiment": "harness"})
    store = sqlite_store(tmp_path / "store")
    for status in ("KILLED", "FINISHED"):
        sync([folder.parent], store=store.uri)
        assert {"exp", "trial0"} <= set(contents(store))
        (found,) = store.client.search_runs([store.experiment("harness")])
        assert (found.info.run_name, found.info.status) == ("lone", status)
        write_json(lone.result_path, expected(made))


def test_what_somebody_works_on_is_running(tmp_path: Path):
    folder = describe_sweep(tmp_path)
    told = json.loads((folder / "tracking.json").read_text())
    write_json(folder / "tracking.json", told | {"status": "RUNNING", "end_ms": None})
    run = write_trial(spec(tmp_path), finish=False)
    store = sqlite_store(tmp_path / "store")
    with run.lock(), RunDir(folder).lock():  # a sweep's folder is locked alike
        sync_sweep(store, folder)
        assert {found["status"] for found in contents(store).values()} == {"RUNNING"}
    sync_sweep(store, folder)
    assert {found["status"] for found in contents(store).values()} == {"KILLED"}


def test_a_run_that_goes_on_after_a_kill_is_the_same_run(tmp_path: Path):
    made = spec(tmp_path)
    run = write_trial(made, epochs=2, finish=False)
    store = sqlite_store(tmp_path / "store")
    sync_trial(store, run)
    with Mirror(store, PLACE, poll_s=0.05) as mirror:
        mirror.watch(run)
        wait_for(lambda: contents(store)["trial0"]["status"] == "RUNNING", 60, "a running trial")
        append_epoch(run, 3)
        write_json(run.result_path, expected(made))
        mirror.ended(run, "FINISHED")
        assert mirror.close() is None
    found = contents(store)["trial0"]
    assert found["status"] == "FINISHED"
    assert len(found["history"]["search/loss"]) == 3
