"""Quantised convolution and linear layers: one class each for the super-network and the compressed network.

A layer holds its candidate bit-widths; with one candidate it is a fixed-bit layer. In a super-network the gates of the
step reach it through `context`, which the network sets before its forward pass and clears after the step.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sbs.errors import SbsError
from sbs.kernels import Form, GateMode
from sbs.memory import spread
from sbs.quantizer import LINEAR, Affine, QuantizedAffine, Side, codes_type, convolution
from sbs.space import FULL_PRECISION_BITS, levels
from sbs.weights import Masks, WeightCodes, moments, weight_codes, whole_mask

CLIP_FLOOR_SHARE = 1e-3


@dataclass(frozen=True)
class LayerContext:
    """The gates of one step for one layer; None where that side has nothing to choose or to gate.

    units: value of an input's code, and that times the value of a weight's. channel_share: share of the channels that
    channel_gate leaves open.
    """

    weight: WeightCodes | None = None
    units: tuple[Tensor, Tensor] | None = None
    weight_gates: Tensor | None = None
    weight_levels: Tensor | None = None
    activation_gates: Tensor | None = None
    activation_levels: Tensor | None = None
    channel_gate: Tensor | None = None
    channel_share: Tensor | None = None
    collect: bool = False

    def __reduce__(self) -> tuple[type[None], tuple[()]]:
        """A copy of a network is within no forward pass: None stands for its contexts."""
        return type(None), ()


_FIXED = LayerContext()


@dataclass(frozen=True)
class Residuals:
    """Residual sums (K - 1,) of activations, and how many they are: `count`, of which channel gates leave `share`."""

    sums: Tensor
    count: int | Tensor
    share: Tensor | None = None

    def counted(self) -> Tensor:
        """How many they are, 0-dim."""
        if isinstance(self.count, Tensor):
            return self.count
        count = torch.full_like(self.sums[0], self.count)
        return count if self.share is None else count * self.share

    def and_before(self, earlier: "Residuals | None") -> "Residuals":
        """These and those of earlier batches."""
        if earlier is None:
            return self
        return Residuals(self.sums + earlier.sums, self.counted() + earlier.counted())


@dataclass(frozen=True)
class QuantSettings:
    """What is fixed for a layer: candidates, sign of its input, whether its input is the image, its gate's mode.

    relu: upper limit of the ReLU in front, where the layer computes it (see `sbs.absorb`); None where it does not.
    """

    weight_bits: tuple[int, ...]
    activation_bits: tuple[int, ...]
    signed: bool
    image: bool = False
    gate_mode: GateMode = GateMode.NONE
    relu: float | None = None


class QuantizedLayer(nn.Module):
    """What QuantConv2d and QuantLinear share: clips, statistics of the weights, the call of the quantised map."""

    weight: Any
    bias: Any
    weight_clip: Tensor
    activation_clip: Tensor
    weight_clip_floor: Tensor
    activation_clip_floor: Tensor
    _weight_levels: Tensor
    _activation_levels: Tensor
    _zero: Tensor
    _no_gates: Tensor
    _given_codes: Tensor | None
    _given_scale: Tensor | None

    kept: Masks
    """Whose product has ones where the weight's entries are kept, zeros where channel gates are closed."""

    def setup(self, settings: QuantSettings) -> None:
        """Give a float layer its clips and its (empty) bookkeeping."""
        self.check_type()
        self.settings = settings
        self.context: LayerContext | None = None
        self.kept: Masks = ()
        self.pending_activation: Residuals | None = None
        self.observed: list[Tensor] | None = None
        self.siblings: Any = None  # of sbs.siblings, where there are any
        like = self.weight.detach()
        for side, bits in (("weight", settings.weight_bits), ("activation", settings.activation_bits)):
            quantized = bits != (FULL_PRECISION_BITS,)
            clip = like.new_ones(())
            # the image's clip is calibrated and stays: learning it would cost a gradient of the whole input
            if quantized and not (side == "activation" and settings.image):
                self.register_parameter(f"{side}_clip", nn.Parameter(clip))
            else:
                self.register_buffer(f"{side}_clip", clip)
            self.register_buffer(f"{side}_clip_floor", like.new_tensor(CLIP_FLOOR_SHARE))
            self.register_buffer(f"_{side}_levels", like.new_tensor(self.steps(side)), persistent=False)
        self.register_buffer("_zero", like.new_zeros(()), persistent=False)
        self.register_buffer("_given_codes", None, persistent=False)
        self.register_buffer("_given_scale", None, persistent=False)
        self.register_buffer("_no_gates", like.new_ones(0), persistent=False)
        self.register_load_state_dict_pre_hook(_forget_codes)

    def check_type(self) -> None:
        """Raise SbsError for weights in half precision, which cannot hold codes, clips and gate statistics."""
        if self.weight.dtype not in (torch.float32, torch.float64):
            name = str(self.weight.dtype).removeprefix("torch.")
            raise SbsError(
                f"the weights of this network are {name}: a network with quantised layers is kept in float32 (or "
                f"float64). Instead of net.half(), net.bfloat16() or net.to(torch.{name}) run it under "
                f"torch.autocast({self.weight.device.type!r}, dtype=torch.{name})"
            )

    @property
    def chooses(self) -> bool:
        """Whether gates decide what the layer computes, which only its super-network knows."""
        s = self.settings
        return len(s.weight_bits) > 1 or len(s.activation_bits) > 1 or s.gate_mode is not GateMode.NONE

    def _context(self) -> LayerContext:
        if self.context is None and self.chooses:
            raise SbsError(
                "a layer of a super-network was called outside the network's forward(): call the super-network itself, "
                "not its `model` or a part of that"
            )
        return self.context or _FIXED

    def steps(self, side: str) -> float:
        """n of the widest candidate of a side, 1 where it is not quantised."""
        bits = self.settings.weight_bits if side == "weight" else self.settings.activation_bits
        return 1.0 if bits == (FULL_PRECISION_BITS,) else float(levels(bits[-1]))

    @property
    def quantizes_weight(self) -> bool:
        """Whether the weight is quantised (else full precision)."""
        return self.settings.weight_bits != (FULL_PRECISION_BITS,)

    @property
    def quantizes_activation(self) -> bool:
        """Whether the input is quantised (else full precision)."""
        return self.settings.activation_bits != (FULL_PRECISION_BITS,)

    @torch.no_grad()
    def set_clip(self, side: str, value: Tensor | float) -> None:
        """Set `weight_clip` or `activation_clip`, and with it the floor that after_step keeps it above."""
        clip, floor = getattr(self, f"{side}_clip"), getattr(self, f"{side}_clip_floor")
        clip.fill_(value)
        floor.copy_(clip * CLIP_FLOOR_SHARE)

    def give_codes(self, codes: Tensor, scale: Tensor) -> None:
        """Take codes and scale from a file in place of the weight's own (inference alone)."""
        self._given_codes, self._given_scale = codes.to(self.weight), scale.to(self.weight)

    def given_codes(self) -> WeightCodes | None:
        """What give_codes() left, if anything."""
        if self._given_codes is None or self._given_scale is None:
            return None
        return WeightCodes(self._zero, self._given_scale, self._given_codes)

    def keep(self, masks: Masks) -> bool:
        """Take the masks of the kept entries; False if they are known to be those that were there."""
        # there looking costs nothing, and multiplying by ones does; elsewhere the network writes to them in place
        if masks and masks[0].device.type == "cpu":
            whole = whole_mask(masks).clone()
            masks = () if bool(whole.all()) else (whole,)
        kept, self.kept = self.kept, masks
        known = len(masks) == len(kept) and all(m.device.type == "cpu" for m in (*masks, *kept))
        return not known or not all(map(torch.equal, masks, kept))

    def kept_weight(self) -> Tensor:
        """The weight's kept entries, flat: those that the compressed layer will hold. Looks at the masks."""
        w: Tensor = self.weight
        return w[whole_mask(self.kept).expand_as(w) > 0] if self.kept else w.flatten()

    def _weight_side(self, c: LayerContext) -> Side:
        """The weight's side, statistics detached and over the kept weights alone."""
        selected = self._weight_levels if c.weight_levels is None else c.weight_levels
        given = c.weight or self.given_codes()
        if given is None:
            found = moments([self.weight], [self.kept])
            dtype = codes_type(self.weight, self.settings.weight_bits[-1])
            (given,) = weight_codes([self.weight], [self.weight_clip], selected.view(1), found, dtype)
        form = Form(True, GateMode.NONE, tuple(levels(b) for b in self.settings.weight_bits))
        return Side(form, selected, given.shift, given=given, unit=given.unit)

    def _activation_side(self, c: LayerContext) -> Side:
        s = self.settings
        grid = tuple(levels(b) for b in s.activation_bits)
        selected = self._activation_levels if c.activation_levels is None else c.activation_levels
        mode = s.gate_mode if c.channel_gate is not None else GateMode.NONE
        unit, product = c.units or (None, None)
        collect = c.collect and len(grid) > 1
        return Side(Form(s.signed, mode, grid, s.relu), selected, self._zero, collect, unit=unit, product=product)

    def apply_quantized(self, x: Tensor, affine: Affine) -> Tensor:
        """The layer's output for input `x`, bias included; leaves residual sums in `pending_activation`."""
        self.check_type()
        if not x.is_floating_point():
            raise SbsError(f"a quantised layer got an input of {x.dtype}: give images as floating point, normalised")
        if self._given_codes is not None and self.weight.requires_grad and torch.is_grad_enabled():
            raise SbsError(
                "this network came from an exported file and is for inference alone: to go on training, start from the "
                "network that was exported, or load a state dict"
            )
        c = self._context()
        if self.observed is not None:
            x = x if self.settings.relu is None else x.clamp(0, self.settings.relu)
            self.observed.append(_sample(x, self.settings.signed))
            return (
                affine.forward(x, self.weight) if self.bias is None else self._add_bias(affine.forward(x, self.weight))
            )
        gate = c.channel_gate
        if not self.quantizes_activation and gate is not None and self.settings.gate_mode is not GateMode.STATISTICS:
            x = x * gate.view(1, -1, *[1] * (x.dim() - 2))
            gate = None
        if not self.quantizes_activation and not self.quantizes_weight:
            y = affine.forward(x, self.weight)
        else:
            y = self._quantized(x, affine, c, gate)
        return y if self.bias is None else self._add_bias(y)

    def _quantized(self, x: Tensor, affine: Affine, c: LayerContext, gate: Tensor | None) -> Tensor:
        if self.siblings is not None and not torch.compiler.is_compiling():
            c = self.siblings.context(self)
        x_side = self._activation_side(c) if self.quantizes_activation else None
        w_side = self._weight_side(c) if self.quantizes_weight else None
        # a file has but the scale: no gradient can reach the clip
        w_clip = self._zero if w_side is None or self._given_codes is not None else self.weight_clip
        x_gates = self._no_gates if c.activation_gates is None else c.activation_gates
        w_gates = self._no_gates if c.weight_gates is None else c.weight_gates
        y, sums = QuantizedAffine.apply(
            x, self.weight, self.activation_clip, w_clip, x_gates, w_gates, gate, affine, x_side, w_side
        )
        if sums is not None:
            share = None
            if gate is not None and x_side is not None and x_side.form.mode is not GateMode.NONE:
                share = gate.detach().mean() if c.channel_share is None else c.channel_share
            self.pending_activation = Residuals(sums, x.numel(), share).and_before(self.pending_activation)
        output: Tensor = y
        return output

    def _add_bias(self, y: Tensor) -> Tensor:
        assert self.bias is not None
        return y + self.bias.view(1, -1, *[1] * (y.dim() - 2)).to(y.dtype)


