"""The method written a second time, slowly: what every fast path of the product is compared with.

Nothing here imports the product. Three independent derivations stand side by side so that they can be checked
against each other as well: exact rationals (nesting of the grids), a written-out chain of autograd operations in
float64 (values and gradients), and the closed form of the gradients in plain NumPy.

Conventions: `bits` are ascending bit-widths b_1 < ... < b_K; `steps` means the K-1 choices b_2 .. b_K; a gate is 1 when
its dimensionless statistic is at least its threshold; rounding is half to even everywhere.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

# ---------------------------------------------------------------------------------------------- exact rationals


def levels(bits: int) -> int:
    """Number of steps of the b-bit grid on [0, 1]: 1 / s_b = 2^b - 1."""
    return 2**bits - 1


def round_half_even(value: Fraction) -> int:
    """Round a rational to the nearest integer, ties to even (what IEEE 754, NumPy and torch.round do)."""
    return round(value)


def exact_quantise(z: Fraction, bits: int) -> Fraction:
    """D(z, s_b) = s_b * round(z / s_b) without any floating point."""
    return Fraction(round_half_even(z * levels(bits)), levels(bits))


def exact_nested(z: Fraction, bits: Sequence[int]) -> list[Fraction]:
    """z_{b_1}, ..., z_{b_K} built by re-assignment offsets r = D(z - z_{b_{j-1}}, s_{b_j})."""
    values = [exact_quantise(z, bits[0])]
    for width in bits[1:]:
        values.append(values[-1] + exact_quantise(z - values[-1], width))
    return values


def first_pair_that_does_not_nest(bits: Sequence[int]) -> tuple[int, int] | None:
    """The first neighbouring pair whose steps are not integer multiples of each other, None when all nest."""
    for low, high in itertools.pairwise(bits):
        if high <= low or Fraction(levels(high), levels(low)).denominator != 1:
            return low, high
    return None


def distance_to_tie(z: np.ndarray, bits: Sequence[int]) -> np.ndarray:
    """How far every z is from the nearest rounding tie of any of the grids, in units of z."""
    gaps = [np.abs((z * levels(b)) % 1.0 - 0.5) / levels(b) for b in bits]
    return np.min(gaps, axis=0)


# ------------------------------------------------------------------------------------- straight-through pieces


class _Round(torch.autograd.Function):
    """round(x) forward, identity backward."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return torch.round(x)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        return grad


