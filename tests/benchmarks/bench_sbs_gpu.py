"""Training steps at production shapes on a GPU: the search, 4/4-bit training and full precision, eager and compiled.

bfloat16 autocast, channels_last, the arithmetic of the ImageNet recipes. The variants take turns within each round,
each timed by CUDA events from an idle GPU to its last kernel, and ratios are taken within a round. That the kernels of
`sbs` run compiled is a limit of its own. Full precision by torch.compile comes last: its first step takes longest.
"""

from __future__ import annotations

import contextlib
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch

from harness.config import RunConfig
from harness.graphed import GraphedStep, PlainStep
from tests.benchmarks.bench_sbs import (
    Case,
    Variant,
    arithmetic,
    cpu_s,
    over,
    peak_bytes,
    repeat,
    rounds,
    twin,
    variants,
)
from tests.benchmarks.launches import gpu_work
from tests.benchmarks.measure import NotHereError, Row, estimate

CASES = (
    Case("resnet18", 176, 1024, 2, must=1.25, wanted=1.10),
    Case("resnet50", 176, 512, 1, must=1.25, wanted=1.10),
    Case("mobilenetv2", 224, 128, 5, must=1.25, wanted=1.10),
)
MEMORY_MUST, MEMORY_WANTED, COMPILED_WANTED = 1.3, 1.15, 1.25
ROUNDS = 9
BASE, COMPILED = "full precision", "compiled full precision"
_UNCOMPILED = "SBS kernel "


def tiny(case: Case) -> Case:
    """The same network at a size for a rehearsal on the CPU."""
    return replace(case, size=32, batch=4, steps=1)


def rows() -> Iterator[Row]:
    """All networks, one after the other; the name of the chip is in every row."""
    if not torch.cuda.is_available():
        raise NotHereError("no CUDA device")
    chip = torch.cuda.get_device_name()
    for case in CASES:
        for row in rows_of(case, "cuda"):
            yield replace(row, name=f"{chip}: {row.name}")


def rows_of(case: Case, device: str, count: int = ROUNDS) -> Iterator[Row]:
    """One network: the search and 4/4-bit training against eager full precision, the search against compiled."""
    run = RunConfig(precision="bf16", deterministic=False, gpus_per_worker=float(device == "cuda"))
    timed = cuda_s if device == "cuda" else cpu_s
    with arithmetic(run), uncompiled() as found:
        made = variants(case, device, autocast=True, chain=False)
        for variant in made.values():  # every variant frees its gradients before a step, also before its first
            for _ in range(2):
                variant.step()
            variant.optimizer.zero_grad()
        times = rounds({name: repeat(v, case.steps) for name, v in made.items()}, timed, count, warmup=1)
        yield from eager_rows(case, times)
        yield from shares(case, made, times, device)
        yield Row(f"{case.title}: kernels of sbs that run uncompiled", len(found), 0)
        if device == "cuda":
            yield from graph_rows(case, made, count)
        yield from compiled_rows(case, made, timed, count)


def eager_rows(case: Case, times: dict[str, list[float]]) -> Iterator[Row]:
    """Steps, and what they are to eager full precision."""
    for name, taken in times.items():
        yield Row(f"{case.title}: step, {name}", estimate([1e3 * t / case.steps for t in taken]), None, "ms")
    for name in ("search", "uniform 4/4"):
        yield Row(f"{case.title}: {name} / {BASE}", over(times, name, BASE), case.must, "x", wanted=case.wanted)


def shares(case: Case, made: dict[str, Variant], times: dict[str, list[float]], device: str) -> Iterator[Row]:
    """Launches and busy time of a step, then memory."""
    for name, variant in made.items():
        work = gpu_work(variant.step)
        print(f"longest kernels of a step, {name}:\n{work.text()}", flush=True)
        yield from work.rows(case.title, name, estimate([1e3 * t / case.steps for t in times[name]]).value)
    peaks = {}
    for name, variant in made.items():
        peaks[name] = _cuda_peak_bytes(variant) if device == "cuda" else peak_bytes(variant)
        variant.optimizer.zero_grad()
        yield Row(f"{case.title}: peak, {name}", peaks[name] / 2**20, None, "MiB")
    memory = peaks["search"] / peaks[BASE]
    yield Row(f"{case.title}: peak memory, search / {BASE}", memory, MEMORY_MUST, "x", wanted=MEMORY_WANTED)


