"""One training step of the search beside full precision, uniform 4/4 training and the written-out chain.

One thread on the CPU, arithmetic and memory as the harness sets them, channels_last, random images. Times are CPU
seconds of the process: those of the wall on an idle machine, and nearly the same on a busy one. The four variants take
turns within each round, and ratios are taken within a round. Memory is what one step holds at its peak: parameters,
buffers and momentum, and on top of them the largest sum of live allocations that the profiler counts (gradients and
activations among them).
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile

import sbs
from harness.arithmetic import arithmetic
from harness.config import RunConfig
from harness.graphed import GraphedStep, PlainStep
from tests.benchmarks.measure import Estimate, Row, estimate
from tests.numerics import oracle

ROUNDS = 9
CALIBRATION = 128  # images; in full precision a whole batch of a GPU may not fit
ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Case:
    """One network at one resolution; `steps` of one variant make one measurement; the limits are for the search."""

    model: str
    size: int
    batch: int
    steps: int
    must: float
    wanted: float

    @property
    def title(self) -> str:
        """What its rows begin with."""
        return f"{self.model} {self.size} px, batch {self.batch}"


CASES = (
    Case("resnet20", 32, 128, 2, must=1.25, wanted=1.15),
    Case("resnet18", 112, 64, 1, must=1.25, wanted=1.15),
    Case("mobilenetv2", 112, 64, 1, must=1.6, wanted=1.35),
)
MEMORY_MUST, MEMORY_WANTED, CHAIN_MUST = 1.3, 1.15, 0.55
COLD_MUST_S, WARM_MUST_S = 30.0, 2.0


@dataclass
class Variant:
    """A network in training, and all that one optimiser step of it does.

    `forward`: the network compiled, say; `captured`: what makes the step by graphs.
    """

    net: nn.Module
    images: Tensor
    labels: Tensor
    search: bool = False
    autocast: bool = False
    forward: Callable[[Tensor], Tensor] | None = None
    captured: GraphedStep | None = None
    optimizer: torch.optim.Optimizer = field(init=False)

    def __post_init__(self) -> None:
        self.net.train()
        self.optimizer = torch.optim.SGD(self.net.parameters(), lr=1e-3, momentum=0.9)

    def step(self) -> None:
        """Forward, backward, update; in a search with the BOP penalty, in any of ours with after_step."""
        self.optimizer.zero_grad()
        work = PlainStep(self.gradients, self.after) if self.captured is None else self.captured
        work(self.images, self.labels)
        self.optimizer.step()
        work.finish()

    def after(self) -> None:
        """What follows the optimiser."""
        sbs.after_step(self.net)

    def gradients(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Forward and backward; logits and loss."""
        with torch.autocast(images.device.type, dtype=torch.bfloat16, enabled=self.autocast):
            logits = (self.net if self.forward is None else self.forward)(images)
            loss = F.cross_entropy(logits.float(), labels)
        if self.search:
            loss = loss + 0.1 * sbs.bop_penalty(self.net)
        loss.backward()
        return logits.detach(), loss.detach()

    def static_bytes(self) -> int:
        """Parameters, buffers and momentum."""
        tensors = [*self.net.parameters(), *self.net.buffers()]
        tensors += [v for s in self.optimizer.state.values() for v in s.values() if isinstance(v, Tensor)]
        return sum(t.numel() * t.element_size() for t in tensors)


def start(case: Case, device: str) -> tuple[nn.Module, Tensor, Tensor]:
    """The network of a case, images and labels."""
    torch.manual_seed(0)
    model = sbs.models.build(case.model, 100).to(device, memory_format=torch.channels_last)
    x = torch.randn(case.batch, 3, case.size, case.size, device=device).to(memory_format=torch.channels_last)
    return model, x, torch.randint(0, 100, (case.batch,), device=device)


def prepared(model: nn.Module, x: Tensor) -> sbs.SuperNet:
    """Its super-network, ready for the first step."""
    search = sbs.prepare(model, sbs.SearchSpace(), x[:1], absorb_relus=True)
    sbs.calibrate(search, [x[:CALIBRATION]])
    return search


def variants(case: Case, device: str = "cpu", *, autocast: bool = False, chain: bool = True) -> dict[str, Variant]:
    """The rows of the table, from the same weights; `chain`: with the written-out one."""
    model, x, y = start(case, device)
    policy = sbs.Policy.uniform(model, x[:1], 4, 4)
    search = prepared(model, x)
    nets = {
        "full precision": model,
        "uniform 4/4": sbs.compress(model, policy, example_input=x[:1], calibration=[x[:CALIBRATION]]),
        "search": search,
    }
    if chain:
        nets["written-out chain"] = oracle.chain_network(twin(case, model)).to(device)
    return {n: Variant(net, x, y, search=n == "search", autocast=autocast) for n, net in nets.items()}


