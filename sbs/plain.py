"""A compressed network in ordinary torch operations alone: what `torch.export` and other graph tools can follow."""

import copy
from typing import Any

import torch
from torch import Tensor, nn

from sbs.errors import SbsError
from sbs.export import codes_of
from sbs.layers import QuantizedLayer
from sbs.modules import put, unwrapped
from sbs.space import levels
from sbs.supernet import SuperNet


class PlainLayer(nn.Module):
    """A convolution or linear layer on integer codes; the arithmetic of `QuantizedLayer` in evaluation, no gradients.

    Weights at 8 bits and below are kept as bytes k, their codes are 2k - n; the input is quantised as it comes in.
    """

    weight: Tensor
    weight_unit: Tensor
    activation_scale: Tensor
    bias: Tensor | None

    def __init__(self, layer: QuantizedLayer) -> None:
        super().__init__()
        settings = layer.settings
        self.signed = settings.signed
        self.activation_levels = levels(settings.activation_bits[0]) if layer.quantizes_activation else None
        self.weight_levels = levels(settings.weight_bits[0]) if layer.quantizes_weight else None
        weight = layer.weight.detach()
        unit = weight.new_ones(())
        if self.weight_levels is not None:
            scale, codes = codes_of(layer, settings.weight_bits[0])
            unit = scale.detach() / self.weight_levels
            weight = (codes.detach() + self.weight_levels) / 2
            weight = weight.to(torch.uint8 if settings.weight_bits[0] <= 8 else torch.int32)
        self.register_buffer("weight", weight.clone())
        self.register_buffer("weight_unit", unit.clone())
        self.register_buffer("activation_scale", layer.activation_clip.detach().clone())
        self.register_buffer("bias", None if layer.bias is None else layer.bias.detach().clone())
        self.convolution: tuple[Any, ...] | None = None
        if isinstance(layer, nn.Conv2d):
            self.convolution = (layer.stride, layer.padding, layer.dilation, layer.groups)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, O, H', W'), or (N, F) -> (N, O)."""
        weight = self.weight
        if self.weight_levels is not None:
            weight = 2 * weight.to(x.dtype) - self.weight_levels
        unit = x.new_ones(())
        if self.activation_levels is not None:
            x, unit = self._codes(x, self.activation_levels), self.activation_scale / self.activation_levels
        y = x @ weight.t() if self.convolution is None else torch.conv2d(x, weight, None, *self.convolution)
        y = y * (unit * self.weight_unit)
        return y if self.bias is None else y + self.bias.view(1, -1, *[1] * (y.dim() - 2))

    def _codes(self, x: Tensor, n: int) -> Tensor:
        value = x / self.activation_scale
        if not self.signed:
            return torch.round(value.clamp(0, 1) * n)
        return 2 * torch.round((value.clamp(-1, 1) + 1) * 0.5 * n) - n


@torch.no_grad()
def plain(net: nn.Module) -> nn.Module:
    """A copy of a compressed network (of `compress`) for inference whose logits are the same to the bit.

    No class of ours is left in its graph after torch.export. Raises SbsError for a super-network.
    """
    net = unwrapped(net)
    if isinstance(net, SuperNet):
        raise SbsError("a super-network has no plain form; freeze it and compress it first")
    result = copy.deepcopy(net)
    for name, layer in net.named_modules():
        if isinstance(layer, QuantizedLayer):
            put(result, name, PlainLayer(layer))
    return result.eval().requires_grad_(False)
