"""The functions of `sbs.kernels` for CUDA, by the Triton kernels of `sbs.triton_code`.

One pass over memory each, and where there are sums a second, small kernel that adds up what every program found, in an
order that depends on sizes and the device alone. Importing this needs Triton, which torch for CUDA brings along.
"""

import functools
import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sbs import kernels, triton_code
from sbs.kernels import Form, GateMode, Operand
from sbs.triton_code import FUSED, OPTIONS

_MODES = {GateMode.NONE: 0, GateMode.BEFORE: 1, GateMode.AFTER: 2, GateMode.STATISTICS: 3}
_CHANNEL_SUMS = (GateMode.BEFORE, GateMode.AFTER)
_TYPES = (torch.float32, torch.bfloat16, torch.float16)
_FLAT, _PIXELS, _PLANES = 0, 1, 2
# elements that are there together or not at all: 16 bytes of the narrowest floats
_UNIT = 8
_VECTOR_BYTES = 16
_LONG = 2**31
_INTERPRETED_PROGRAMS = 6
# lanes that may lie beside the tensor, as a share of a block's width
_LEAST_USED = 0.85
# elements of the narrowest floats in a line of the cache: blocks as wide are as good as wider ones
_LINE = 64
_BLOCK = 1024
_TABLE = (32, 64)


class Tile(NamedTuple):
    """Elements that a program works on at a time, its warps, and how many programs a multiprocessor gets."""

    elements: int
    warps: int
    waves: int


# what was fastest on an H100 (scripts/gpu/bench_kernels.py --tune)
TILES = {"forward": Tile(2048, 4, 8), "backward": Tile(1024, 4, 8), "gated backward": Tile(1024, 4, 6)}
"""Programs that have no room at once wait for the others to end, and then run alone: a gate's take 72 registers."""


class Plan(NamedTuple):
    """How a kernel goes over a tensor's memory: see `sbs.triton_code`. long: whether its sizes take 64 bits."""

    grid: tuple[int, int, int]
    tiles: int
    rows: int
    extent: int
    layout: int
    unit: int
    block: tuple[int, int]
    fold: int
    long: bool = False

    @property
    def programs(self) -> int:
        """Programs of the grid."""
        return math.prod(self.grid)

    @property
    def variant(self) -> tuple[object, ...]:
        """What a kernel is compiled for."""
        return self[4:]

    def statics(self) -> dict[str, object]:
        """The kernel's constants."""
        rows, columns = self.block
        return {"LAYOUT": self.layout, "UNIT": self.unit, "ROWS": rows, "COLUMNS": columns, "FOLD": self.fold}


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


