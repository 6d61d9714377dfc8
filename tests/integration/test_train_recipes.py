"""No recipe is dead text: each one's network goes through all stages, two steps each, on made-up images."""

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

import sbs
from harness.checkpoint import save_weights
from harness.config import load_recipe, recipe_names
from harness.dry_run import dry_run, shortened
from harness.errors import UserError
from harness.train_cli import with_init

pytestmark = pytest.mark.integration


@pytest.fixture(autouse=True)
def _eager() -> Iterator[None]:
    sbs.use_compiled(False)
    yield
    sbs.use_compiled(True)


@pytest.mark.parametrize("name", recipe_names())
def test_dry_run(name: str, caplog: pytest.LogCaptureFixture):
    small = ["data.image_size=64", "data.eval_image_size=64"] if name.startswith("imagenet") else []
    recipe = load_recipe(name, small)
    result = dry_run(recipe)
    assert set(result["timings_s"]) == {"pretrain", "search", "compress", "finetune", "report"}
    assert result["bop_reduction"] >= 16
    assert result["model"] == recipe.model.name
    assert result["stack"]["loader"] == "made-up images"
    assert "no gate" not in caplog.text, "after two steps"


@pytest.mark.parametrize("method", ["full_precision", "uniform_4", "sbs_prune", "prune_then_quant"])
def test_dry_run_of_other_methods(method: str):
    result = dry_run(load_recipe("digits_resnet20", [f"search.method={method}", "search.epochs=2"]))
    assert result["method"] == method


@pytest.mark.parametrize("method", ["sbs", "uniform_4"])
def test_calibration_and_batch_norms_are_in_the_arithmetic_of_the_steps(monkeypatch: pytest.MonkeyPatch, method: str):
    seen: dict[str, list[torch.dtype]] = {"calibrate": [], "estimate_norms": []}

    def watched(name: str) -> Callable[[nn.Module, Iterable[torch.Tensor]], None]:
        original = getattr(sbs, name)

        def function(net: nn.Module, batches: Iterable[torch.Tensor]) -> None:
            seen[name].append(torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else torch.float32)
            original(net, batches)

        return function

    for name in seen:
        monkeypatch.setattr(sbs, name, watched(name))
    for precision in ("fp32", "bf16"):
        dry_run(load_recipe("digits_resnet20", [f"search.method={method}", f"run.precision={precision}"]))
    # at the end of the finetune; in a search also before its one validation, and after compression
    times = 3 if method == "sbs" else 1
    assert seen["calibrate"] == [torch.float32, torch.bfloat16]
    assert seen["estimate_norms"] == [torch.float32] * times + [torch.bfloat16] * times


def test_a_dry_run_from_given_weights(tmp_path: Path):
    """They are loaded as in a real run: they spare the pretraining, and those of another network are refused."""
    right, wrong, garbage = (tmp_path / f"{name}.pt" for name in ("right", "wrong", "garbage"))
    save_weights(right, sbs.models.build("resnet20", 10).state_dict())
    save_weights(wrong, sbs.models.build("resnet20", 11).state_dict())
    garbage.write_bytes(b"no weights")

    def tried(init: Path, *overrides: str) -> set[str]:
        recipe = with_init(load_recipe("digits_resnet20", overrides), init)
        return set(dry_run(recipe, init)["timings_s"])

    assert tried(right) == {"search", "compress", "finetune", "report"}
    for overrides in ([], ["search.method=full_precision"]):
        with pytest.raises(UserError, match=r"the given weights do not fit model.name = 'resnet20'"):
            tried(wrong, *overrides)
    with pytest.raises(UserError, match=r"garbage.pt is not a readable state dict"):
        tried(garbage)


def test_a_shortened_recipe_keeps_what_is_tried_out():
    recipe = load_recipe("imagenet_resnet50", ["search.accumulate=4"])
    small = shortened(recipe)
    assert small.model == recipe.model
    assert small.data.image_size == recipe.data.image_size
    assert (small.data.batch_size, small.run.max_workers) == (8, 1)
    assert (small.search.lr, small.search.epochs, small.search.accumulate) == (recipe.search.lr, 1, 4)