class QuantConv2d(nn.Conv2d, QuantizedLayer):
    """nn.Conv2d whose weight and input are quantised; see QuantizedLayer."""

    @classmethod
    def from_float(cls, m: nn.Conv2d, settings: QuantSettings) -> "QuantConv2d":
        """A quantised layer with the weights, device and type of `m`."""
        layer = cls(
            m.in_channels,
            m.out_channels,
            m.kernel_size,  # type: ignore[arg-type]
            m.stride,  # type: ignore[arg-type]
            m.padding,  # type: ignore[arg-type]
            m.dilation,  # type: ignore[arg-type]
            m.groups,
            m.bias is not None,
            device=m.weight.device,
            dtype=m.weight.dtype,
        )
        _adopt(layer, m, settings)
        return layer

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, O, H', W')."""
        affine = convolution(list(self.stride), list(self.padding), list(self.dilation), self.groups)  # type: ignore[arg-type]
        return self.apply_quantized(x, affine)


class QuantLinear(nn.Linear, QuantizedLayer):
    """nn.Linear whose weight and input are quantised; see QuantizedLayer."""

    @classmethod
    def from_float(cls, m: nn.Linear, settings: QuantSettings) -> "QuantLinear":
        """A quantised layer with the weights, device and type of `m`."""
        layer = cls(m.in_features, m.out_features, m.bias is not None, device=m.weight.device, dtype=m.weight.dtype)
        _adopt(layer, m, settings)
        return layer

    def forward(self, x: Tensor) -> Tensor:
        """(N, F) -> (N, O)."""
        return self.apply_quantized(x, LINEAR)


@torch.no_grad()
def units(
    layers: Sequence[QuantizedLayer], weights: Sequence[WeightCodes], steps: Tensor
) -> list[tuple[Tensor, Tensor]]:
    """What LayerContext holds of each layer; steps: n of the layers' inputs, (layers,)."""
    inputs = torch.stack([layer.activation_clip for layer in layers]) / steps
    products = inputs * torch.stack([each.unit for each in weights if each.unit is not None])
    return list(zip(inputs.unbind(0), products.unbind(0), strict=True))