@functools.lru_cache(maxsize=4096)
def plan(
    shape: tuple[int, ...], stride: tuple[int, ...], gated: bool, itemsize: int, tile: Tile, programs: int
) -> Plan | None:
    """For a view by `memory.memory_view`; None where its memory lies in no order that is known here.

    gated: whether channels matter. itemsize: of the narrowest operand, in bytes.
    """
    count = math.prod(shape)
    fold = _VECTOR_BYTES // itemsize
    if not gated:
        unit = _unit(count)
        tiles = math.ceil(count / tile.elements)
        grid, extent = (1, min(tiles, programs), 1), count // unit
        return Plan(grid, tiles, 1, extent, _FLAT, unit, (1, tile.elements), fold, extent >= _LONG)
    outer, channels, inner = shape
    if stride[1:] == (1, channels) or (inner == 1 and stride[1] == 1):
        columns = _columns(channels, tile.elements)
        rows, blocks, positions, width = outer * inner, math.ceil(channels / columns), 1, channels
        tiles, layout = math.ceil(rows * columns / tile.elements), _PIXELS
    elif stride[1:] == (inner, 1):
        columns = _columns(inner, tile.elements)
        blocks, positions = math.ceil(channels * columns / tile.elements), math.ceil(inner / columns)
        tiles, rows, width, layout = outer, channels, inner, _PLANES
    else:
        return None
    if stride[0] != channels * inner:
        return None
    unit = _unit(width)
    grid = (blocks, min(tiles, max(1, programs // (blocks * positions))), positions)
    block = (tile.elements // columns, columns)
    return Plan(grid, tiles, rows, width // unit, layout, unit, block, fold, rows >= _LONG)


def _unit(size: int) -> int:
    return _UNIT if size % _UNIT == 0 else 1


def _columns(width: int, elements: int) -> int:
    """The widest block of a power of two that leaves few lanes idle, or from a line on the fewest."""
    sizes = [size for size in (16, 32, 64, 128) if size <= elements]
    used = {size: width / (math.ceil(width / size) * size) for size in sizes}
    good = [size for size in sizes if used[size] >= _LEAST_USED]
    whole = [size for size in good if size >= _LINE]
    return max(whole or sizes, key=lambda size: (used[size], size)) if whole or not good else max(good)


def _backward_tile(form: Form) -> Tile:
    return TILES["backward" if form.mode is GateMode.NONE else "gated backward"]


def _planned(operand: Operand, form: Form, tile: Tile, *others: Tensor) -> Plan | None:
    """The plan of a pass; None for what only eager kernels compute: float64, nothing, unknown orders in memory.

    others: the gradient, and numbers of the backward pass.
    """
    x, *numbers = operand
    narrow = x.itemsize
    if others:
        narrow = min(narrow, others[0].itemsize)
        numbers.extend(others[1:])
    if x.dtype not in _TYPES or x.numel() == 0 or any(t is not None and t.dtype is not torch.float32 for t in numbers):
        return None
    gated = form.mode is not GateMode.NONE
    if not gated and not (x.is_contiguous() or (x.dim() == 3 and x.transpose(1, 2).is_contiguous())):
        return None
    programs = tile.waves * _multiprocessors(x.device) if x.is_cuda else _INTERPRETED_PROGRAMS
    return plan(tuple(x.shape), x.stride(), gated, narrow, tile, programs)


def _reduced(form: Form, gate: Tensor | None, modes: tuple[GateMode, ...]) -> Form:
    """The form without a gate that is not there, or of no use to the kernel."""
    useful = form.mode is GateMode.NONE or (gate is not None and form.mode in modes)
    return form if useful else form._replace(mode=GateMode.NONE)


def _gate(operand: Operand, form: Form) -> Tensor | None:
    return None if form.mode is GateMode.NONE or operand.gate is None else operand.gate.contiguous()


def _statics(form: Form) -> dict[str, object]:
    relu = 0 if form.relu is None else 1 if math.isinf(form.relu) else 2
    limit = form.relu if relu == 2 else 0.0
    return {"SIGNED": form.signed, "MODE": _MODES[form.mode], "RELU": relu, "LIMIT": limit, "FUSED": FUSED}


_ready: dict[tuple[object, ...], tuple[Any, tuple[object, ...]]] = {}
"""Kernels that have run once, and their constants in order."""


def launch(
    function: Any, grid: tuple[int, ...], key: tuple[object, ...], arguments: tuple[object, ...],
    constants: Callable[[], dict[str, Any]],
) -> None:  # fmt: skip
    """Run a kernel on the current device.

    key: all that it is compiled for, types and alignment of the arguments among it: what has run under a key runs
    again without Triton's own inspection of every argument, which takes longer than small tensors do.
    """
    key = (id(function), *key)
    ready = _ready.get(key)
    if ready is not None:
        ready[0][grid](*arguments, *ready[1])
        return
    given = constants()
    made = function[grid](*arguments, **given, **OPTIONS)
    if made is not None:  # by the interpreter nothing is
        _ready[key] = made, tuple(given[name] for name in function.arg_names[len(arguments) :])


def _aligned(x: Tensor) -> bool:
    return x.data_ptr() % _VECTOR_BYTES == 0


def on(device: torch.device) -> AbstractContextManager[object]:
    """Triton launches on the current device."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(device)


def _forward(
    operand: Operand, form: Form, made: Plan, dtype: torch.dtype | None, steps: tuple[int, ...], *, check: bool = False
) -> tuple[Tensor | None, Tensor | None]:
    """Codes, unless `dtype` is None, and sums: of residuals to `steps` or, with `check`, of what is not a number."""
    x, tile = operand.x, TILES["forward"]
    device, count = x.device, 1 if check else len(steps)
    codes = None if dtype is None else torch.empty_like(x, dtype=dtype)
    partials = torch.empty(count * made.programs, dtype=torch.float32, device=device) if count else None
    # candidate bit-widths that no sums are asked for make no other kernel
    form = form._replace(grid=steps)

    def constants() -> dict[str, Any]:
        wanted = {"COUNT": count, "CODES": codes is not None, "CHECK": check, "num_warps": tile.warps}
        return wanted | {"STEPS": tuple(float(n) for n in steps)} | made.statics() | _statics(form)

    with on(device):
        launch(
            triton_code.forward,
            made.grid,
            (device, form, made.variant, x.dtype, dtype, check, tile, _aligned(x)),
            (
                *(x, _gate(operand, form), codes, partials, operand.shift, operand.scale, operand.levels),
                *(made.tiles, made.rows, made.extent),
            ),
            constants,
        )
        if partials is None:
            return codes, None
        sums = torch.empty(count, dtype=torch.float32, device=device)
        factor = 1.0 if check else 12.0
        launch(
            triton_code.add_sums,
            (count, 1, 1),
            (device, factor),
            (partials, sums, made.programs),
            lambda: {"FACTOR": factor, "BLOCK": _BLOCK},
        )
    return codes, sums


def encode(operand: Operand, form: Form, dtype: torch.dtype) -> Tensor:
    """As `kernels.encode`."""
    form = _reduced(form, operand.gate, _CHANNEL_SUMS)
    made = _planned(operand, form, TILES["forward"])
    if made is None or dtype is torch.float64:
        return kernels.encode(operand, form, dtype)
    codes, _ = _forward(operand, form, made, dtype, ())
    assert codes is not None
    return codes


def encode_with_check(operand: Operand, form: Form, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """As `kernels.encode_with_check`."""
    form = _reduced(form, operand.gate, _CHANNEL_SUMS)
    made = _planned(operand, form, TILES["forward"])
    if made is None or dtype is torch.float64:
        return kernels.encode_with_check(operand, form, dtype)
    codes, check = _forward(operand, form, made, dtype, (), check=True)
    assert codes is not None
    assert check is not None
    return codes, check[0]


def encode_with_sums(operand: Operand, form: Form, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """As `kernels.encode_with_sums`."""
    form = _reduced(form, operand.gate, tuple(GateMode))
    made = _planned(operand, form, TILES["forward"])
    if made is None or dtype is torch.float64 or len(form.grid) == 1:
        return kernels.encode_with_sums(operand, form, dtype)
    codes, sums = _forward(operand, form, made, dtype, form.grid[:-1])
    assert codes is not None
    assert sums is not None
    return codes, sums


def residual_sums(operand: Operand, form: Form) -> Tensor:
    """As `kernels.residual_sums`."""
    form = _reduced(form, operand.gate, tuple(GateMode))
    made = _planned(operand, form, TILES["forward"])
    if made is None or len(form.grid) == 1:
        return kernels.residual_sums(operand, form)
    _, sums = _forward(operand, form, made, None, form.grid[:-1])
    assert sums is not None
    return sums


Gradients = tuple[Tensor, Tensor, Tensor, Tensor | None]


def backward(
    operand: Operand, form: Form, grad: Tensor, grad_scale: Tensor, bit_gates: Tensor, spread: Tensor | None = None
) -> Gradients:
    """As `kernels.backward`."""
    form = _reduced(form, operand.gate, _CHANNEL_SUMS)
    numbers = (grad_scale, bit_gates) if spread is None else (grad_scale, bit_gates, spread)
    made = _planned(operand, form, _backward_tile(form), grad, *numbers)
    if made is None:
        return kernels.backward(operand, form, grad, grad_scale, bit_gates, spread)
    return _backward(operand, form, made, grad, grad_scale, bit_gates, spread=spread)


def backward_with_codes(
    operand: Operand, form: Form, grad: Tensor, grad_scale: Tensor, bit_gates: Tensor
) -> tuple[Gradients, Tensor]:
    """As `kernels.backward_with_codes`."""
    form = _reduced(form, operand.gate, _CHANNEL_SUMS)
    made = _planned(operand, form, _backward_tile(form), grad, grad_scale, bit_gates)
    if made is None:
        return kernels.backward_with_codes(operand, form, grad, grad_scale, bit_gates)
    codes = torch.empty_like(operand.x, dtype=grad.dtype)
    return _backward(operand, form, made, grad, grad_scale, bit_gates, codes=codes), codes


def _backward(
    operand: Operand,
    form: Form,
    made: Plan,
    grad: Tensor,
    grad_scale: Tensor,
    bit_gates: Tensor,
    *,
    codes: Tensor | None = None,
    spread: Tensor | None = None,
) -> Gradients:
    x, gate, steps, tile = operand.x, _gate(operand, form), form.grid, _backward_tile(form)
    device = x.device
    if grad.stride() != x.stride():
        grad = torch.empty_like(x, dtype=grad.dtype).copy_(grad)
    bit_gates = bit_gates.contiguous()
    dx, dbits = torch.empty_like(x), torch.empty_like(bit_gates)
    dscale = torch.empty((), dtype=torch.float32, device=device)
    partials = torch.empty(len(steps) * made.programs, dtype=torch.float32, device=device)
    channels = rows = 0
    table = dgate = None
    if gate is not None:
        channels, rows = gate.numel(), made.grid[1] * made.grid[2]
        table = torch.empty(rows * channels, dtype=torch.float32, device=device)
        dgate = torch.empty(channels, dtype=torch.float32, device=device)

    def constants() -> dict[str, Any]:
        wanted = {"COUNT": len(steps), "CODES": codes is not None, "num_warps": tile.warps}
        grid = {"STEPS": tuple(float(n) for n in steps), "SHARES": tuple(1 / n for n in steps)}
        return wanted | grid | made.statics() | _statics(form)

    def sum_constants() -> dict[str, Any]:
        sizes = {"ROWS": _TABLE[0], "COLUMNS": _TABLE[1], "BLOCK": _BLOCK}
        return {"SIGNED": form.signed, "COUNT": len(steps)} | sizes

    scale = operand.scale
    with on(device):
        launch(
            triton_code.backward,
            made.grid,
            (device, form, made.variant, x.dtype, grad.dtype, codes is None, tile, _aligned(x), _aligned(grad)),
            (
                *(x, gate, grad, dx, codes, partials, table, operand.shift, scale, operand.levels, grad_scale),
                *(made.tiles, made.rows, made.extent),
            ),
            constants,
        )
        launch(
            triton_code.add_gradients,
            (1 + math.ceil(channels / _TABLE[1]), 1, 1),
            (device, form.signed, len(steps), gate is None, spread is None),
            (partials, table, bit_gates, scale, spread, dscale, dbits, dgate, made.programs, rows, channels),
            sum_constants,
        )
    return dx, dscale, dbits, dgate
