"""The loop on a GPU: every recipe meant for one, two steps a stage, in the arithmetic that it asks for."""

import pytest
import torch

from harness.config import load_recipe, recipe_names
from harness.dry_run import dry_run

pytestmark = pytest.mark.gpu


@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", [name for name in recipe_names() if load_recipe(name).run.gpus_per_worker])
def test_dry_run(name: str):
    torch.cuda.reset_peak_memory_stats()
    result = dry_run(load_recipe(name, ["data.image_size=64", "data.eval_image_size=64"]))
    assert result["stack"]["device"] == "cuda"
    assert torch.cuda.max_memory_allocated() > 1e6


@pytest.mark.timeout(600)
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_with_compile(precision: str):
    sets = ["run.gpus_per_worker=1", f"run.precision={precision}", "run.compile=true", "run.deterministic=false"]
    assert dry_run(load_recipe("digits_resnet20", sets))["loss"] < 20
