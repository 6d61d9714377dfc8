"""What `harness train` makes of its options, and what it says in the end."""

import re
import time
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from harness import dry_run, train_cli
from harness.__main__ import app
from harness.config import Recipe, TrialSpec, load_recipe
from harness.errors import UserError
from harness.run_dir import RunDir, read_json, write_json
from harness.tracking.copying import place_of, trial_name
from harness.train_cli import from_cache, summary

RESULT: dict[str, Any] = {
    "key": "k", "label": "one", "top1": 90.0, "top5": 99.0, "loss": 0.5, "gbops": 1.0, "convention": "mac_product",
    "bop_reduction": 4.0, "mean_weight_bits": 4.0, "mean_activation_bits": 4.0, "pruned_share": 0.1, "params": 1000,
    "timings_s": {"finetune": 2.0, "report": 0.1},
}  # fmt: skip


def spec(folder: Path, *overrides: str, init: str | None = None) -> TrialSpec:
    recipe = load_recipe("digits_resnet20", overrides)
    own = {"run_dir": str(folder / "one"), "stage_cache": str(folder / "stages")}
    return TrialSpec(recipe=recipe, key="k", label="one", init=init, **own)


def fill_cache(folder: Path) -> None:
    """With names as if they held the outcomes of stages."""
    (folder / "stages").mkdir()
    for stage in ("pretrain", "search", "compress", "finetune"):
        (folder / "stages" / f"{stage}-0123abcd.pt").touch()


def test_stages_that_were_not_trained_here_are_named(tmp_path: Path):
    place = f"taken from {tmp_path / 'stages'} (trained before with the same settings)"
    assert from_cache(spec(tmp_path), RESULT) == [], "nothing was there to take: the sweep gave weights"
    fill_cache(tmp_path)
    assert from_cache(spec(tmp_path), RESULT) == [f"pretrain, search, compress: {place}"]
    assert from_cache(spec(tmp_path, init="w.pt"), RESULT) == [f"search, compress: {place}"], "given, not taken"
    own = RESULT | {"timings_s": dict.fromkeys(("pretrain", "search", "compress", "finetune", "report"), 1.0)}
    assert from_cache(spec(tmp_path), own) == []
    full = spec(tmp_path, "search.method=full_precision")
    assert from_cache(full, RESULT | {"timings_s": {"report": 0.1}}) == [f"pretrain: {place}"]


def test_remarks_are_the_last_lines_of_a_summary():
    lines = summary(RESULT, "search: taken from x", "runs/one").splitlines()
    assert lines[-3:] == ["  finetune 2.0 s, report 0.1 s", "  search: taken from x", "  runs/one"]


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[TrialSpec]:
    """The trials that would have been trained, here or on Ray, in place of training them."""
    specs: list[TrialSpec] = []

    def fake(spec: TrialSpec) -> dict[str, Any]:
        specs.append(spec)
        return RESULT | {"key": spec.key}

    monkeypatch.setattr(train_cli, "_here", fake)
    monkeypatch.setattr(train_cli, "_on_ray", fake)
    monkeypatch.setattr(train_cli, "ensure", lambda source, folder: "checksum")
    return specs


