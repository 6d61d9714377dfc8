"""Steps by a graph: when they are, and that they are the plain ones, on a made-up recorder of what a step launches."""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import sbs
from harness import graphed as module
from harness import step as step_module
from harness.config import RunConfig, load_recipe
from harness.errors import UserError
from harness.graphed import GraphedStep, PlainStep, graphed, obstacle
from harness.ranks import Ranks
from harness.step import Job, Stepper
from sbs import integer
from tests.unit.harness.test_step import fixed, network

CPU = torch.device("cpu")
ALONE = Ranks(0, 1, CPU, "none", "process")
GPU = Ranks(0, 1, torch.device("cuda"), "none", "process")


class Graph(TorchDispatchMode):
    """Does again, into the same tensors, what was done while it recorded."""

    def __init__(self) -> None:
        super().__init__()
        self.launches: list[tuple[Callable[[], Any], list[Tensor]]] = []
        self.replays = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        results = func(*args, **(kwargs or {}))
        self.launches.append((partial(func, *args, **(kwargs or {})), tree_leaves(results)))
        return results

    @torch.no_grad()
    def replay(self) -> None:
        self.replays += 1
        for launch, results in self.launches:
            for old, new in zip(results, tree_leaves(launch()), strict=True):
                # neither what is written in place, nor an `out=` that was empty before
                if isinstance(old, Tensor) and new.numel() and new.data_ptr() != old.data_ptr():
                    old.copy_(new)


class Cuda:
    """`torch.cuda` as far as a capture needs it; `state` is what a capture, which runs nothing, leaves as it was."""

    def __init__(self, state: list[Tensor]) -> None:
        self.state = state
        self.graphs: list[Graph] = []
        self.fails = False

    def CUDAGraph(self) -> Graph:  # noqa: N802
        self.graphs.append(Graph())
        return self.graphs[-1]

    @contextmanager
    def graph(self, graph: Graph, stream: object, capture_error_mode: str) -> Iterator[None]:
        if self.fails:
            raise RuntimeError("operation not permitted when stream is capturing")
        before = [tensor.detach().clone() for tensor in self.state]
        with graph:
            yield
        with torch.no_grad():
            for tensor, value in zip(self.state, before, strict=True):
                tensor.copy_(value)

    def Stream(self, device: object) -> "Cuda":  # noqa: N802
        return self

    current_stream = Stream

    def wait_stream(self, other: object) -> None:
        pass

    @contextmanager
    def stream(self, stream: object) -> Iterator[None]:
        yield


@pytest.fixture(autouse=True)
def _as_a_gpu_would_see_it(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(integer, "available", lambda: False)
    before, threads = sbs.use_compiled(False), torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    sbs.use_compiled(before)


def batch(number: int, size: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(number)
    images = torch.randn(4, 3, size, size, generator=generator).to(memory_format=torch.channels_last)
    return images, torch.randint(10, (4,), generator=generator)


def train(monkeypatch: pytest.MonkeyPatch, net: nn.Module, cuda: Cuda | None, sizes: list[int], **changes: Any) -> Any:
    """Weights, averaged weights, optimiser and every step's figures after a step at each of the sizes."""
    recipe = load_recipe("digits_resnet20", ["run.precision=bf16"])
    if cuda is not None:
        cuda.state += [*net.parameters(), *net.buffers()]
        monkeypatch.setattr(module, "cuda", cuda)
        monkeypatch.setattr(
            step_module,
            "graphed",
            lambda step, learned, *_, **__: GraphedStep(step, learned, CPU, must=False),
        )
    config = recipe.finetune.model_copy(update={"ema_decay": 0.9, "clip_norm": 1.0, "accumulate": 2} | changes)
    net = net.to(memory_format=torch.channels_last).train()  # type: ignore[call-overload]
    stepper = Stepper(Job("finetune", "key", net, config, 0), recipe, ALONE, None)
    figures = []
    for number, size in enumerate(sizes):
        sums, loss = stepper.step(*batch(number, size), number, 20)
        figures += [sums.clone(), loss.clone()]
    state = stepper.state()
    return [*figures, *tree_leaves([state[key] for key in ("net", "ema", "optimizer")])]


def assert_same(ours: list[Any], theirs: list[Any]) -> None:
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a, b) if isinstance(a, Tensor) else a == b


@pytest.mark.parametrize("make", [network, fixed])
def test_the_weights_are_those_of_plain_steps_to_the_bit(monkeypatch: pytest.MonkeyPatch, make: Any):
    """Nine steps; the image size changes after five: a second graph."""
    sizes, cuda = [16] * 5 + [20] * 4, Cuda([])
    theirs = train(monkeypatch, make("resnet20"), None, sizes)
    ours = train(monkeypatch, make("resnet20"), cuda, sizes)
    assert [graph.replays for graph in cuda.graphs] == [2, 1]
    assert_same(ours, theirs)


def test_a_capture_that_fails_leaves_plain_steps_and_a_line_of_log(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    cuda = Cuda([])
    cuda.fails = True
    theirs = train(monkeypatch, network("resnet20"), None, [16] * 6)
    assert_same(train(monkeypatch, network("resnet20"), cuda, [16] * 6), theirs)
    assert caplog.text.count("no CUDA graph: the capture failed (RuntimeError: operation not permitted") == 1
    assert len(cuda.graphs) == 1


@pytest.mark.parametrize(
    ("changes", "ranks", "words"),
    [
        ({}, GPU, None),
        ({"compile": True, "precision": "bf16"}, GPU, None),
        ({}, ALONE, "no GPU"),
        ({}, Ranks(0, 2, torch.device("cuda"), "nccl", "torchrun"), "2 ranks"),
        ({"precision": "fp16"}, GPU, "run.precision = 'fp16'"),
        ({"profile_steps": 3}, GPU, "run.profile_steps"),
    ],
)
def test_what_stands_in_the_way(changes: dict[str, Any], ranks: Ranks, words: str | None):
    run = RunConfig.model_validate(changes)
    found = obstacle(run, ranks)
    assert (found is None) == (words is None)
    assert words is None or words in (found or "")


def test_auto_asks_for_nothing_true_insists_and_false_declines(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(module, "cuda", Cuda([]))

    step = PlainStep(lambda images, labels: (images, labels), lambda: None)

    def made(setting: object, ranks: Ranks, *, obstacle: str | None = None, precision: str = "fp32") -> Any:
        run = RunConfig.model_validate({"cuda_graph": setting, "precision": precision})
        return graphed(step, [], run, ranks, "pretrain", stage_obstacle=obstacle)

    assert isinstance(made("auto", GPU), GraphedStep)
    assert isinstance(made(True, GPU), GraphedStep)
    assert made(False, GPU) is step
    assert made("auto", ALONE) is step
    assert caplog.text == "", "on a CPU nobody expects one"
    assert made("auto", GPU, precision="fp16") is step
    assert "pretrain: no CUDA graph: run.precision = 'fp16'" in caplog.text
    assert made(True, GPU, obstacle="its sides take turns") is step, "the other stages of the run have theirs"
    assert "its sides take turns" in caplog.text
    with pytest.raises(UserError, match=r"run.cuda_graph = true cannot be: there is no GPU. .*'auto'"):
        made(True, ALONE)
