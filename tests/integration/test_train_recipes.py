"""No recipe is dead text: each one's network goes through all stages, two steps each, on made-up images."""

from collections.abc import Iterator

import pytest

import sbs
from harness.config import load_recipe, recipe_names
from harness.dry_run import dry_run, shortened

pytestmark = pytest.mark.integration


@pytest.fixture(autouse=True)
def _eager() -> Iterator[None]:
    sbs.use_compiled(False)
    yield
    sbs.use_compiled(True)


@pytest.mark.parametrize("name", recipe_names())
def test_dry_run(name: str):
    small = ["data.image_size=64", "data.eval_image_size=64"] if name.startswith("imagenet") else []
    recipe = load_recipe(name, small)
    result = dry_run(recipe)
    assert set(result["timings_s"]) == {"pretrain", "search", "compress", "finetune", "report"}
    assert result["bop_reduction"] >= 16
    assert result["model"] == recipe.model.name
    assert result["stack"]["loader"] == "made-up images"


@pytest.mark.parametrize("method", ["full_precision", "uniform_4", "sbs_prune", "prune_then_quant"])
def test_dry_run_of_other_methods(method: str):
    result = dry_run(load_recipe("digits_resnet20", [f"search.method={method}", "search.epochs=2"]))
    assert result["method"] == method


def test_a_shortened_recipe_keeps_what_is_tried_out():
    recipe = load_recipe("imagenet_resnet50", ["search.accumulate=4"])
    small = shortened(recipe)
    assert small.model == recipe.model
    assert small.data.image_size == recipe.data.image_size
    assert (small.data.batch_size, small.run.max_workers) == (8, 1)
    assert (small.search.lr, small.search.epochs, small.search.accumulate) == (recipe.search.lr, 1, 4)
