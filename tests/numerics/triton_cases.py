"""What the Triton kernels are compared on, under the interpreter (tests/numerics) and on a device (tests/gpu)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from sbs import kernels
from sbs.kernels import Form, GateMode, Operand


@dataclass(frozen=True)
class Case:
    """A form, the (outer, channels, inner) of its operand, the operand's type and that of codes and gradients."""

    form: Form
    shape: tuple[int, int, int]
    dtype: torch.dtype
    low: torch.dtype | None = None

    @property
    def wide(self) -> torch.dtype:
        """Of scales and gates."""
        return torch.float64 if self.dtype is torch.float64 else torch.float32

    def operand(self, device: str) -> Operand:
        """Values on both sides of every clip; a third of the gates closed."""
        generator = torch.Generator(device).manual_seed(1)
        shape, flat = self.shape, self.form.mode is GateMode.NONE
        x = torch.randn(shape, generator=generator, device=device, dtype=self.wide).mul_(2).to(self.dtype)
        gate = (torch.rand(1, shape[1], 1, generator=generator, device=device) < 0.7).to(self.wide)
        shift, scale, levels = torch.tensor([0.01, 1.7, 15.0], device=device, dtype=self.wide).unbind(0)
        return Operand(x.view(-1) if flat else x, None if flat else gate, shift, scale, levels)

    def gradients(self, device: str) -> tuple[Tensor, Tensor, Tensor]:
        """Gradient of the codes, its scale, bit gates of which the second is closed."""
        generator = torch.Generator(device).manual_seed(2)
        grad = torch.randn(self.shape, generator=generator, device=device, dtype=self.wide)
        grad = grad.to(self.low or self.dtype)
        gates = torch.tensor([1.0, 0.0, 1.0], device=device, dtype=self.wide)[: len(self.form.grid) - 1]
        grad = grad.view(-1) if self.form.mode is GateMode.NONE else grad
        return grad, torch.tensor(0.01, device=device, dtype=self.wide), gates

    def calls(self, device: str) -> dict[str, tuple[Any, ...]]:
        """Arguments of every kernel behind operand and form."""
        low = self.low or self.dtype
        gradients = self.gradients(device)
        spread = (torch.tensor(0.7, device=device, dtype=self.wide),) if self.form.signed else ()
        sums: dict[str, tuple[Any, ...]] = {"encode_with_sums": (low,), "residual_sums": ()}
        return {
            "encode": (torch.uint8 if not self.form.signed else low,),
            "encode_with_check": (low,),
            "backward": (*gradients, *spread),
            "backward_with_codes": gradients,
            **(sums if len(self.form.grid) > 1 else {}),
        }


def compare(made: Any, case: Case, device: str, *, names: tuple[str, ...] = (), dx_rtol: float = 0.0) -> None:
    """Every kernel of the module `made` with the eager one: codes and dx to the bit, sums within rounding.

    names: of the kernels to compare; all if empty. dx_rtol: for an interpreter that truncates where it should round.
    """
    operand = case.operand(device)
    for name, arguments in case.calls(device).items():
        if names and name not in names:
            continue
        want = tree_leaves(getattr(kernels, name)(operand, case.form, *arguments))
        got = tree_leaves(getattr(made, name)(operand, case.form, *arguments))
        assert [_kind(t) for t in got] == [_kind(t) for t in want], f"{name} of {case}"
        for position, (ours, theirs) in enumerate(zip(got, want, strict=True)):
            what = f"{name}[{position}] of {case}"
            if theirs is None:
                continue
            if ours.shape != operand.x.shape:
                _close(ours, theirs, operand.x.numel(), what)
            elif "backward" in name and position == 0 and dx_rtol:
                torch.testing.assert_close(ours, theirs, rtol=dx_rtol, atol=0, msg=lambda m, w=what: f"{w}: {m}")
            else:
                assert torch.equal(ours, theirs), f"{what}: {int((ours != theirs).sum())} elements differ"


def _kind(t: Tensor | None) -> tuple[object, ...] | None:
    return None if t is None else (tuple(t.shape), t.dtype)


def _close(ours: Tensor, theirs: Tensor, count: int, what: str) -> None:
    """Sums of `count` terms of either sign, each below 1: rounding grows with the root of their number."""
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=2e-6 * count**0.5, msg=lambda m: f"{what}: {m}")
