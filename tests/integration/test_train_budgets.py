"""Real searches towards budgets on the tiny trial: they land, one serves several, kills and ranks change nothing."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

import sbs
from harness import stages
from harness.run_dir import RunDir
from tests.integration import tiny
from tests.integration.test_train_resume import disturbed, trace
from tests.integration.waiting import running

pytestmark = [pytest.mark.ffcv, pytest.mark.integration]
BUDGETS = (0.05, 0.03, 0.015)
# MACs of ResNet-20 as in test_train_methods.py, at 32 x 32 bits
FULL_BOPS = ((40_818_944 - 6_400) // 4 + 64 * 8) * 1024
# 6 steps an epoch: pretrain 0-5, search 6-29, finetune 30-35
EPOCHS = ("pretrain.epochs=1", "search.epochs=4", "finetune.epochs=1")
SNAPSHOTS = (*EPOCHS, "search.lambda=null", "search.snapshots=[0.05, 0.03, 0.015]")


@pytest.fixture(scope="module", autouse=True)
def _eager():
    sbs.use_compiled(False)
    yield
    sbs.use_compiled(True)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_data(tmp_path_factory.mktemp("tiny"))


@dataclass(frozen=True)
class Trial:
    """A finished trial."""

    run: RunDir
    result: dict[str, Any]

    @property
    def stages(self) -> set[str]:
        return {record["stage"] for record in self.run.metrics()}

    @property
    def remarks(self) -> dict[str, int]:
        """What a search said, and after which step of the trial."""
        return {r["message"]: r["step"] for r in self.run.metrics() if r["kind"] == "event"}


@pytest.fixture(scope="module")
def snapshots(data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[float, Trial]:
    """The first budget's trial searches for all, as it comes first here."""
    folder = tmp_path_factory.mktemp("snapshots")
    made = {}
    for budget in BUDGETS:
        spec = tiny.spec(data, folder / str(budget), *SNAPSHOTS, f"search.budget={budget}")
        result = stages.run(spec.model_copy(update={"stage_cache": str(folder / "cache")}))
        made[budget] = Trial(RunDir(spec.run_dir), result)
    return made


def lands(result: dict[str, Any], budget: float) -> bool:
    """By the layers of the result, which the compressed network gives: none of the search's own accounts."""
    bops = sum(layer["macs"] * layer["weight_bits"] * layer["activation_bits"] for layer in result["layers"])
    assert result["bop_reduction"] == pytest.approx(FULL_BOPS / bops)
    return 0.97 * budget <= bops / FULL_BOPS <= budget


@pytest.mark.parametrize(
    ("overrides", "budget"),
    [
        (["search.budget=0.02"], 0.02),
        (["search.gbops=0.4", "search.method=sbs_quant"], 0.4e9 / FULL_BOPS),
    ],
)
def test_a_search_lands_on_its_budget(data: Path, tmp_path: Path, overrides: list[str], budget: float):
    # of 60 steps, so that the gates rest from the end of the ninth epoch of ten
    result = stages.run(tiny.spec(data, tmp_path, *EPOCHS, "search.lambda=null", "search.epochs=10", *overrides))
    assert lands(result, budget)
    assert result["lambda"] is None
    run = RunDir(tmp_path)
    epochs = [r for r in run.metrics() if r["stage"] == "search" and r["kind"] == "metrics"]
    assert all("search/lambda" in record["metrics"] for record in epochs)
    assert max(record["metrics"]["search/lambda"] for record in epochs) > 0
    costs = [sum(layer[-1] for layer in record["layers"]) / FULL_BOPS for record in epochs]
    assert costs[0] == 1 / 16, "a search begins with every gate open"
    assert all(0.97 * budget <= cost <= budget for cost in costs[8:])
    assert epochs[8]["layers"] == epochs[9]["layers"]
    (step,) = Trial(run, result).remarks.values()
    assert step == 6 + 54, "landed when nine tenths of the search were over"


def test_one_search_gives_a_network_for_each_budget(snapshots: dict[float, Trial]):
    for budget, trial in snapshots.items():
        assert lands(trial.result, budget)
    assert snapshots[0.05].stages == {"pretrain", "search", "compress", "finetune", "report"}
    assert snapshots[0.03].stages == snapshots[0.015].stages == {"compress", "finetune", "report"}
    assert snapshots[0.03].result["timings_s"].keys() == {"compress", "finetune", "report"}, "time of its own alone"
    assert len({trial.run.policy_path.read_text() for trial in snapshots.values()}) == 3
    # of the 24 steps of the search: 3% + 52% x log(0.0625 / budget) / log(0.0625 / 0.015) of them, and nine tenths
    taken = {text.split(" of full")[0]: step - 6 for text, step in snapshots[0.05].remarks.items() if "budget" in text}
    assert taken == {"budget of 0.05": 3, "budget of 0.03": 8, "budget of 0.015": 22}


def test_a_killed_search_keeps_its_snapshots(data: Path, tmp_path: Path, snapshots: dict[float, Trial]):
    undisturbed = snapshots[0.05]
    taken = next(step for text, step in undisturbed.remarks.items() if "budget of 0.05" in text)
    assert taken == 9, "the first budget is passed early in the search"
    spec = tiny.spec(data, tmp_path, *SNAPSHOTS, "search.budget=0.05")
    assert disturbed(spec, f"step:{taken + 3}").returncode == -9  # a checkpoint every two steps
    stages.run(spec)
    assert trace(RunDir(tmp_path)) == trace(undisturbed.run)
    assert Trial(RunDir(tmp_path), {}).remarks == undisturbed.remarks


@pytest.mark.timeout(240)
def test_ranks_agree_on_every_gate(data: Path, tmp_path: Path):
    spec = tiny.spec(data, tmp_path, *SNAPSHOTS, "run.workers=2", "search.budget=0.05")
    path = RunDir(spec.run_dir).create().path / "spec.json"
    path.write_text(spec.model_dump_json(by_alias=True))
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*launcher, "-m", "tests.integration.budget_ranks", str(path)]
    with running(command, tmp_path / "log", {"OMP_NUM_THREADS": "1"}) as process:
        assert process.wait(200) == 0, (tmp_path / "log").read_text()
    result = RunDir(tmp_path).result()
    assert result is not None
    assert result["stack"]["world_size"] == 2
    assert lands(result, 0.05)
    first, second = (torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in (0, 1))
    assert first.keys() == second.keys() == {"net", "0.05", "0.03"}
    for name, state in first.items():
        assert state.keys() == second[name].keys()
        for key, tensor in state.items():
            assert torch.equal(tensor, second[name][key]), f"{name}: {key} differs"
