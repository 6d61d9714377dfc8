"""`python -m harness eval` gives a network's own figures, from whatever of it was saved."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import sbs
from harness import stages
from harness.checkpoint import load_weights
from harness.errors import UserError
from harness.eval_cli import evaluate_saved
from harness.run_dir import RunDir
from tests.integration import tiny
from tests.integration.test_train_resume import disturbed

pytestmark = [pytest.mark.ffcv, pytest.mark.integration]


@pytest.fixture(scope="module", autouse=True)
def _eager():
    sbs.use_compiled(False)
    yield
    sbs.use_compiled(True)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    spec = tiny.spec(tiny.write_data(tmp_path_factory.mktemp("tiny")), tmp_path_factory.mktemp("run"))
    stages.run(spec)
    return RunDir(spec.run_dir)


@pytest.fixture
def figures(capsys: pytest.CaptureFixture[str]) -> Callable[..., dict[str, Any]]:
    def read(target: Path, **options: Any) -> dict[str, Any]:
        options = {"data": None, "policy_file": None, "recipe_name": None} | options
        evaluate_saved(target, **options, as_json=True)
        return json.loads(capsys.readouterr().out)

    return read


def recorded(run: RunDir, stage: str) -> dict[str, float]:
    found = [r["metrics"] for r in run.metrics() if r["stage"] == stage and r["kind"] == "metrics"][-1]
    return {name: found[f"{stage}/{name}"] for name in ("top1", "top5", "val_loss")}


def test_a_finished_run_has_the_figures_of_its_result(run: RunDir, figures: Callable[..., dict[str, Any]]):
    result, found = run.result(), figures(run.path)
    assert result is not None
    for name in ("top1", "top5", "loss", "gbops", "bop_reduction", "params", "bytes", "convention"):
        assert found[name] == result[name]
    assert found["images"] == 40


@pytest.mark.parametrize("stage", ["pretrain", "search", "compress", "finetune"])
def test_the_outcome_of_each_stage(stage: str, run: RunDir, figures: Callable[..., dict[str, Any]]):
    found = figures(run.stages / f"{stage}.pt")
    assert {"top1": found["top1"], "top5": found["top5"], "val_loss": found["loss"]} == recorded(run, stage)
    assert (found["bop_reduction"] == 1) == (stage == "pretrain")


def test_the_best_weights_have_the_best_figures(run: RunDir, figures: Callable[..., dict[str, Any]]):
    top1 = [r["metrics"].get("finetune/top1", 0) for r in run.metrics()]
    assert figures(run.checkpoints / "best-finetune.pt")["top1"] == max(top1)


def test_an_unfinished_run_is_judged_by_its_newest_checkpoint(
    tmp_path: Path, run: RunDir, figures: Callable[..., dict[str, Any]]
):
    data = Path(json.loads(run.config_path.read_text())["data"]["dir"])
    spec = tiny.spec(data, tmp_path, "run.checkpoint_every_steps=null")
    # evaluations: 2 of the pretraining, 4 of the search, 1 behind it, then that of the first finetuned epoch
    assert disturbed(spec, "term-eval:8").returncode == 85
    found = figures(tmp_path)
    assert found["file"].endswith("checkpoints/finetune-00000042.pt")
    epochs = [r["metrics"] for r in run.metrics() if r["stage"] == "finetune" and r["kind"] == "metrics"]
    assert found["loss"] == pytest.approx(epochs[0]["finetune/val_loss"], rel=1e-12)

    # The same as two ranks leave it: rank 0's batch-norm statistics beside the weights, all ranks' in a list.
    path = tmp_path / "checkpoints" / "finetune-00000042.pt"
    state = torch.load(path, weights_only=True)
    (own,) = state["norms"][-1]
    apart = 0.3 * own.abs()
    state["norms"] = [[own - apart, own + apart]] * len(state["norms"])
    for weights in (state["net"], state["ema"]):
        for name in weights:
            if name.endswith(("running_mean", "running_var")):
                weights[name] = weights[name] * 0.7
    torch.save(state, path)
    assert figures(path)["loss"] == pytest.approx(found["loss"], rel=1e-5)


def test_exports_and_plain_weights(run: RunDir, tmp_path: Path, figures: Callable[..., dict[str, Any]]):
    expected = figures(run.path)
    weights = tmp_path / "plain.pth"
    weights.write_bytes(run.weights_path.read_bytes())
    (tmp_path / "config.json").write_text(run.config_path.read_text())
    named = figures(weights, policy_file=run.policy_path)
    assert (named["loss"], named["gbops"]) == (expected["loss"], expected["gbops"])
    with pytest.raises(UserError, match="name its policy with --policy"):
        figures(weights)
    policy = sbs.Policy.load(run.policy_path)
    net = sbs.compress(sbs.models.build("resnet20", 8), policy, example_input=torch.zeros(1, 3, 16, 16))
    net.load_state_dict(load_weights(run.weights_path))
    sbs.export(net, tmp_path / "net.sbs")
    exported = figures(tmp_path / "net.sbs")
    assert (exported["top1"], exported["gbops"]) == (expected["top1"], expected["gbops"])
    assert exported["loss"] == pytest.approx(expected["loss"], rel=1e-6)


def test_two_processes_give_the_same_figures(run: RunDir, figures: Callable[..., dict[str, Any]]):
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*launcher, "-m", "harness", "eval", str(run.path), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    two, one = json.loads(done.stdout), figures(run.path)
    assert two.pop("loss") == pytest.approx(one.pop("loss"), rel=1e-6)
    assert two == one


def test_mistakes(run: RunDir, tmp_path: Path, figures: Callable[..., dict[str, Any]]):
    with pytest.raises(UserError, match=r"no config.json there or above .* --recipe"):
        figures(tmp_path / "absent.pt")
    with pytest.raises(UserError, match="is neither a file nor a run directory"):
        figures(run.path / "absent.pt")
    (tmp_path / "config.json").write_text(run.config_path.read_text())
    with pytest.raises(UserError, match="holds no weights"):
        figures(tmp_path)
    (tmp_path / "junk.pt").write_text("junk")
    with pytest.raises(UserError, match=r"junk.pt is not a readable state dict"):
        figures(tmp_path / "junk.pt")
    (tmp_path / "junk.bin").write_text("junk")
    with pytest.raises(sbs.SbsError, match="not an exported network"):
        figures(tmp_path / "junk.bin")