class _Step(torch.autograd.Function):
    """H(x) with H(0) = 1 forward, the derivative of the sigmoid at the same x backward."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return (x >= 0).to(x.dtype)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        s = torch.sigmoid(x)
        return grad * s * (1 - s)


def quantise(z: Tensor, bits: int) -> Tensor:
    """D(z, s_b), straight-through."""
    n = levels(bits)
    return _Round.apply(z * n) / n


def gate(statistic: Tensor, threshold: Tensor) -> Tensor:
    """H(statistic - threshold); the statistic is data, so the gradient goes to the threshold alone."""
    return _Step.apply(statistic.detach() - threshold)


def gate_gradient(statistic: Tensor, threshold: Tensor) -> Tensor:
    """dL/dg out of what a backward pass through `gate` left in a threshold: dg/dthreshold divided out."""
    assert threshold.grad is not None
    s = torch.sigmoid(statistic - threshold.detach())
    return -threshold.grad / (s * (1 - s))


def decompose(z: Tensor, bits: Sequence[int]) -> tuple[Tensor, list[Tensor]]:
    """z_{b_1} and the offsets r_{b_2} .. r_{b_K}, as differences of direct quantisations (the shared tie rule)."""
    grids = [quantise(z, b) for b in bits]
    return grids[0], [high - low for low, high in itertools.pairwise(grids)]


def gated_sum(base: Tensor, offsets: Sequence[Tensor], gates: Sequence[Tensor]) -> Tensor:
    """z_{b_1} + g_2 (r_2 + g_3 (r_3 + ...))."""
    total = torch.zeros_like(base)
    for offset, g in zip(reversed(offsets), reversed(gates), strict=True):
        total = g * (offset + total)
    return base + total


# ----------------------------------------------------------------------------------------------- gate statistics


def residual_statistics(z: Tensor, bits: Sequence[int], open_channels: Tensor | None = None) -> Tensor:
    """mean((z - z_{b_{j-1}})^2) / (s_{j-1}^2 / 12) for every step j = 2..K.

    `open_channels` (bool, dimension 1 of z) leaves closed groups out of the mean.
    """
    z = z.detach()
    if open_channels is not None:
        z = z[:, open_channels]
    out = [((z - quantise(z, b)) ** 2).mean() * 12 * levels(b) ** 2 for b in bits[:-1]]
    return torch.stack(out) if out else z.new_zeros(0)


def pruning_statistics(weight: Tensor, group_size: int) -> Tensor:
    """mean|W_c| / mean over groups of mean|W_c| for groups of consecutive output rows (raw weights)."""
    rows = weight.detach().abs().flatten(1).mean(1)
    groups = rows.reshape(-1, group_size).mean(1)
    return groups / groups.mean()


def selected_bits(statistics: Sequence[float], thresholds: Sequence[float], bits: Sequence[int]) -> int:
    """The bit-width the gates select: the first closed gate closes all above it."""
    chosen = bits[0]
    for statistic, threshold, width in zip(statistics, thresholds, bits[1:], strict=True):
        if statistic - threshold < 0:
            break
        chosen = width
    return chosen


# -------------------------------------------------------------------------------------------- the written-out chain


def normalise(x: Tensor, clip: Tensor, signed: bool) -> Tensor:
    """z in [0, 1]: clip(x/v, 0, 1) or (clip(x/v, -1, 1) + 1) / 2; torch.clamp passes gradients at its ends too."""
    u = torch.clamp(x / clip, -1.0 if signed else 0.0, 1.0)
    return (u + 1) / 2 if signed else u


def chain_quantiser(
    x: Tensor, clip: Tensor, thresholds: Tensor, statistics: Tensor, bits: Sequence[int], *, signed: bool
) -> Tensor:
    """One tensor through normalise, decompose, gates and back to its own scale; every gradient by autograd."""
    z = normalise(x, clip, signed)
    base, offsets = decompose(z, bits)
    gates = list(gate(statistics, thresholds).unbind()) if len(bits) > 1 else []
    zq = gated_sum(base, offsets, gates)
    return clip * (2 * zq - 1) if signed else clip * zq


def standardise(weight: Tensor, kept_out: Tensor, kept_in: Tensor) -> tuple[Tensor, Tensor]:
    """(W - mean) / std with detached statistics over kept rows and columns; also returns the std."""
    kept = weight.detach()[kept_out][:, kept_in]
    std = kept.std(unbiased=False)
    return (weight - kept.mean()) / std, std


def chain_weight(
    weight: Tensor,
    clip: Tensor,
    thresholds: Tensor,
    bits: Sequence[int],
    *,
    kept_out: Tensor | None = None,
    kept_in: Tensor | None = None,
    statistics: Tensor | None = None,
) -> Tensor:
    """Quantised weights in their own scale: standardise, quantise (signed), multiply by the detached std again.

    Without `statistics` the gates look at the kept weights themselves.
    """
    rows = torch.ones(weight.shape[0], dtype=torch.bool) if kept_out is None else kept_out
    columns = torch.ones(weight.shape[1], dtype=torch.bool) if kept_in is None else kept_in
    w, std = standardise(weight, rows, columns)
    if statistics is None:
        statistics = residual_statistics(normalise(w.detach()[rows][:, columns], clip.detach(), True), bits)
    return chain_quantiser(w, clip, thresholds, statistics, bits, signed=True) * std


def gated_feature_map(feature: Tensor, gates: Tensor, group_size: int) -> Tensor:
    """Feature map (N, C, ...) times its pruning gates, one per group of consecutive channels."""
    shape = (1, -1, *([1] * (feature.dim() - 2)))
    return feature * gates.repeat_interleave(group_size).reshape(shape)


# ------------------------------------------------------------------------------------------ closed form, plain NumPy


@dataclass(frozen=True)
class ClosedForm:
    """Value and gradients of one quantiser by the formulas, not by autograd."""

    value: np.ndarray
    input: np.ndarray
    clip: float
    thresholds: np.ndarray


def closed_form(
    x: np.ndarray,
    grad: np.ndarray,
    clip: float,
    thresholds: Sequence[float],
    bits: Sequence[int],
    *,
    statistics: Sequence[float],
    signed: bool,
) -> ClosedForm:
    """Section 4 with the amendments: closed clip interval, H(0) = 1, sigma' at the statistic that decided the gate."""
    low = -1.0 if signed else 0.0
    ratio = x / clip
    inside = ((ratio >= low) & (ratio <= 1.0)).astype(x.dtype)
    u = np.clip(ratio, low, 1.0)
    z = (u + 1) / 2 if signed else u
    grids = [np.rint(z * levels(b)) / levels(b) for b in bits]
    gates = [1.0 if s - a >= 0 else 0.0 for s, a in zip(statistics, thresholds, strict=True)]
    zq = grids[bits.index(selected_bits(statistics, thresholds, bits))]
    value = clip * (2 * zq - 1) if signed else clip * zq
    to_zq = grad * (2 * clip if signed else clip)
    d_alpha = []
    for j, (s, a) in enumerate(zip(statistics, thresholds, strict=True)):
        below = float(np.prod(gates[:j]))
        above = np.zeros_like(z)
        for i in range(len(gates) - 1, j, -1):
            above = gates[i] * (grids[i + 1] - grids[i] + above)
        sigma = 1 / (1 + np.exp(-(s - a)))
        d_gate = float(np.sum(to_zq * below * (grids[j + 1] - grids[j] + above)))
        d_alpha.append(-d_gate * sigma * (1 - sigma))
    d_clip = np.sum(grad * ((2 * zq - 1) - u * inside if signed else zq - z * inside))
    return ClosedForm(value, grad * inside, float(d_clip), np.array(d_alpha))


