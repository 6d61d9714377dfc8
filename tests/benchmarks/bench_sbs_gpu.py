"""The training steps of bench_sbs on a GPU: bfloat16 autocast, channels_last, batch 256 (ResNet-20: 1024)."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import torch

from tests.benchmarks.bench_sbs import Case, Variant, rounds, table, variants
from tests.benchmarks.measure import NotHereError, Row

CASES = (
    Case("resnet20", 32, 1024, 10, must=1.25, wanted=1.15),
    Case("resnet18", 112, 256, 10, must=1.25, wanted=1.15),
    Case("mobilenetv2", 112, 256, 10, must=1.3, wanted=1.15),
)


def _synchronised(variant: Variant, steps: int) -> Callable[[], None]:
    def work() -> None:
        for _ in range(steps):
            variant.step()
        torch.cuda.synchronize()

    return work


def _peak_bytes(variant: Variant) -> int:
    """Peak of one step above what the other variants hold, plus the variant's own parameters, buffers and momentum."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    held = torch.cuda.memory_allocated()
    variant.step()
    torch.cuda.synchronize()
    return variant.static_bytes() + torch.cuda.max_memory_allocated() - held


def rows() -> Iterator[Row]:
    """The same table as bench_sbs; the name of the chip is in every row."""
    if not torch.cuda.is_available():
        raise NotHereError("no CUDA device")
    chip = torch.cuda.get_device_name()
    for case in CASES:
        made = variants(case, "cuda", autocast=True)
        for variant in made.values():  # every variant frees its gradients before a step, also before its first
            variant.step()
            variant.optimizer.zero_grad()
        times = rounds({name: _synchronised(v, case.steps) for name, v in made.items()}, time.perf_counter)
        peaks = {}
        for name, variant in made.items():
            variant.optimizer.zero_grad()
            peaks[name] = _peak_bytes(variant)
            variant.optimizer.zero_grad()
        for row in table(case, times, peaks):
            yield Row(f"{chip}, bf16: {row.name}", row.figure, row.must, row.unit, wanted=row.wanted)