def graph_rows(case: Case, made: dict[str, Variant], count: int) -> Iterator[Row]:
    """Steps as `run.cuda_graph` makes them, against eager full precision and against full precision made that way.

    One at a time, since a graph keeps the memory of its step.
    """
    for name, plain in made.items():
        learned = [p for p in plain.net.parameters() if p.requires_grad]
        replayed = replace(plain)
        step = PlainStep(replayed.gradients, replayed.after, captures_after=plain.search)
        replayed.captured = GraphedStep(step, learned, plain.images.device, must=False)
        for _ in range(5):
            replayed.step()
        title = f"{name}, CUDA graphs"
        times = rounds({title: repeat(replayed, case.steps), BASE: repeat(made[BASE], case.steps)}, cuda_s, count)
        yield Row(f"{case.title}: step, {title}", estimate([1e3 * t / case.steps for t in times[title]]), None, "ms")
        ratio, limited = over(times, title, BASE), name != BASE
        must, wanted = (case.must, case.wanted) if limited else (None, None)
        yield Row(f"{case.title}: {title} / {BASE}", ratio, must, "x", wanted=wanted)
        work = gpu_work(replayed.step)
        yield Row(f"{case.title}: launches, {title}", work.launches, None)
        plain.optimizer.zero_grad()
        del replayed
        torch.cuda.empty_cache()


def compiled_rows(
    case: Case, made: dict[str, Variant], timed: Callable[[Callable[[], object]], float], count: int
) -> Iterator[Row]:
    """The search against full precision by torch.compile; without a GPU by its tracing alone, as a rehearsal."""
    plain = made[BASE]
    net = twin(case, plain.net)
    backend = "inductor" if plain.images.is_cuda else "aot_eager"
    fast = replace(plain, net=net, forward=torch.compile(net, backend=backend))
    begin = time.perf_counter()
    for _ in range(2):
        fast.step()
    yield Row(f"{case.title}: torch.compile of full precision", time.perf_counter() - begin, None, "s")
    pair = {COMPILED: fast, "search": made["search"]}
    times = rounds({name: repeat(v, case.steps) for name, v in pair.items()}, timed, count, warmup=1)
    yield Row(f"{case.title}: step, {COMPILED}", estimate([1e3 * t / case.steps for t in times[COMPILED]]), None, "ms")
    ratio = over(times, "search", COMPILED)
    yield Row(f"{case.title}: search / {COMPILED}", ratio, None, "x", wanted=COMPILED_WANTED)


def cuda_s(work: Callable[[], object]) -> float:
    """Seconds from the host's start with an idle GPU to the end of the last kernel."""
    torch.cuda.synchronize()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    work()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / 1e3


def _cuda_peak_bytes(variant: Variant) -> int:
    """Peak of one step above what the other variants hold, plus the variant's own parameters, buffers and momentum."""
    variant.optimizer.zero_grad()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    held = torch.cuda.memory_allocated()
    variant.step()
    torch.cuda.synchronize()
    return variant.static_bytes() + torch.cuda.max_memory_allocated() - held


@contextlib.contextmanager
def uncompiled() -> Iterator[list[str]]:
    """The warnings of `sbs` that it runs kernels uncompiled, as they come; all warnings are shown as before."""
    found: list[str] = []
    show = warnings.showwarning

    def heard(message: Warning | str, *about: Any) -> None:
        if str(message).startswith(_UNCOMPILED):
            found.append(str(message))
        show(message, *about)

    with warnings.catch_warnings():
        warnings.filterwarnings("always", message=_UNCOMPILED)
        warnings.showwarning = heard
        try:
            yield found
        finally:
            warnings.showwarning = show