# ----------------------------------------------------------------------------------------------- bit-operations


def effective_bits(gates: Sequence[Tensor], bits: Sequence[int]) -> Tensor:
    """b_1 + g_2 (b_2 - b_1 + g_3 (b_3 - b_2 + ...)), differentiable in the gates."""
    total = torch.zeros((), dtype=torch.float64)
    for g, low, high in zip(reversed(gates), reversed(bits[:-1]), reversed(bits[1:]), strict=True):
        total = g * (high - low + total)
    return bits[0] + total


def effective_channels(gates: Tensor | None, group_size: int, channels: int) -> Tensor:
    """Kept channels: the sum of the group gates times the group size; all of them where nothing is pruned."""
    return torch.tensor(float(channels), dtype=torch.float64) if gates is None else gates.sum() * group_size


def bit_operations(
    macs: int, share_in: Tensor, share_out: Tensor, weight_bits: Tensor, activation_bits: Tensor
) -> Tensor:
    """mac_product: MACs at the kept channels (shares of both sides) times both bit-widths."""
    return macs * share_in * share_out * weight_bits * activation_bits


def uniq_bit_operations(macs: float, weight_bits: int, activation_bits: int, fan_in: int) -> float:
    """UNIQ (Baskin et al.): MACs * (b_w b_a + b_w + b_a + log2 fan-in)."""
    return macs * (weight_bits * activation_bits + weight_bits + activation_bits + float(np.log2(fan_in)))


# -------------------------------------------------------------------------------- the chain as layers of a network


class ChainConv2d(nn.Module):
    """A convolution whose input and weights pass through the written-out chain with all gates open.

    Serves the benchmark row "written-out chain" and small whole-network comparisons; statistics come from the batch.
    """

    def __init__(self, conv: nn.Conv2d, bits: Sequence[int] = (2, 4, 8), *, signed: bool = False):
        super().__init__()
        self.conv, self.bits, self.signed = conv, tuple(bits), signed
        self.input_clip = nn.Parameter(torch.ones(()))
        self.weight_clip = nn.Parameter(torch.full((), 3.0))
        self.input_thresholds = nn.Parameter(torch.zeros(len(bits) - 1))
        self.weight_thresholds = nn.Parameter(torch.zeros(len(bits) - 1))

    def forward(self, x: Tensor) -> Tensor:
        c = self.conv
        statistics = residual_statistics(normalise(x.detach(), self.input_clip.detach(), self.signed), self.bits)
        a = chain_quantiser(x, self.input_clip, self.input_thresholds, statistics, self.bits, signed=self.signed)
        w = chain_weight(c.weight, self.weight_clip, self.weight_thresholds, self.bits)
        return F.conv2d(a, w, c.bias, c.stride, c.padding, c.dilation, c.groups)


def chain_network(model: nn.Module, bits: Sequence[int] = (2, 4, 8)) -> nn.Module:
    """Replace every convolution of `model` in place by its written-out chain; the first one reads a signed image."""
    first = True
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Conv2d) and not isinstance(parent, ChainConv2d):
                setattr(parent, name, ChainConv2d(child, bits, signed=first))
                first = False
    return model