def twin(case: Case, model: nn.Module) -> nn.Module:
    """A network of its own with the weights of another, on its device."""
    device = next(model.parameters()).device
    copy = sbs.models.build(case.model, 100).to(device, memory_format=torch.channels_last)
    copy.load_state_dict(model.state_dict())
    return copy


def cpu_s(work: Callable[[], object]) -> float:
    """CPU seconds of this process for one call."""
    start = time.process_time()
    work()
    return time.process_time() - start


def rounds(
    work: dict[str, Callable[[], object]],
    timed: Callable[[Callable[[], object]], float] = cpu_s,
    count: int = ROUNDS,
    warmup: int = 2,
) -> dict[str, list[float]]:
    """Seconds of every variant in every round; the order turns by one from round to round."""
    names = list(work)
    times: dict[str, list[float]] = {name: [] for name in names}
    for r in range(-warmup, count):
        for name in names[r % len(names) :] + names[: r % len(names)]:
            taken = timed(work[name])
            if r >= 0:
                times[name].append(taken)
    return times


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """The profiler's library writes to standard error whenever it starts and stops."""
    kept = os.dup(2)
    with Path(os.devnull).open("w") as nothing:
        os.dup2(nothing.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(kept, 2)
            os.close(kept)


def peak_bytes(variant: Variant) -> int:
    """Peak of one step on the CPU, by the profiler's record of every allocation and release."""
    variant.optimizer.zero_grad()  # gradients of the step before would count as free memory
    with _silence(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        variant.step()
    assert recorded.profiler is not None
    events = [e for e in recorded.profiler.kineto_results.events() if e.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return variant.static_bytes() + peak


def over(times: dict[str, list[float]], name: str, other: str) -> Estimate:
    """The ratio of two variants' times, taken within each round."""
    return estimate([a / b for a, b in zip(times[name], times[other], strict=True)])


def table(case: Case, times: dict[str, list[float]], peaks: dict[str, int]) -> Iterator[Row]:
    """The rows of one case: figures without a limit first, then the ratios that have one."""
    title = case.title
    base = "full precision"
    for name, taken in times.items():
        yield Row(f"{title}: step, {name}", estimate([1e3 * t / case.steps for t in taken]), None, "ms")
        yield Row(f"{title}: peak, {name}", peaks[name] / 2**20, None, "MiB")

    yield Row(f"{title}: uniform 4/4 / {base}", over(times, "uniform 4/4", base), None, "x")
    yield Row(f"{title}: chain / {base}", over(times, "written-out chain", base), None, "x")
    yield Row(f"{title}: search / {base}", over(times, "search", base), case.must, "x", wanted=case.wanted)
    yield Row(f"{title}: search / chain", over(times, "search", "written-out chain"), CHAIN_MUST, "x")
    memory = peaks["search"] / peaks[base]
    yield Row(f"{title}: peak memory, search / {base}", memory, MEMORY_MUST, "x", wanted=MEMORY_WANTED)


def repeat(variant: Variant, steps: int) -> Callable[[], None]:
    """So many steps of a variant, as one call."""

    def work() -> None:
        for _ in range(steps):
            variant.step()

    return work


COMPILATION = """
import sys, time, torch, sbs
from tests.benchmarks.bench_sbs import CASES, Variant, prepared, start
torch.set_num_threads(1)
model, x, y = start(CASES[int(sys.argv[1])], "cpu")
times = []
for compiled in (False, True, True):  # the first warms up all else
    sbs.use_compiled(compiled)
    begin = time.perf_counter()
    search = Variant(prepared(model, x), x, y, search=True)
    search.step(), search.step()
    times.append(time.perf_counter() - begin)
print(times[1] - times[2])
"""


def compilation_s(number: int, cache: str) -> float:
    """Seconds by which a process's first search with compiled kernels, to its second step, is longer than the next.

    number: of the network among CASES. cache: the folder of everything that is compiled, precompiled headers of the
    compiler's among it.
    """
    environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": cache, "TMPDIR": cache}
    command = [sys.executable, "-c", COMPILATION, str(number)]
    return float(subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True).stdout)


def rows() -> Iterator[Row]:
    """ResNet-20, ResNet-18 and MobileNetV2 on the CPU, then what compilation costs."""
    with arithmetic(RunConfig(threads=1)):
        for case in CASES:
            made = variants(case)
            times = rounds({name: repeat(v, case.steps) for name, v in made.items()})
            yield from table(case, times, {name: peak_bytes(v) for name, v in made.items()})
    for number, case in enumerate(CASES):
        cold, kept = [], []  # differences: noise may make the latter negative
        for _ in range(3):
            with tempfile.TemporaryDirectory() as cache:
                cold.append(compilation_s(number, cache))
                kept.append(compilation_s(number, cache))
        yield Row(f"{case.model}: compilation, cold", estimate(cold), COLD_MUST_S, "s")
        yield Row(f"{case.model}: compilation, from its cache", estimate(kept), WARM_MUST_S, "s")
