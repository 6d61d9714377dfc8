"""Element-wise kernels of the closed form: normalise, quantise, residual statistics, and their backward pass.

All work on a view of the tensor in memory order, so that one dynamic-shape graph serves every layer. They are compiled
by torch.compile at first use; where no compiler is at hand they run eagerly, after one warning.

Conventions: n_b = 2**b - 1 steps; z in [0, 1] is the normalised value, the code is k = round(z * n_b), ties to even.
    unsigned  z = clip(x / scale, 0, 1)                                 value = scale * k / n_b
    signed    u = clip((x - shift) / scale, -1, 1), z = (u + 1) / 2     value = scale * (2k - n_b) / n_b
`gate` is a per-channel mask for tensors viewed as (outer, channels, inner); what it does is said by GateMode.
"""

import enum
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor


class GateMode(enum.Enum):
    """How a channel gate meets a quantiser: not at all, before it, after it, or in its statistics alone."""

    NONE = "none"
    BEFORE = "before"
    AFTER = "after"
    STATISTICS = "statistics"


class Operand(NamedTuple):
    """What a kernel reads: x, a view in memory order; gate, (1, channels, 1) or None; the rest 0-dim."""

    x: Tensor
    gate: Tensor | None
    shift: Tensor
    scale: Tensor
    levels: Tensor


class Form(NamedTuple):
    """The static part of a quantiser. grid: steps n_b of its candidate bit-widths, rising."""

    signed: bool
    mode: GateMode
    grid: tuple[int, ...]


