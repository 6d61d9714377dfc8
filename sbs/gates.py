"""Binary gates with learnable thresholds: H(statistic - threshold), and the sigmoid's slope backward (SBS, 3.2).

The statistics are buffers that decide the *next* step (ours): every rank sees the same numbers, and evaluation selects
the same bits as training. A small hysteresis keeps a gate from flickering while its statistic is a noisy running mean.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

HYSTERESIS = 0.02
MOMENTUM = 0.1


class HardGate(torch.autograd.Function):
    """Forward: the decided gates. Backward: -dL/dg * sigmoid'(statistic - threshold) into the thresholds."""

    @staticmethod
    def forward(ctx: Any, thresholds: Tensor, statistic: Tensor, gates: Tensor) -> Tensor:
        """All of one shape; `gates` holds zeros and ones."""
        s = torch.sigmoid(statistic - thresholds)
        ctx.save_for_backward(s * (1 - s))  # the buffers themselves may be written before the backward pass
        return gates.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        """The gradient for the thresholds alone."""
        (slope,) = ctx.saved_tensors
        return -grads[0] * slope, None, None


class GateBank(nn.Module):
    """The gates of one kind, as one array: bit gates (layers, steps) or channel gates (groups,).

    maximum: the upper clamp of the thresholds.
    """

    thresholds: nn.Parameter
    statistic: Tensor
    open: Tensor
    flips: Tensor

    def __init__(self, *shape: int, maximum: float) -> None:
        super().__init__()
        self.maximum = maximum
        # a bank without gates has nothing to learn, and DDP would wait for its gradient
        self.thresholds = nn.Parameter(torch.zeros(shape), requires_grad=math.prod(shape) > 0)
        self.register_buffer("statistic", torch.ones(shape))
        self.register_buffer("open", torch.ones(shape))
        self.register_buffer("flips", torch.zeros((), dtype=torch.int64))

    def gates(self) -> Tensor:
        """The decided gates, zeros and ones, differentiable in the thresholds."""
        gates: Tensor = HardGate.apply(self.thresholds, self.statistic, self.decided())
        return gates

    def decided(self) -> Tensor:
        """The same, detached. A network whose buffers were averaged over steps has the gates of most of them."""
        return (self.open >= 0.5).to(self.open.dtype)

    def margin(self) -> Tensor:
        """Statistic minus threshold: how far each gate is from its flip."""
        return self.statistic - self.thresholds.detach()

    @torch.no_grad()
    def clamp(self) -> None:
        """Keep the thresholds within [0, maximum]."""
        self.thresholds.clamp_(0, self.maximum)

    @torch.no_grad()
    def commit(self, decided: Tensor) -> None:
        """Set the gates to `decided` (zeros and ones) and count the flips."""
        self.flips += (decided != self.open).sum()
        self.open.copy_(decided)


def decide(margin: Tensor, is_open: Tensor) -> Tensor:
    """Gates by the sign of their margin; inside the hysteresis band a gate stays as it is."""
    return torch.where(margin >= HYSTERESIS, 1.0, torch.where(margin < -HYSTERESIS, 0.0, is_open))


def effective_bits(gates: Tensor, bits: tuple[int, ...]) -> Tensor:
    """b_1 + g_2 * (b_2 - b_1 + g_3 * (...)) for gates (layers, steps): bits per layer, differentiable in the gates."""
    result = torch.zeros(gates.shape[0], dtype=gates.dtype, device=gates.device)
    for j in reversed(range(len(bits) - 1)):
        result = gates[:, j] * (bits[j + 1] - bits[j] + result)
    return result + bits[0]


def selected(open_gates: Tensor) -> Tensor:
    """Index of the selected bit-width per layer: the number of gates open before the first closed one."""
    return open_gates.cumprod(dim=1).sum(dim=1).long()