@torch.no_grad()
def clamp_clips(model: nn.Module) -> None:
    """Keep every clip at or above 1e-3 of its start (ours)."""
    layers = [m for m in model.modules() if isinstance(m, QuantizedLayer)]
    clips = [c for m in layers for c in (m.weight_clip, m.activation_clip)]
    floors = [f for m in layers for f in (m.weight_clip_floor, m.activation_clip_floor)]
    if clips:
        torch._foreach_maximum_(clips, floors)


def _forget_codes(layer: QuantizedLayer, state: dict[str, Tensor], prefix: str, *_: object) -> None:
    """Codes from a file are those of one weight: another one that is loaded has its own."""
    weight = state.get(f"{prefix}weight")
    if weight is not None and not torch.equal(weight.to(layer.weight), layer.weight):
        layer._given_codes = layer._given_scale = None  # noqa: SLF001


def check_own_weights(model: nn.Module) -> None:
    """Refuse a network whose weights are but copies of codes from a file."""
    if any(isinstance(m, QuantizedLayer) and m.given_codes() for m in model.modules()):
        raise SbsError(
            "this network came from an exported file and is for inference alone: take the one that was exported"
        )


def is_hooked(m: nn.Module) -> bool:
    """Whether somebody looks at what goes through the module."""
    hooks = (m._forward_hooks, m._forward_pre_hooks, m._backward_hooks, m._backward_pre_hooks)  # noqa: SLF001
    return any(hooks)


