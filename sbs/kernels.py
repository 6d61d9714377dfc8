"""Element-wise kernels of the closed form: normalise, quantise, residual statistics, and their backward pass.

All work on a view of the tensor in memory order, so that one dynamic-shape graph serves every layer; `sbs.compiled` has
them compiled.

Conventions: n_b = 2**b - 1 steps; z in [0, 1] is the normalised value, the code is k = round(z * n_b), ties to even.
    unsigned  z = clip(x / scale, 0, 1)                                 value = scale * k / n_b
    signed    u = clip((x - shift) / scale, -1, 1), z = (u + 1) / 2     value = scale * (2k - n_b) / n_b
`gate` is a per-channel mask for tensors viewed as (outer, channels, inner); what it does is said by GateMode. Sums of
the backward pass go over the inner axis first, so that those per channel and those over all share one loop on a CPU.
"""

import enum
import math
from typing import NamedTuple

import torch
from torch import Tensor


class GateMode(enum.Enum):
    """How a channel gate meets a quantiser: not at all, before it, after it, or in its statistics alone."""

    NONE = "none"
    BEFORE = "before"
    AFTER = "after"
    STATISTICS = "statistics"


class Operand(NamedTuple):
    """What a kernel reads: x, of `memory.memory_view`; gate, (1, channels, 1) or None; the rest 0-dim."""

    x: Tensor
    gate: Tensor | None
    shift: Tensor
    scale: Tensor
    levels: Tensor


class Form(NamedTuple):
    """The static part of a quantiser. grid: steps n_b of its candidate bit-widths, rising.

    relu: upper limit (infinite or 6) of the ReLU that the quantiser computes as well, before all else; None without.
    """

    signed: bool
    mode: GateMode
    grid: tuple[int, ...]
    relu: float | None = None


def _normalize(x: Tensor, operand: Operand, signed: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Clipped value (u or z), z in [0, 1], and the closed-interval indicator, all float32 or wider."""
    if signed:
        raw = (x - operand.shift) / operand.scale
        value = raw.clamp(-1, 1)
        return value, (value + 1) * 0.5, raw.abs() <= 1
    raw = x / operand.scale
    value = raw.clamp(0, 1)
    return value, value, (raw >= 0) & (raw <= 1)


def _feature(operand: Operand, form: Form) -> Tensor:
    """x behind its ReLU, if that is the quantiser's, in float32 or wider."""
    x = operand.x if operand.x.dtype == torch.float64 else operand.x.float()
    if form.relu is None:
        return x
    return x.clamp_min(0) if math.isinf(form.relu) else x.clamp(0, form.relu)


def _gated(operand: Operand, form: Form) -> Tensor:
    x = _feature(operand, form)
    return x * operand.gate if form.mode is GateMode.BEFORE and operand.gate is not None else x


def _relu_passes(x: Tensor, limit: float) -> Tensor:
    """Where a ReLU lets gradients through: an open interval, as torch has it."""
    return x > 0 if math.isinf(limit) else (x > 0) & (x < limit)


def encode(operand: Operand, form: Form, dtype: torch.dtype) -> Tensor:
    """Integer codes as `dtype`: k (unsigned) or 2k - n (signed), zero where a gate is closed."""
    _, z, _ = _normalize(_gated(operand, form), operand, form.signed)
    codes = torch.round(z * operand.levels)
    if form.signed:
        codes = 2 * codes - operand.levels
    if form.mode is GateMode.AFTER and operand.gate is not None:
        codes = codes * operand.gate
    return codes.to(dtype)


def encode_with_check(operand: Operand, form: Form, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """`encode`, and a 0-dim check: not a number where any value is not, which integers cannot say; else 0."""
    _, z, _ = _normalize(_gated(operand, form), operand, form.signed)
    return encode(operand, form, dtype), (z * 0).sum()


def residual_sums(operand: Operand, form: Form) -> Tensor:
    """Sum of 12 * n**2 * (z - D_n(z))**2 for every n but the last; over the count it is the gates' statistic (ours).

    Compiled for the CPU it adds up in float32, lane by lane: over 25 million values it is off by 6e-4 of itself.
    """
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


def backward(  # noqa: PLR0917 - tensors and statics, in the order that a library takes them
    operand: Operand, form: Form, grad: Tensor, grad_scale: Tensor, bit_gates: Tensor, spread: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Closed-form gradients (dx, dscale, dbit_gates, dgate) of a loss with g = dL/dvalue = grad * grad_scale.

    dx = g * 1[inside], with a ReLU also * 1[0 < x < limit];
    dscale = <g, v_q - v * 1[inside]>, v the normalised value, v_q its quantised one;
    dbit_gates[j] = (dvalue/dz) * (product of lower gates) * <g, offset_j + gate_{j+1} * (offset_{j+1} + ...)>,
    where offset_j = D_{grid[j+1]}(z) - D_{grid[j]}(z). dgate, per channel, uses the value before the gate. spread:
    where the scale is that times a clip, dscale is the clip's.
    """
    x, gate, scale = _gated(operand, form), operand.gate, operand.scale
    g = grad.to(x.dtype) * grad_scale
    v, z, inside = _normalize(x, operand, form.signed)
    quantized = torch.round(z * operand.levels) * (1 / operand.levels)
    v_q = 2 * quantized - 1 if form.signed else quantized
    dgate = None
    if form.mode is GateMode.AFTER and gate is not None:
        dgate = (g * v_q * scale).sum(dim=-1).sum(dim=0)
        g = g * gate
    dx = g * inside
    dscale = (g * (v_q - v * inside)).sum(dim=-1).sum()
    dots: list[Tensor] = []
    # by reciprocals: these values are not codes, and divisions would take half of the pass
    coarse = torch.round(z * form.grid[0]) * (1 / form.grid[0])
    for n in form.grid[1:]:
        fine = torch.round(z * n) * (1 / n)
        dots.append((g * (fine - coarse)).sum(dim=-1).sum())
        coarse = fine
    if form.mode is GateMode.BEFORE and gate is not None:
        dgate = (dx * _feature(operand, form)).sum(dim=-1).sum(dim=0)
        dx = dx * gate
    if form.relu is not None:
        dx = dx * _relu_passes(operand.x, form.relu)
    slope = 2 * scale if form.signed else scale
    if spread is not None:
        dscale = dscale * spread
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
