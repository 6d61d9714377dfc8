"""The functions of `sbs.kernels` for CUDA, by the Triton kernels of `sbs.triton_code`.

One pass over memory each, and where there are sums a second, small kernel that adds up what every program found, in an
order that depends on sizes and the device alone. Importing this needs Triton, which torch for CUDA brings along.
"""

import functools
import math
from typing import NamedTuple

import torch
from torch import Tensor

from sbs import kernels, triton_code
from sbs.kernels import Form, GateMode, Operand
from sbs.triton_code import FUSED, OPTIONS

_MODES = {GateMode.NONE: 0, GateMode.BEFORE: 1, GateMode.AFTER: 2, GateMode.STATISTICS: 3}
_CHANNEL_SUMS = (GateMode.BEFORE, GateMode.AFTER)
_BACKWARD_MODES = (GateMode.NONE, *_CHANNEL_SUMS)
_FLAT, _PIXELS, _PLANES = 0, 1, 2
# elements that are there together or not at all: 16 bytes of the narrowest floats
_UNIT = 8
_VECTOR_BYTES = 16
# programs a multiprocessor: a few more than run at a time, so that none waits at the end
_WAVES = 8
_INTERPRETED_PROGRAMS = 6
# lanes that may lie beside the tensor, as a share of a block's width
_LEAST_USED = 0.85
_BLOCK = 1024
_TABLE = (32, 64)


class Tile(NamedTuple):
    """Elements that a program works on at a time, and its warps."""

    elements: int
    warps: int


# what was fastest on an H100 (scripts/gpu/bench_kernels.py --tune)
TILES = {"forward": Tile(2048, 4), "backward": Tile(1024, 4)}


class Plan(NamedTuple):
    """How a kernel goes over a tensor's memory: see `sbs.triton_code`."""

    grid: tuple[int, int, int]
    tiles: int
    rows: int
    extent: int
    statics: dict[str, int]

    @property
    def programs(self) -> int:
        """Programs of the grid."""
        return math.prod(self.grid)