class AbsorbedReLU(nn.ReLU):
    """Stands for a ReLU that the layer behind it computes: passes its input on, and remembers the original."""

    def __init__(self, original: nn.Module) -> None:
        super().__init__()
        self.original = original

    def forward(self, x: Tensor) -> Tensor:
        """`x` itself, or, where hooks have come to be, behind the ReLU: computing it twice changes nothing."""
        return self.original(x) if is_hooked(self) else x


def from_float(m: nn.Module, settings: QuantSettings) -> QuantConv2d | QuantLinear:
    """The quantised layer of a convolution or a linear layer."""
    if isinstance(m, nn.Conv2d):
        return QuantConv2d.from_float(m, settings)
    assert isinstance(m, nn.Linear)
    return QuantLinear.from_float(m, settings)


@torch.no_grad()
def _adopt(layer: QuantConv2d | QuantLinear, m: nn.Conv2d | nn.Linear, settings: QuantSettings) -> None:
    layer.weight = nn.Parameter(m.weight.detach().clone(), requires_grad=m.weight.requires_grad)
    if m.bias is not None:
        layer.bias = nn.Parameter(m.bias.detach().clone(), requires_grad=m.bias.requires_grad)
    layer.train(m.training)
    layer.setup(settings)


def _sample(x: Tensor, signed: bool) -> Tensor:
    """A sample of |x| (signed) or x."""
    values = spread(x.detach().reshape(-1), 2**16).float()
    return values.abs() if signed else values
