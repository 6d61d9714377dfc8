"""The quantised affine map: convolution or matrix product of integer codes, scales applied after (SBS, closed form).

Codes k and 2k - n are small integers, exact in float32 and (to 8 bits) in bfloat16, so that the super-network in
evaluation and the compressed network agree bit for bit while partial sums stay below 2**24. Only the input tensor is
kept for the backward pass, where the codes are computed again.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from sbs import compiled, integer
from sbs.integer import Geometry
from sbs.kernels import Form, GateMode, Operand
from sbs.memory import dense, like, memory_view, restore
from sbs.space import levels
from sbs.weights import WeightCodes

# float16 sums of 255 * 255 overflow: there codes are scaled by a power of two, which is exact
_HALF_SHRINK = 2.0**-8
# codes of up to 8 bits are exact in bfloat16 and TF32, to which float32 products may be rounded where a user allows it
_EXACT_BF16_LEVELS = 256
_backends: Any = torch.backends
_PRODUCTS = {
    "cuda": (_backends.cudnn.conv, _backends.cuda.matmul),
    "cpu": (_backends.mkldnn.conv, _backends.mkldnn.matmul),
}


@dataclass(frozen=True)
class Affine:
    """A bilinear map of (input, weight), and its two gradients; `channels_last` views follow the input.

    geometry: of a convolution, which may be computed in integers.
    """

    forward: Callable[[Tensor, Tensor], Tensor]
    backward: Callable[[Tensor, Tensor, Tensor, list[bool]], tuple[Tensor | None, Tensor | None]]
    geometry: Geometry | None = None


def convolution(stride: list[int], padding: list[int], dilation: list[int], groups: int) -> Affine:
    """2-d convolution without bias."""

    def forward(x: Tensor, w: Tensor) -> Tensor:
        return torch.conv2d(x, w, None, stride, padding, dilation, groups)

    def backward(dy: Tensor, x: Tensor, w: Tensor, mask: list[bool]) -> tuple[Tensor | None, Tensor | None]:
        dx, dw, _ = torch.ops.aten.convolution_backward(
            dy, x, w, None, stride, padding, dilation, False, [0, 0], groups, [*mask, False]
        )
        return dx, dw

    return Affine(forward, backward, Geometry(stride, padding, dilation, groups))


def _linear_backward(dy: Tensor, x: Tensor, w: Tensor, mask: list[bool]) -> tuple[Tensor | None, Tensor | None]:
    return (dy @ w if mask[0] else None), (dy.t() @ x if mask[1] else None)


LINEAR = Affine(lambda x, w: x @ w.t(), _linear_backward)


@dataclass(frozen=True)
class Side:
    """How one operand is quantised in one call; everything but the two learnable inputs (scale, bit gates).

    levels: the selected 2**b - 1, 0-dim. shift: 0-dim, used where the form is signed. given: what the caller has
    already of a weight. unit: value of a code, product: that times the weight's, where the caller has them already.
    collect: whether residual sums are wanted.
    """

    form: Form
    levels: Tensor
    shift: Tensor
    collect: bool = False
    given: WeightCodes | None = None
    unit: Tensor | None = None
    product: Tensor | None = None

    def operand(self, x: Tensor, scale: Tensor, gate: Tensor | None, *, sums: bool = False) -> tuple[Operand, Form]:
        """The kernel's arguments for a dense `x`; the gate (C,) is left out where the form has no use for it.

        sums: whether the kernel is one that sums per channel.
        """
        x, scale = x.detach(), scale.detach()
        if gate is None or self.form.mode is GateMode.NONE:
            return Operand(memory_view(x, False), None, self.shift, scale, self.levels), self._ungated()
        flat = memory_view(x, True, sums=sums)
        return Operand(flat, _own(gate).view(1, -1, 1), self.shift, scale, self.levels), self.form

    def _ungated(self) -> Form:
        return self.form._replace(mode=GateMode.NONE)


def _own(gates: Tensor) -> Tensor:
    """Gates as the kernels want them: libraries for the CPU read no slices of other tensors."""
    return gates.detach().clone() if gates.device.type == "cpu" else gates.detach().contiguous()


def _compute_dtype(x: Tensor, sides: list[Side | None]) -> torch.dtype:
    """float64 for float64 input, the autocast type where the codes are exact in it, else float32."""
    if x.dtype == torch.float64:
        return torch.float64
    kind = x.device.type
    if not torch.is_autocast_enabled(kind):
        return torch.float32 if any(sides) else x.dtype
    return torch.float32 if _has_wide_codes(sides) else torch.get_autocast_dtype(kind)


def codes_type(weight: Tensor, bits: int) -> torch.dtype:
    """The type that products with a weight's codes are likely to be taken in; codes are exact in it."""
    kind = weight.device.type
    if weight.dtype == torch.float64 or not torch.is_autocast_enabled(kind) or levels(bits) >= _EXACT_BF16_LEVELS:
        return weight.dtype
    return torch.get_autocast_dtype(kind)


