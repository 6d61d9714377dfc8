"""What a GPU does in a step, from the profiler's trace: kernels, launches by the host, waits of the host, busy time."""

import json
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from tests.benchmarks.measure import Row

_DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")
_HOST = ("cuda_runtime", "cuda_driver")
_WAITS = ("StreamSynchronize", "EventSynchronize")
LONGEST = 15


@dataclass(frozen=True)
class GpuWork:
    """Of one step: `kernels` that ran, `launches` by the host (a graph is one), its `waits` for the GPU, `busy_ms`.

    `longest`: the kernels that take most of it, as (ms, times, name).
    """

    kernels: float
    launches: float
    waits: float
    busy_ms: float
    longest: tuple[tuple[float, float, str], ...]

    def rows(self, title: str, name: str, step_ms: float) -> Iterator[Row]:
        """Figures without limits; `step_ms`: what a step takes without the profiler, which slows the host down."""
        yield Row(f"{title}: kernels, launches, {name}", self.launches, None, f"launches ({self.kernels:.0f} kernels)")
        yield Row(f"{title}: waits of the host, {name}", self.waits, None)
        yield Row(f"{title}: GPU busy, {name}", 100 * self.busy_ms / step_ms, None, "%")

    def text(self) -> str:
        """The longest kernels, a line each."""
        return "\n".join(f"    {ms:8.3f} ms  {times:6.1f}x  {name[:120]}" for ms, times, name in self.longest)


def gpu_work(step: Callable[[], object], steps: int = 2) -> GpuWork:
    """Profile some steps (two: a search alternates between weights and activations); all zeros without a GPU."""
    here = ProfilerActivity.CUDA if torch.cuda.is_available() else ProfilerActivity.CPU
    with profile(activities=[here]) as recorded:
        for _ in range(steps):
            step()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        recorded.export_chrome_trace(str(path))
        return counted(json.loads(path.read_text())["traceEvents"], steps)


def counted(events: Iterable[dict[str, Any]], steps: int) -> GpuWork:
    """The figures from a trace's events; times in it are in microseconds."""
    timed = [event for event in events if "dur" in event]
    device = [event for event in timed if event.get("cat") in _DEVICE]
    kernels = [event for event in device if event["cat"] == "kernel"]
    host = Counter(event["name"] for event in timed if event.get("cat") in _HOST)
    each: Counter[str] = Counter()
    for event in device:
        each[event["name"]] += event["dur"]
    times = Counter(event["name"] for event in device)
    return GpuWork(
        kernels=len(kernels) / steps,
        launches=sum(n for name, n in host.items() if "LaunchKernel" in name or "GraphLaunch" in name) / steps,
        waits=sum(n for name, n in host.items() if name.endswith(_WAITS)) / steps,
        busy_ms=union([(event["ts"], event["ts"] + event["dur"]) for event in device]) / 1e3 / steps,
        longest=tuple((t / 1e3 / steps, times[name] / steps, name) for name, t in each.most_common(LONGEST)),
    )


def union(spans: Sequence[tuple[float, float]]) -> float:
    """Length of the union of intervals: streams overlap."""
    total, end = 0.0, float("-inf")
    for begin, finish in sorted(spans):
        total += max(0.0, finish - max(begin, end))
        end = max(end, finish)
    return total
