"""How near the Triton kernels come to a plain copy: GB/s over activations of ResNet-18 and MobileNetV2, bfloat16.

    python scripts/gpu/bench_kernels.py --out kernels.json [--tune]

Needs torch, Triton and `sbs` alone. Times are medians on the device, of a CUDA graph of calls over buffers that do not
fit its cache together; what a call costs the host stands beside them. A kernel that fails has its error in the table,
and the exit code is 1. `--device cpu` rehearses all that on tiny sizes, under Triton's interpreter.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import itertools
import json
import math
import os
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

# (images, channels, height) of what quantisers see; limit of their ReLU
SIZES = {
    "resnet18": (1024, ((64, 44), (128, 22), (256, 11), (512, 6)), math.inf),
    "mobilenetv2": (128, ((32, 112), (96, 112), (144, 56), (192, 28), (384, 14), (576, 14), (960, 7)), 6.0),
}
TINY = {"tiny": (2, ((16, 6), (24, 3)), 6.0)}
GRID = (3, 15, 255)
# bytes an element in bfloat16: x and codes; x; x, gradient and dx; those and codes
BYTES = {"encode": 4, "encode_with_sums": 4, "residual_sums": 2, "backward": 6, "backward_with_codes": 8}
# kernel and gate mode of each row
CALLS = (
    ("encode", "NONE"),
    ("encode", "BEFORE"),
    ("encode_with_sums", "NONE"),
    ("encode_with_sums", "BEFORE"),
    ("encode_with_sums", "AFTER"),
    ("residual_sums", "NONE"),
    ("backward_with_codes", "NONE"),
    ("backward_with_codes", "BEFORE"),
    ("backward_with_codes", "AFTER"),
)
# of the buffers that a measurement goes round, together
ROUND_BYTES = 400 * 2**20
MOST_BUFFERS = 16
REPEATS = 11
# elements a tile, warps, programs a multiprocessor
TUNED = tuple(itertools.product((1024, 2048), (4, 8), (6, 7, 8, 16)))
GIGA = 1e9


@dataclass(frozen=True)
class Row:
    """One measurement. device_us: a call on the device; host_us: what launching it takes; error: why there is none."""

    network: str
    kernel: str
    mode: str
    channels: int
    elements: int
    device_us: float = math.nan
    gb_per_s: float = math.nan
    host_us: float = math.nan
    how: str = ""
    error: str = ""


class Work(NamedTuple):
    """A call of a kernel over one of some buffers, and the bytes that it has to move."""

    calls: Sequence[Callable[[], object]]
    bytes: int


class Timing(NamedTuple):
    """Microseconds a call: on the device and on the host; and how the first was measured."""

    device_us: float
    host_us: float
    how: str


def time_on_cpu(work: Work) -> Timing:
    """A rehearsal: the clock around the calls."""
    start = time.perf_counter()
    for call in work.calls:
        call()
    each = (time.perf_counter() - start) / len(work.calls) * 1e6
    return Timing(each, each, "clock")


def time_on_cuda(work: Work) -> Timing:
    """Median over replays of a CUDA graph of the calls; of the calls themselves where they cannot be captured."""
    import torch

    for call in work.calls[:2]:
        call()
    torch.cuda.synchronize()
    start = time.perf_counter()
    for call in work.calls:
        call()
    host = (time.perf_counter() - start) / len(work.calls) * 1e6
    torch.cuda.synchronize()
    how, replay, results = "graph", None, []
    try:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            results = [call() for call in work.calls]  # kept, or all calls would write to the same memory
        replay = graph.replay
    except Exception:  # noqa: BLE001 - what cannot be captured can be timed without
        torch.cuda.synchronize()
        how = "stream"

    def direct() -> None:
        results[:] = [call() for call in work.calls]

    replay = replay or direct
    replay()
    times = []
    for _ in range(REPEATS):
        before, after = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        before.record()
        replay()
        after.record()
        after.synchronize()
        times.append(before.elapsed_time(after) * 1e3 / len(work.calls))
    return Timing(statistics.median(times), host, how)


def operand(shape: tuple[int, int, int], gated: bool, device: str) -> Any:
    """Random activations of (rows, channels, 1) in bfloat16."""
    import torch

    from sbs.kernels import Operand

    x = torch.randn(shape, device=device).to(torch.bfloat16)
    gate = (torch.rand(1, shape[1], 1, device=device) < 0.8).float()
    shift, scale, levels = torch.tensor([0.0, 1.7, 15.0], device=device).unbind(0)
    return Operand(x if gated else x.view(-1), gate if gated else None, shift, scale, levels)


def work(kernel: str, mode: str, shape: tuple[int, int, int], limit: float, device: str) -> Work:
    """Calls of `kernel` over enough buffers."""
    import torch

    from sbs import triton_kernels
    from sbs.kernels import Form, GateMode

    form = Form(False, GateMode[mode], GRID, limit)
    moved = BYTES[kernel] * math.prod(shape)
    count = 2 if device == "cpu" else min(MOST_BUFFERS, max(2, math.ceil(ROUND_BYTES / moved)))
    function = getattr(triton_kernels, kernel)
    calls = []
    for _ in range(count):
        given = operand(shape, mode != "NONE", device)
        arguments: tuple[Any, ...] = (torch.bfloat16,) if "encode" in kernel else ()
        if "backward" in kernel:
            gradient = torch.randn_like(given.x)
            gates = torch.tensor([1.0, 1.0], device=device)
            arguments = (gradient, torch.tensor(0.01, device=device), gates)
        calls.append(functools.partial(function, given, form, *arguments))
    return Work(calls, moved)


def copies(device: str, elements: int) -> Work:
    """Plain copies of as many bytes as a forward pass moves."""
    import torch

    count = 2 if device == "cpu" else min(MOST_BUFFERS, max(2, math.ceil(ROUND_BYTES / (4 * elements))))
    sources = [torch.randn(elements, device=device).to(torch.bfloat16) for _ in range(count)]
    calls = [functools.partial(torch.empty_like(x).copy_, x) for x in sources]
    return Work(calls, 4 * elements)


def measured(row: Row, make: Callable[[], Work], timed: Callable[[Work], Timing]) -> Row:
    """The row with its figures, or with the error."""
    try:
        made = make()
        timing = timed(made)
    except Exception as error:  # noqa: BLE001 - one kernel's failure must not cost the other figures
        traceback.print_exc()
        return replace(row, error=f"{type(error).__name__}: {str(error)[:200]}")
    rate = made.bytes / timing.device_us * 1e6 / GIGA
    return replace(row, device_us=timing.device_us, host_us=timing.host_us, gb_per_s=rate, how=timing.how)


def rows(device: str, timed: Callable[[Work], Timing], deadline: float) -> Iterator[Row]:
    """Every kernel and form over every size, and a copy beside each; stops at `deadline` (time.monotonic)."""
    for network, (images, sizes, limit) in (TINY if device == "cpu" else SIZES).items():
        for channels, side in sizes:
            shape = (images * side * side, channels, 1)
            elements = math.prod(shape)
            blank = Row(network, "copy", "", channels, elements)
            yield measured(blank, functools.partial(copies, device, elements), timed)
            for kernel, mode in CALLS:
                if time.monotonic() > deadline:
                    return
                make = functools.partial(work, kernel, mode, shape, limit, device)
                yield measured(replace(blank, kernel=kernel, mode=mode), make, timed)


def tuned(device: str, timed: Callable[[Work], Timing], deadline: float) -> Iterator[Row]:
    """Other tiles, warps and numbers of programs over one large tensor; what is set in `triton_kernels` stays so."""
    from sbs import triton_kernels as made

    shape = (300, 16, 1) if device == "cpu" else (1024 * 44 * 44, 64, 1)
    choices = TUNED[:2] if device == "cpu" else TUNED
    for (elements, warps, waves), (kernel, mode) in itertools.product(
        choices, (("encode_with_sums", "NONE"), ("backward_with_codes", "NONE"), ("backward_with_codes", "BEFORE"))
    ):
        if time.monotonic() > deadline:
            return
        name = "backward" if "backward" in kernel else "forward"
        name = "gated backward" if name == "backward" and mode != "NONE" else name
        before = made.TILES[name]
        made.TILES[name] = made.Tile(elements, warps, waves)
        try:
            blank = Row(f"{elements} / {warps} warps / {waves}", kernel, mode, shape[1], math.prod(shape))
            yield measured(blank, functools.partial(work, kernel, mode, shape, math.inf, device), timed)
        finally:
            made.TILES[name] = before


def table(found: list[Row]) -> str:
    """Markdown; the share of the copy's rate over the same tensor in the last column but one."""
    lines = ["| tensor | kernel | gates | us | GB/s | of copy | host us |", "|---|---|---|---|---|---|---|"]
    copied = math.nan
    for row in found:
        copied = row.gb_per_s if row.kernel == "copy" else copied
        size = f"{row.network}, {row.channels} channels, {row.elements / 1e6:.1f} M"
        if row.error:
            lines.append(f"| {size} | {row.kernel} | {row.mode.lower()} | {row.error.splitlines()[0]} | | | |")
            continue
        figures = f"{row.device_us:.1f} | {row.gb_per_s:.0f} | {row.gb_per_s / copied:.2f} | {row.host_us:.0f}"
        lines.append(f"| {size} | {row.kernel} | {row.mode.lower()} | {figures} |")
    return "\n".join(lines)


def main() -> int:
    """Measure, print, write; 1 if a kernel failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, help="file for the figures, JSON")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tune", action="store_true", help="other tiles, too")
    parser.add_argument("--seconds", type=float, default=60.0, help="begin no measurement after so long")
    given = parser.parse_args()
    if given.device == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is imported
    import torch

    deadline = time.monotonic() + given.seconds
    timed = time_on_cpu if given.device == "cpu" else time_on_cuda
    chip = "cpu" if given.device == "cpu" else torch.cuda.get_device_name()
    found = []
    with contextlib.suppress(KeyboardInterrupt):
        steps = [rows(given.device, timed, deadline)]
        steps += [tuned(given.device, timed, deadline)] if given.tune else []
        for row in itertools.chain(*steps):
            found.append(row)
            if given.out:
                given.out.write_text(json.dumps({"chip": chip, "rows": [asdict(r) for r in found]}, indent=1))
    print(f"{chip}, torch {torch.__version__}\n\n{table(found)}")
    return int(any(row.error for row in found))


if __name__ == "__main__":
    sys.exit(main())