def _has_wide_codes(sides: list[Side | None]) -> bool:
    return any(side is not None and side.form.grid[-1] >= _EXACT_BF16_LEVELS for side in sides)


@contextmanager
def _whole_products(kind: str) -> Iterator[None]:
    """A region where float32 products are not rounded to TF32 or bfloat16, whatever the process allows."""
    products = () if torch.compiler.is_compiling() else _PRODUCTS.get(kind, ())
    former = [each.fp32_precision for each in products]
    try:
        for each in products:
            each.fp32_precision = "ieee"
        yield
    finally:
        for each, precision in zip(products, former, strict=True):
            each.fp32_precision = precision


def _as_given(kind: str) -> AbstractContextManager[object]:
    """A region where operands keep the type they have; entering one costs time, so only under autocast."""
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext()


class _Input(NamedTuple):
    """One operand of the map; without a side its values are its codes."""

    x: Tensor
    side: Side | None
    scale: Tensor
    bit_gates: Tensor
    channel_gate: Tensor | None = None


def _encode(given: _Input, dtype: torch.dtype, *, collect: bool = False) -> tuple[Tensor, Tensor | None]:
    """Codes, of which value = `_unit` * code, and residual sums (K - 1,), where they are to be collected."""
    x, side = given.x, given.side
    if side is None:
        return x.to(dtype), None
    if side.given is not None:
        return _shrunk(side.given.codes.to(dtype)), None
    operand, form = _encoder(given, side, collect=collect)
    if collect:
        codes, sums = compiled.encode_with_sums(operand, form, dtype)
    else:
        codes, sums = compiled.encode(operand, form, dtype), None
    return _shrunk(restore(codes, x)), sums


def _encoder(given: _Input, side: Side, *, collect: bool) -> tuple[Operand, Form]:
    """What a kernel that encodes reads."""
    # a gate of the statistics changes no code
    gated = collect or side.form.mode is not GateMode.STATISTICS
    return side.operand(given.x, given.scale, given.channel_gate if gated else None)


def _unit(given: _Input, dtype: torch.dtype) -> Tensor:
    if given.side is None:
        return torch.ones_like(given.scale)
    unit = given.side.unit
    if unit is None:
        unit = given.scale.detach() / given.side.levels
    return unit / _HALF_SHRINK if dtype == torch.float16 else unit


def _in_floats(given: _Input, w_codes: Tensor, wide: bool, affine: Affine) -> tuple[Tensor, Tensor | None]:
    """The map of the codes, and residual sums."""
    collect = given.side is not None and given.side.collect
    codes, sums = _encode(given, w_codes.dtype, collect=collect)
    with _as_given(codes.device.type), _whole_products(codes.device.type) if wide else nullcontext():
        return affine.forward(codes, w_codes), sums


def _in_integers(
    given: _Input, w: _Input, w_codes: Tensor, geometry: Geometry | None
) -> tuple[Tensor, Tensor | None] | None:
    """`_in_floats` by `sbs.integer`; None where that cannot be, nor where a value is not a number."""
    side = given.side
    if geometry is None or w_codes.dtype != torch.float32 or side is None or side.form.signed or w.side is None:
        return None
    if _has_wide_codes([side, w.side]) or not integer.applies(given.x, w_codes, geometry):
        return None
    operand, form = _encoder(given, side, collect=side.collect)
    encode = compiled.encode_with_sums if side.collect else compiled.encode_with_check
    codes, sums = encode(operand, form, torch.uint8)
    if not (sums.isfinite().all() and w.scale.isfinite()):
        return None
    y = integer.convolve(restore(codes, given.x), w_codes, int(w.side.levels), geometry)
    return y, sums if side.collect else None


def _shrunk(codes: Tensor) -> Tensor:
    return codes * _HALF_SHRINK if codes.dtype == torch.float16 else codes