@functools.cache
def _programs(device: torch.device) -> int:
    if device.type != "cuda":
        return _INTERPRETED_PROGRAMS
    return _WAVES * int(torch.cuda.get_device_properties(device).multi_processor_count)


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
        statics = {"LAYOUT": _FLAT, "UNIT": unit, "ROWS": 1, "COLUMNS": tile.elements, "FOLD": fold}
        return Plan((1, min(tiles, programs), 1), tiles, 1, count // unit, statics)
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
    statics = {"LAYOUT": layout, "UNIT": unit, "ROWS": tile.elements // columns, "COLUMNS": columns, "FOLD": fold}
    return Plan(grid, tiles, rows, width // unit, statics)


def _unit(size: int) -> int:
    return _UNIT if size % _UNIT == 0 else 1


def _columns(width: int, elements: int) -> int:
    """The widest block of a power of two that leaves few lanes idle."""
    sizes = [size for size in (16, 32, 64, 128) if size <= elements]
    used = {size: width / (math.ceil(width / size) * size) for size in sizes}
    good = [size for size in sizes if used[size] >= _LEAST_USED]
    return max(good) if good else max(sizes, key=lambda size: (used[size], size))


def _planned(operand: Operand, form: Form, pass_: str, *others: Tensor) -> Plan | None:
    """The plan of a pass; None for what only eager kernels compute: float64, nothing, unknown orders in memory."""
    x = operand.x
    tensors = [t for t in (*operand, *others) if t is not None]
    if x.numel() == 0 or any(t.dtype is torch.float64 for t in tensors):
        return None
    itemsize = min(x.itemsize, *(t.itemsize for t in others if t.dim() == x.dim() and t.dim() > 0), 4)
    gated = form.mode is not GateMode.NONE
    if not gated and not (x.is_contiguous() or (x.dim() == 3 and x.transpose(1, 2).is_contiguous())):
        return None
    return plan(tuple(x.shape), x.stride(), gated, itemsize, TILES[pass_], _programs(x.device))


def _reduced(form: Form, gate: Tensor | None, modes: tuple[GateMode, ...]) -> Form:
    """The form without a gate that is not there, or of no use to the kernel."""
    return form if gate is not None and form.mode in modes else form._replace(mode=GateMode.NONE)


def _gate(operand: Operand, form: Form) -> Tensor | None:
    return None if form.mode is GateMode.NONE or operand.gate is None else operand.gate.contiguous()


def _statics(form: Form) -> dict[str, object]:
    relu = 0 if form.relu is None else 1 if math.isinf(form.relu) else 2
    limit = form.relu if relu == 2 else 0.0
    return {"SIGNED": form.signed, "MODE": _MODES[form.mode], "RELU": relu, "LIMIT": limit, "FUSED": FUSED}


def _forward(
    operand: Operand, form: Form, made: Plan, dtype: torch.dtype | None, steps: tuple[int, ...], *, check: bool = False
) -> tuple[Tensor | None, Tensor | None]:
    """Codes, unless `dtype` is None, and sums: of residuals to `steps` or, with `check`, of what is not a number."""
    x = operand.x
    count = 1 if check else len(steps)
    codes = None if dtype is None else torch.empty_like(x, dtype=dtype)
    partials = torch.empty(count * made.programs, dtype=torch.float32, device=x.device) if count else None
    with _on(x.device):
        triton_code.forward[made.grid](
            x, _gate(operand, form), codes, partials, operand.shift, operand.scale, operand.levels,
            made.tiles, made.rows, made.extent,
            STEPS=tuple(float(n) for n in steps), COUNT=count, CODES=codes is not None, CHECK=check,
            num_warps=TILES["forward"].warps, **made.statics, **_statics(form), **OPTIONS,
        )  # fmt: skip
        if partials is None:
            return codes, None
        sums = torch.empty(count, dtype=torch.float32, device=x.device)
        factor = 1.0 if check else 12.0
        triton_code.add_sums[(count,)](partials, sums, made.programs, FACTOR=factor, BLOCK=_BLOCK, **OPTIONS)
    return codes, sums


def _on(device: torch.device) -> torch.cuda.device:
    """Triton launches on the current device."""
    return torch.cuda.device(device if device.type == "cuda" else -1)


def encode(operand: Operand, form: Form, dtype: torch.dtype) -> Tensor:
    """As `kernels.encode`."""
    form = _reduced(form, operand.gate, _CHANNEL_SUMS)
    made = _planned(operand, form, "forward")
    if made is None or dtype is torch.float64:
        return kernels.encode(operand, form, dtype)
    codes, _ = _forward(operand, form, made, dtype, ())
    assert codes is not None
    return codes


def encode_with_check(operand: Operand, form: Form, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """As `kernels.encode_with_check`."""
    form = _reduced(form, operand.gate, _CHANNEL_SUMS)
    made = _planned(operand, form, "forward")
    if made is None or dtype is torch.float64:
        return kernels.encode_with_check(operand, form, dtype)
    codes, check = _forward(operand, form, made, dtype, (), check=True)
    assert codes is not None
    assert check is not None
    return codes, check[0]


def encode_with_sums(operand: Operand, form: Form, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """As `kernels.encode_with_sums`."""
    form = _reduced(form, operand.gate, tuple(GateMode))
    made = _planned(operand, form, "forward")
    if made is None or dtype is torch.float64 or len(form.grid) == 1:
        return kernels.encode_with_sums(operand, form, dtype)
    codes, sums = _forward(operand, form, made, dtype, form.grid[:-1])
    assert codes is not None
    assert sums is not None
    return codes, sums


def residual_sums(operand: Operand, form: Form) -> Tensor:
    """As `kernels.residual_sums`."""
    form = _reduced(form, operand.gate, tuple(GateMode))
    made = _planned(operand, form, "forward")
    if made is None or len(form.grid) == 1:
        return kernels.residual_sums(operand, form)
    _, sums = _forward(operand, form, made, None, form.grid[:-1])
    assert sums is not None
    return sums


Gradients = tuple[Tensor, Tensor, Tensor, Tensor | None]


def backward(operand: Operand, form: Form, grad: Tensor, grad_scale: Tensor, bit_gates: Tensor) -> Gradients:
    """As `kernels.backward`."""
    form = _reduced(form, operand.gate, _CHANNEL_SUMS)
    made = _planned(operand, form, "backward", grad, grad_scale, bit_gates)
    if made is None:
        return kernels.backward(operand, form, grad, grad_scale, bit_gates)
    return _backward(operand, form, made, grad, grad_scale, bit_gates, codes=None)


def backward_with_codes(
    operand: Operand, form: Form, grad: Tensor, grad_scale: Tensor, bit_gates: Tensor
) -> tuple[Gradients, Tensor]:
    """As `kernels.backward_with_codes`."""
    form = _reduced(form, operand.gate, _CHANNEL_SUMS)
    made = _planned(operand, form, "backward", grad, grad_scale, bit_gates)
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
    codes: Tensor | None,
) -> Gradients:
    x, gate, steps = operand.x, _gate(operand, form), form.grid
    if grad.stride() != x.stride():
        grad = torch.empty_like(x, dtype=grad.dtype).copy_(grad)
    if not bit_gates.is_contiguous():
        bit_gates = bit_gates.contiguous()
    dx, dbits = torch.empty_like(x), torch.empty_like(bit_gates)
    dscale = torch.empty((), dtype=torch.float32, device=x.device)
    partials = torch.empty(len(steps) * made.programs, dtype=torch.float32, device=x.device)
    channels = rows = 0
    table = dgate = None
    if gate is not None:
        channels, rows = gate.numel(), made.grid[1] * made.grid[2]
        table = torch.empty(rows * channels, dtype=torch.float32, device=x.device)
        dgate = torch.empty(channels, dtype=torch.float32, device=x.device)
    with _on(x.device):
        triton_code.backward[made.grid](
            x, gate, grad, dx, codes, partials, table, operand.shift, operand.scale, operand.levels, grad_scale,
            made.tiles, made.rows, made.extent,
            STEPS=tuple(float(n) for n in steps), SHARES=tuple(1 / n for n in steps), COUNT=len(steps),
            CODES=codes is not None, num_warps=TILES["backward"].warps, **made.statics, **_statics(form), **OPTIONS,
        )  # fmt: skip
        triton_code.add_gradients[(1 + math.ceil(channels / _TABLE[1]),)](
            partials, table, bit_gates, operand.scale, dscale, dbits, dgate, made.programs, rows, channels,
            SIGNED=form.signed, COUNT=len(steps), ROWS=_TABLE[0], COLUMNS=_TABLE[1], BLOCK=_BLOCK, **OPTIONS,
        )  # fmt: skip
    return dx, dscale, dbits, dgate
