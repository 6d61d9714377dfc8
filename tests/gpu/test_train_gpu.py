"""The loop on a GPU: every recipe meant for one, two steps a stage, in the arithmetic that it asks for; its steps."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import sbs
from harness.arithmetic import arithmetic
from harness.config import load_recipe, recipe_names
from harness.data.device import DeviceFeed
from harness.data.normalise import normalise, plain
from harness.dry_run import dry_run
from harness.graphed import GraphedStep
from harness.networks import full_precision, supernet
from harness.pressure import pressure_of
from harness.ranks import Ranks
from harness.step import Job, Stepper
from tests.unit.data.test_device import CAPACITY, content, host, table
from tests.unit.harness.test_step import NETWORKS, fixed, network

pytestmark = pytest.mark.gpu
MAKE = {"pretrain": network, "finetune": fixed}


def alone() -> Ranks:
    return Ranks(0, 1, torch.device("cuda", 0), "none", "process")


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


@contextmanager
def steps(stage: str, net: nn.Module, *overrides: str) -> Iterator[Stepper]:
    """Steps with averaged weights, clipped gradients and two parts, alone on the GPU."""
    sets = ["run.gpus_per_worker=1", "run.workers=1", *overrides]
    recipe = load_recipe("digits_resnet20", sets)
    more = {"ema_decay": 0.9, "clip_norm": 1.0, "accumulate": 2}
    config = getattr(recipe, stage).model_copy(update=more)
    with arithmetic(recipe.run):
        net = net.to("cuda", memory_format=torch.channels_last).train()  # type: ignore[call-overload]
        yield Stepper(Job(stage, "key", net, config, 0), recipe, alone(), None)


def batch(number: int, size: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(number)
    images = torch.randn(32, 3, size, size, generator=generator).to("cuda", memory_format=torch.channels_last)
    return images, torch.randint(10, (32,), generator=generator).to("cuda")


def trained(stage: str, sizes: list[int], *overrides: str) -> tuple[list[Any], Stepper]:
    with steps(stage, MAKE[stage]("resnet20"), *overrides) as stepper:
        figures = []
        for number, size in enumerate(sizes):
            sums, loss = stepper.step(*batch(number, size), number, 20)
            figures += [sums.clone(), loss.clone()]
        state = stepper.state()
        return [*figures, *tree_leaves([state[key] for key in ("net", "ema", "optimizer")])], stepper


@pytest.mark.timeout(300)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("stage", MAKE)
def test_steps_by_a_graph_are_the_plain_ones_to_the_bit(stage: str, precision: str):
    """Twelve steps, the last four at another size."""
    sizes, sets = [32] * 8 + [24] * 4, f"run.precision={precision}"
    theirs, _ = trained(stage, sizes, sets, "run.cuda_graph=false")
    ours, stepper = trained(stage, sizes, sets, "run.cuda_graph=true")
    assert isinstance(stepper._work, GraphedStep)
    assert stepper._work._graph is not None, "the last step was a replay"
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a, b) if isinstance(a, Tensor) else a == b


def searched(cuda_graph: str) -> tuple[dict[str, Tensor], list[Tensor], Stepper]:
    """A short search towards a budget, on which it lands: gates flip, and masks change."""
    sets = ["run.gpus_per_worker=1", "run.workers=1", "run.precision=bf16", "search.budget=0.015"]
    recipe, steps = load_recipe("digits_resnet20", [*sets, f"run.cuda_graph={cuda_graph}"]), 80
    with arithmetic(recipe.run):
        torch.manual_seed(0)
        net = supernet(recipe, full_precision(recipe))
        sbs.calibrate(net, [torch.randn(32, 3, 32, 32)])
        net.to("cuda", memory_format=torch.channels_last).train()  # type: ignore[call-overload]
        pressure = pressure_of(net, recipe, steps, alone(), lambda *_: None)
        config = recipe.search.model_copy(update={"epochs": 1})
        stepper = Stepper(Job("search", "key", net, config, 0, pressure), recipe, alone(), None)
        figures = []
        for number in range(steps):
            sums, loss = stepper.step(*batch(number, 32), number, steps)
            figures += [sums.clone(), loss.clone()]
        return {key: value.clone() for key, value in net.state_dict().items()}, figures, stepper


@pytest.mark.timeout(300)
def test_a_search_by_graphs_is_the_plain_one_to_the_bit():
    theirs, their_figures, _ = searched("false")
    ours, figures, stepper = searched("true")
    assert isinstance(stepper._work, GraphedStep)
    assert stepper._work._after_graph is not None, "the last step was a replay"
    assert sum(float(value.sum()) for key, value in ours.items() if key.endswith(".flips")) > 0
    for a, b in zip(figures, their_figures, strict=True):
        assert torch.equal(a, b)
    for key, value in ours.items():
        assert torch.equal(value, theirs[key]), key


@pytest.mark.timeout(300)
def test_a_compiled_network_is_captured_too():
    sets = ["run.precision=bf16", "run.compile=true"]
    theirs, _ = trained("pretrain", [32] * 6, *sets, "run.cuda_graph=false")
    ours, stepper = trained("pretrain", [32] * 6, *sets, "run.cuda_graph=true")
    assert stepper._work._graph is not None
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a, b) if isinstance(a, Tensor) else a == b


@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("stage", MAKE)
def test_a_step_waits_for_nothing(stage: str, name: str):
    """torch itself watches: in this mode whatever synchronises raises."""
    with steps(stage, MAKE[stage](name), "run.precision=bf16", "run.cuda_graph=false") as stepper:
        batches = [batch(number, 32) for number in range(3)]
        stepper.step(*batches[0], 0, 20)
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            for number in (1, 2):
                stepper.step(*batches[number], number, 20)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert stepper.finite()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_kernel_normalises_to_the_bits_of_the_cpu(dtype: torch.dtype):
    from harness.data import normalise as module

    levels = torch.randint(0, 256, (37, 33, 31, 3), dtype=torch.uint8)
    want, got = (torch.empty(levels.shape, dtype=dtype, device=device) for device in ("cpu", "cuda"))
    plain(levels, table(dtype), want)
    for road in (normalise, plain):
        got.zero_()
        road(levels.cuda(), table(dtype).cuda(), got)
        assert torch.equal(got.cpu(), want)
    assert module._fast() is not plain, "the Triton kernel could not be built"


def test_batches_come_whole_while_the_reader_computes():
    feed = DeviceFeed(table(), torch.device("cuda", 0))
    weight = torch.randn(2048, 2048, device="cuda")
    sums, labels = [], []
    for images, names in feed.batches(host(60, last=3)):
        for _ in range(20):  # the copy of the next batch comes while this is busy
            weight = (weight @ weight).clamp(-1, 1)
        sums.append(images.double().sum((0, 2, 3)) + 0 * weight.sum().double())
        labels.append(names.clone())
    for number in range(60):
        count = 3 if number == 59 else CAPACITY
        want = torch.empty(count, 4, 4, 3)
        plain(torch.from_numpy(content(number)[0][:count]), table(), want)
        assert labels[number].tolist() == content(number)[1][:count].tolist()
        torch.testing.assert_close(sums[number].cpu(), want.double().sum((0, 1, 2)), rtol=1e-9, atol=1e-9)