class QuantizedAffine(torch.autograd.Function):
    """y = affine(Q(x), Q(w)) with the closed-form gradients of method section 4; also returns the residual sums of x.

    Inputs: x, w, their clips (0-dim), their bit gates (K - 1,), the channel gate of x (C,) or None, and the statics.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        w: Tensor,
        x_scale: Tensor,
        w_clip: Tensor,
        x_gates: Tensor,
        w_gates: Tensor,
        channel_gate: Tensor | None,
        affine: Affine,
        x_side: Side | None,
        w_side: Side | None,
    ) -> tuple[Tensor, Tensor | None]:
        """x (N, C, ...), w (O, I, ...) -> y (N, O, ...), sums (K - 1,) or None."""
        x, w = dense(x), dense(w)
        w_scale = w_clip if w_side is None or w_side.given is None else w_side.given.scale
        dtype = _compute_dtype(x, [x_side, w_side])
        given, weight = _Input(x, x_side, x_scale, x_gates, channel_gate), _Input(w, w_side, w_scale, w_gates)
        w_codes, _ = _encode(weight, dtype)
        y, sums = _in_integers(given, weight, w_codes, affine.geometry) or _in_floats(
            given, w_codes, _has_wide_codes([x_side, w_side]), affine
        )
        x_unit, w_unit = _unit(given, dtype), _unit(weight, dtype)
        known = None if x_side is None or w_side is None or dtype == torch.float16 else x_side.product
        y.mul_(x_unit * w_unit if known is None else known)
        ctx.save_for_backward(x, w, x_scale, w_scale, x_gates, w_gates, channel_gate, w_codes, x_unit, w_unit)
        ctx.statics = (affine, x_side, w_side, dtype)
        ctx.set_materialize_grads(False)
        if sums is not None:
            ctx.mark_non_differentiable(sums)
        return y, sums

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        """Gradients of x, w, the clips, the bit gates and the channel gate."""
        if grads[0] is None:
            return (None,) * 10
        x, w, x_scale, w_scale, x_gates, w_gates, channel_gate, w_codes, x_unit, w_unit = ctx.saved_tensors
        affine, x_side, w_side, dtype = ctx.statics
        need = ctx.needs_input_grad
        x_needed = need[0] or need[2] or need[4] or need[6]
        w_needed = need[1] or need[3] or need[5]
        dy = grads[0].to(dtype)
        given = _Input(x, x_side, x_scale, x_gates, channel_gate)
        x_grads = w_grads = _NO_GRADIENTS
        with _as_given(x.device.type):
            if x_needed:
                # the gradient of the input does not depend on its values, only on its shape and memory order
                dx_codes, _ = affine.backward(dy, torch.empty_like(x, dtype=dtype), w_codes, [True, False])
                x_grads, x_codes = _backward(dx_codes, w_unit, given, with_codes=True)
            else:
                x_codes, _ = _encode(given, dtype)
            if w_needed:
                _, dw_codes = affine.backward(dy, x_codes, w_codes, [False, True])
                w_grads, _ = _backward(dw_codes, x_unit, _Input(w, w_side, w_scale, w_gates))
        dx, dx_scale, dx_gates, dgate = x_grads
        dw, dw_clip, dw_gates, _ = w_grads
        return dx, dw, dx_scale, dw_clip, dx_gates, dw_gates, dgate, None, None, None


Gradients = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]
_NO_GRADIENTS: Gradients = (None, None, None, None)


def _backward(grad: Tensor, grad_scale: Tensor, given: _Input, *, with_codes: bool = False) -> tuple[Gradients, Tensor]:
    """Gradients of (x, scale, bit gates, channel gate) from the gradient of its codes.

    And the codes, which are not kept from the forward pass; x itself where they are not wanted.
    """
    x, side = given.x, given.side
    if side is None:
        return ((grad * grad_scale).to(x.dtype), None, None, None), x.to(grad.dtype)
    gate = None if side.form.mode is GateMode.STATISTICS else given.channel_gate
    operand, form = side.operand(x, given.scale, gate, sums=True)
    flat = memory_view(like(grad, x), operand.gate is not None, sums=True)
    arguments = (operand, form, flat, grad_scale, _own(given.bit_gates))
    codes = x
    if with_codes:
        (dx, dscale, dgates, dgate), codes = compiled.backward_with_codes(*arguments)
        codes = restore(_shrunk(codes), x)
    else:
        spread = () if side.given is None or side.given.std is None else (side.given.std,)
        dx, dscale, dgates, dgate = compiled.backward(*arguments, *spread)
    return (restore(dx, x), dscale.to(given.scale.dtype), dgates, dgate), codes