def _normalize(x: Tensor, operand: Operand, signed: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Clipped value (u or z), z in [0, 1], and the closed-interval indicator, all float32 or wider."""
    if signed:
        raw = (x - operand.shift) / operand.scale
        value = raw.clamp(-1, 1)
        return value, (value + 1) * 0.5, raw.abs() <= 1
    raw = x / operand.scale
    value = raw.clamp(0, 1)
    return value, value, (raw >= 0) & (raw <= 1)


def _gated(operand: Operand, form: Form) -> Tensor:
    x = operand.x if operand.x.dtype == torch.float64 else operand.x.float()
    return x * operand.gate if form.mode is GateMode.BEFORE and operand.gate is not None else x


def encode(operand: Operand, form: Form, dtype: torch.dtype) -> Tensor:
    """Integer codes as `dtype`: k (unsigned) or 2k - n (signed), zero where a gate is closed."""
    _, z, _ = _normalize(_gated(operand, form), operand, form.signed)
    codes = torch.round(z * operand.levels)
    if form.signed:
        codes = 2 * codes - operand.levels
    if form.mode is GateMode.AFTER and operand.gate is not None:
        codes = codes * operand.gate
    return codes.to(dtype)


def residual_sums(operand: Operand, form: Form) -> Tensor:
    """Sum of 12 * n**2 * (z - D_n(z))**2 for every n but the last; over the count it is the gates' statistic (ours)."""
    _, z, _ = _normalize(_gated(operand, form), operand, form.signed)
    sums = []
    for n in form.grid[:-1]:
        scaled = z * n
        residual = scaled - torch.round(scaled)
        residual = residual * residual
        if form.mode in (GateMode.AFTER, GateMode.STATISTICS) and operand.gate is not None:
            residual = residual * operand.gate
        sums.append(residual.sum() * 12)
    return torch.stack(sums)


def encode_with_sums(operand: Operand, form: Form, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """`encode` and `residual_sums` in one pass."""
    return encode(operand, form, dtype), residual_sums(operand, form)


def backward(
    operand: Operand, form: Form, grad: Tensor, grad_scale: Tensor, bit_gates: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Closed-form gradients (dx, dscale, dbit_gates, dgate) of a loss with g = dL/dvalue = grad * grad_scale.

    dx = g * 1[inside]; dscale = <g, v_q - v * 1[inside]>, v the normalised value, v_q its quantised one;
    dbit_gates[j] = (dvalue/dz) * (product of lower gates) * <g, offset_j + gate_{j+1} * (offset_{j+1} + ...)>,
    where offset_j = D_{grid[j+1]}(z) - D_{grid[j]}(z). dgate, per channel, uses the value before the gate.
    """
    x, gate, scale = _gated(operand, form), operand.gate, operand.scale
    g = grad.to(x.dtype) * grad_scale
    v, z, inside = _normalize(x, operand, form.signed)
    quantized = torch.round(z * operand.levels) / operand.levels
    v_q = 2 * quantized - 1 if form.signed else quantized
    dgate = None
    if form.mode is GateMode.AFTER and gate is not None:
        dgate = (g * v_q * scale).sum(dim=(0, 2))
        g = g * gate
    dx = g * inside
    dscale = (g * (v_q - v * inside)).sum()
    dots: list[Tensor] = []
    coarse = torch.round(z * form.grid[0]) / form.grid[0]
    for n in form.grid[1:]:
        fine = torch.round(z * n) / n
        dots.append((g * (fine - coarse)).sum())
        coarse = fine
    if form.mode is GateMode.BEFORE and gate is not None:
        dgate = (dx * operand.x).sum(dim=(0, 2))
        dx = dx * gate
    slope = 2 * scale if form.signed else scale
    return dx.to(operand.x.dtype), dscale, _chain(dots, bit_gates, slope), dgate


def backward_with_codes(
    operand: Operand, form: Form, grad: Tensor, grad_scale: Tensor, bit_gates: Tensor
) -> tuple[tuple[Tensor, Tensor, Tensor, Tensor | None], Tensor]:
    """`backward` and, as the gradient's type, `encode` in one pass."""
    return backward(operand, form, grad, grad_scale, bit_gates), encode(operand, form, grad.dtype)


def _chain(dots: list[Tensor], gates: Tensor, slope: Tensor) -> Tensor:
    """Gradients of the nested gated sum from the dot products of its offsets: Horner's scheme from the top."""
    if not dots:
        return torch.zeros_like(gates)
    tails: list[Tensor] = []
    for j in reversed(range(len(dots))):
        tails.insert(0, dots[j] + gates[j + 1] * tails[0] if tails else dots[j])
    grads, product = [], slope
    for j, tail in enumerate(tails):
        grads.append(product * tail)
        product = product * gates[j]
    return torch.stack(grads).to(gates.dtype)


# On a GPU compiled division is approximate unless asked otherwise. A quotient that is a bit off can round to the next
# code, and small weights are encoded by eager code (weights.py): all must divide alike.
_OPTIONS = {"eager_numerics.division_rounding": True}
# forms x types x devices: far more than any one run needs, so that none ends in the eager fallback
_GRAPHS = 64


class _Compiled:
    """A function that compiles itself at first use and falls back to eager for good, warning once, if that fails."""

    enabled = True
    _warned = False

    def __init__(self, function: Callable[..., Any]) -> None:
        self.eager = function
        self._compiled: dict[tuple[Form, torch.dtype], Callable[..., Any]] = {}

    def __call__(self, operand: Operand, form: Form, *args: Any) -> Any:
        if not _Compiled.enabled or torch.compiler.is_compiling():
            return self.eager(operand, form, *args)
        # one cache for each kind of tensor: looking a graph up among all of them takes longer than small tensors do
        key = (form, operand.x.dtype)
        compiled = self._compiled.get(key)
        if compiled is None:
            limits = {"recompile_limit": _GRAPHS, "isolate_recompiles": True}
            compiled = torch.compile(self.eager, dynamic=True, fullgraph=True, options=_OPTIONS.copy(), **limits)  # type: ignore[call-overload]
            self._compiled[key] = compiled
        try:
            return compiled(operand, form, *args)
        except Exception as error:  # a broken tool chain raises many types, none of them the caller's fault
            if "torch._" not in type(error).__module__:
                raise
            _Compiled.enabled = False
            if not _Compiled._warned:
                _Compiled._warned = True
                reason = (str(error).strip() or type(error).__name__).splitlines()[0]
                warnings.warn(f"SBS kernels run uncompiled, and slower: torch.compile failed ({reason})", stacklevel=3)
            return self.eager(operand, form, *args)


def use_compiled(enabled: bool) -> bool:
    """Switch compilation of the kernels on or off for this process; returns the former setting."""
    former = _Compiled.enabled
    _Compiled.enabled = enabled
    return former


compiled_encode = _Compiled(encode)
compiled_encode_with_sums = _Compiled(encode_with_sums)
compiled_residual_sums = _Compiled(residual_sums)
compiled_backward = _Compiled(backward)
compiled_backward_with_codes = _Compiled(backward_with_codes)