def train(*options: str) -> str:
    done = CliRunner().invoke(app, ["train", "digits_resnet20", *options], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.stdout


@pytest.mark.parametrize("ray", [[], ["--ray"]])
def test_a_lone_run_says_what_it_took_from_others(tmp_path: Path, trained: list[TrialSpec], ray: list[str]):
    fill_cache(tmp_path)
    printed = train("--run-dir", str(tmp_path / "one"), *ray)
    assert f"\n  pretrain, search, compress: taken from {tmp_path / 'stages'} (" in printed
    assert len(trained) == 1


def test_progress_of_a_lone_run_tells_of_no_sweep(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """What its lines are, `test_progress.py` knows."""
    shown = ""

    def slow(spec: TrialSpec) -> dict[str, Any]:
        nonlocal shown
        told = {"stage": "search", "epoch": 3, "epochs": 4, "step": 75, "total_steps": 100, "samples_per_s": 9.0}
        RunDir(spec.run_dir).write_progress(told | {"time": time.time() + 10})
        deadline = time.monotonic() + 20
        while "search 3/4" not in shown:
            assert time.monotonic() < deadline, "no progress was shown"
            time.sleep(0.05)
            shown += capsys.readouterr().out
        return RESULT

    monkeypatch.setattr(train_cli, "_here", slow)
    monkeypatch.setattr(train_cli, "ensure", lambda source, folder: "checksum")
    train_cli.train("digits_resnet20", [], tmp_path / "one", init=None, ray=False, dry_run=False)
    assert "resnet20-sbs-lambda0.3-seed0: search 3/4" in shown
    assert "1/1" not in shown
    assert "sweep" not in shown


def test_given_weights_reach_the_trial(tmp_path: Path, trained: list[TrialSpec]):
    weights = tmp_path / "given.pt"
    weights.write_bytes(b"weights")
    train("--run-dir", str(tmp_path / "one"))
    train("--run-dir", str(tmp_path / "two"), "--init", str(weights))
    without, given = trained
    assert (without.init, without.recipe.model.weights) == (None, None)
    assert (given.init, given.recipe.model.weights) == (str(weights), str(weights))
    assert without.key != given.key


def test_an_unfinished_lone_run_has_the_name_that_its_result_will_have(tmp_path: Path, trained: list[TrialSpec]):
    """Or a store that is filled while it trains and after would hold it twice."""
    run = RunDir(tmp_path / "one")
    train("--run-dir", str(run.path))
    assert trial_name(run) == (trained[0].key, trained[0].label)
    assert (place_of(run.path).experiment, place_of(run.path).sweep) == ("harness", None)
    train("--run-dir", str(run.path), "--set", "search.lambda=0.7")
    assert trial_name(run) == (trained[1].key, trained[1].label) != (trained[0].key, trained[0].label)
    of_a_sweep = {"key": trained[0].key, "label": "a sweep's", "experiment": "exp", "sweep": "exp"}
    write_json(run.path / "trial.json", of_a_sweep)
    train("--run-dir", str(run.path))
    assert read_json(run.path / "trial.json") == of_a_sweep
    assert trial_name(run) == (trained[0].key, "a sweep's")


def test_who_was_refused_does_not_name_the_run_at_work(tmp_path: Path, trained: list[TrialSpec]):
    """The second command finds the folder in use; the first goes on and finishes."""
    run = RunDir(tmp_path / "one")
    train("--run-dir", str(run.path))
    train("--run-dir", str(run.path), "--set", "search.lambda=0.7")
    write_json(run.result_path, RESULT | {"key": trained[0].key})
    assert trial_name(run) == (trained[0].key, "one")


@pytest.mark.parametrize("ray", [[], ["--ray"]])
def test_a_folder_with_the_result_of_other_settings_is_refused(
    tmp_path: Path, trained: list[TrialSpec], ray: list[str]
):
    """Its figures would pass for those that were asked for."""
    run = RunDir(tmp_path / "one")
    train("--run-dir", str(run.path))
    write_json(run.result_path, RESULT | {"key": trained[0].key})
    options = ["--run-dir", str(run.path), "--set", "search.lambda=0.7", *ray]
    refused = CliRunner().invoke(app, ["train", "digits_resnet20", *options])
    assert isinstance(refused.exception, UserError)
    assert re.search("one belongs to another trial, one .*; give another --run-dir", str(refused.exception))
    assert len(trained) == 1
    assert run.result() == RESULT | {"key": trained[0].key}


def test_an_unfinished_trial_of_a_sweep_takes_no_other(tmp_path: Path, trained: list[TrialSpec]):
    """The sweep would take the result for its own trial's."""
    run = RunDir(tmp_path / "one").create()
    told = {"key": "another", "label": "a sweep's", "experiment": "exp", "sweep": "exp"}
    write_json(run.path / "trial.json", told)
    refused = CliRunner().invoke(app, ["train", "digits_resnet20", "--run-dir", str(run.path)])
    assert isinstance(refused.exception, UserError)
    assert "belongs to another trial, a sweep's (key another)" in str(refused.exception)
    assert (trained, read_json(run.path / "trial.json")) == ([], told)


def test_a_dry_run_takes_weights_and_says_what_had_no_effect(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    seen: list[tuple[str | None, Path | None]] = []

    def fake(recipe: Recipe, init: Path | None = None) -> dict[str, Any]:
        seen.append((recipe.model.weights, init))
        return RESULT

    monkeypatch.setattr(dry_run, "dry_run", fake)
    assert train("--dry-run").endswith("\n  dry run: the figures mean nothing\n")
    weights = tmp_path / "given.pt"
    printed = train("--dry-run", "--init", str(weights), "--ray", "--run-dir", str(tmp_path / "one"))
    assert printed.endswith("\n  dry run: the figures mean nothing; --run-dir and --ray had no effect\n")
    assert seen == [(None, None), (str(weights), weights)]
    assert not (tmp_path / "one").exists()


@pytest.mark.parametrize("dry", [[], ["--dry-run"]])
def test_missing_weights_are_refused_at_once(tmp_path: Path, trained: list[TrialSpec], dry: list[str]):
    options = ["--init", str(tmp_path / "none.pt"), "--run-dir", str(tmp_path / "one"), *dry]
    with pytest.raises(UserError, match=r"model.weights not found: .*none.pt. Give a state dict"):
        train(*options)
    assert not trained
