"""Networks whose batch norms would lag behind are validated with statistics of their own."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import sbs
from harness import stages
from harness.checkpoint import load
from harness.config import Recipe
from harness.data import open_data
from harness.networks import restored
from harness.run_dir import RunDir
from tests.integration import tiny

pytestmark = [pytest.mark.ffcv, pytest.mark.integration]
BATCHES = 4
# Flipping gates in the search, averaged weights in the finetune.
OVERRIDES = (
    "pretrain.epochs=1",
    "finetune.epochs=1",
    f"search.norm_batches={BATCHES}",
    "run.checkpoint_every_steps=null",
)
LAST_EPOCH = {"search": 3, "finetune": 0}


@pytest.fixture(scope="module", autouse=True)
def _eager():
    sbs.use_compiled(False)
    yield
    sbs.use_compiled(True)


@pytest.fixture(scope="module")
def trial(tmp_path_factory: pytest.TempPathFactory) -> tuple[Recipe, RunDir]:
    spec = tiny.spec(tiny.write_data(tmp_path_factory.mktemp("tiny")), tmp_path_factory.mktemp("run"), *OVERRIDES)
    stages.run(spec)
    return spec.recipe, RunDir(spec.run_dir)


def norms_of(net: nn.Module) -> dict[str, nn.BatchNorm2d]:
    return {name: module for name, module in net.named_modules() if isinstance(module, nn.BatchNorm2d)}


def statistics_by_hand(net: nn.Module, batches: list[torch.Tensor]) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Mean over the batches of each batch's mean and variance of what reaches a norm, which normalises by them."""
    seen: dict[str, list[tuple[torch.Tensor, torch.Tensor]]] = {name: [] for name in norms_of(net)}

    def look(name: str) -> Any:
        def hook(norm: nn.Module, inputs: tuple[torch.Tensor]) -> None:
            values = inputs[0].detach().double().transpose(0, 1).flatten(1)
            seen[name].append((values.mean(1), values.var(1, correction=1)))

        return hook

    hooks = [norm.register_forward_pre_hook(look(name)) for name, norm in norms_of(net).items()]
    net.eval()
    for norm in norms_of(net).values():
        norm.train()
        norm.momentum = 0.0  # its own statistics stay
    with torch.no_grad():
        for images in batches:
            net(images)
    for hook in hooks:
        hook.remove()
    return {
        name: (torch.stack([m for m, _ in pairs]).mean(0), torch.stack([v for _, v in pairs]).mean(0))
        for name, pairs in seen.items()
    }


@pytest.mark.parametrize("stage", ["search", "finetune"])
def test_what_is_validated_has_the_statistics_of_its_own_gates_and_weights(stage: str, trial: tuple[Recipe, RunDir]):
    recipe, run = trial
    best = load(run.checkpoints / f"best-{stage}.pt")
    assert best is not None
    net = restored(recipe, best["net"], best["policy"])
    loader = open_data(recipe.data, "train", batch_size=16, seed=0)
    batches = [images.clone() for images, _ in loader.epoch(LAST_EPOCH[stage])][:BATCHES]
    for name, (mean, variance) in statistics_by_hand(net, batches).items():
        norm = norms_of(net)[name]
        torch.testing.assert_close(norm.running_mean, mean.float(), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(norm.running_var, variance.float(), rtol=1e-4, atol=1e-5)
    net.eval()
    with torch.no_grad():
        right = sum(
            int((net(images).argmax(1) == labels).sum())
            for images, labels in open_data(recipe.data, "val", batch_size=40, seed=0).epoch(0)
        )
    (recorded,) = (
        r["metrics"] for r in run.metrics() if (r["stage"], r["epoch"], r["kind"]) == (stage, best["epoch"], "metrics")
    )
    assert recorded[f"{stage}/top1"] == pytest.approx(100 * right / 40)


def test_the_result_has_the_statistics_of_the_final_weights(trial: tuple[Recipe, RunDir]):
    recipe, run = trial
    weights = torch.load(run.weights_path, weights_only=True)
    policy = sbs.Policy.load(run.policy_path).to_json()
    net = restored(recipe, weights, policy)
    loader = open_data(recipe.data, "train", batch_size=16, seed=0)
    by_hand = statistics_by_hand(net, [images.clone() for images, _ in loader.epoch(0)][:BATCHES])
    for name, (mean, _) in by_hand.items():
        torch.testing.assert_close(weights[f"{name}.running_mean"], mean.float(), rtol=1e-4, atol=1e-5)


def test_without_batches_for_them_statistics_are_those_that_ran_along(tmp_path: Path, trial: tuple[Recipe, RunDir]):
    recipe, run = trial
    data = Path(recipe.data.dir)
    spec = tiny.spec(data, tmp_path, *OVERRIDES, "search.epochs=1", "search.norm_batches=0")
    stages.run(spec)
    best = load(tmp_path / "checkpoints" / "best-search.pt")
    assert best is not None
    counts = {int(value) for name, value in best["net"].items() if name.endswith("num_batches_tracked")}
    # 4 of the calibration, then 6 steps
    assert counts == {4 + 6}
    again = load(run.checkpoints / "best-search.pt")
    assert again is not None
    assert {int(v) for name, v in again["net"].items() if name.endswith("num_batches_tracked")} == {BATCHES}
