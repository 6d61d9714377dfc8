"""Layers of a fixed-bit network that quantise their weights together, in a few launches, where launches are dear.

Nobody else sees it: a layer asks for its codes in its forward pass, the first one to ask gets those of all made, and
each takes its own once. So a pass never meets codes of another pass's weights.
"""

from collections.abc import Sequence

import torch
from torch import nn

from sbs.constants import constant
from sbs.layers import LayerContext, QuantizedLayer, units
from sbs.quantizer import codes_type
from sbs.weights import moments, weight_codes

_LAUNCHING = ("cuda",)
"""Devices where a launch takes as long as a layer's arithmetic."""


class Siblings:
    """The layers, and codes that have been made and not been asked for."""

    def __init__(self, layers: Sequence[QuantizedLayer]) -> None:
        self.layers = list(layers)
        self._waiting: dict[int, LayerContext] = {}
        self._made_for: tuple[object, ...] = ()

    def __reduce__(self) -> tuple[type[None], tuple[()]]:
        """A copy of a layer is alone until its network's next after_step."""
        return type(None), ()

    def context(self, layer: QuantizedLayer) -> LayerContext:
        """Codes of `layer` as its weight is now, for one pass; without, where layers have gone apart since."""
        # a replica of a layer is none of them
        if all(layer is not one for one in self.layers) or not _alike(self.layers):
            return LayerContext()
        now = self._now()
        if id(layer) not in self._waiting or now != self._made_for:
            self._waiting, self._made_for = self._make(), now
        return self._waiting.pop(id(layer))

    def forget(self) -> None:
        """Drop what nobody has asked for."""
        self._waiting.clear()

    def _now(self) -> tuple[object, ...]:
        """What tells whether weights and clips are still those of a moment ago, and wanted in the same type."""
        read = [t for m in self.layers for t in (m.weight, m.weight_clip, m.activation_clip)]
        kind = read[0].device.type
        captures = kind == "cuda" and torch.cuda.is_current_stream_capturing()
        autocast = torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind)
        return (captures, autocast, torch.is_inference_mode_enabled(), *((t._version, t.data_ptr()) for t in read))  # noqa: SLF001

    def _make(self) -> dict[int, LayerContext]:
        layers = self.layers
        weights, clips = [m.weight for m in layers], [m.weight_clip for m in layers]
        like = weights[0]
        steps = [
            torch.stack([getattr(m, f"_{side}_levels") for m in layers])
            if (sent := constant(tuple(m.steps(side) for m in layers), like.dtype, like.device)) is None
            else sent
            for side in ("weight", "activation")
        ]
        most = max(m.settings.weight_bits[-1] for m in layers)
        made = weight_codes(weights, clips, steps[0], moments(weights), codes_type(like, most))
        pairs = zip(layers, made, units(layers, made, steps[1]), strict=True)
        return {id(layer): LayerContext(weight=codes, units=own) for layer, codes, own in pairs}


def gather(net: nn.Module) -> None:
    """Bring the fixed-bit layers of `net` together, and drop the codes of the step that is over."""
    found = [m for m in net.modules() if isinstance(m, QuantizedLayer) and m.quantizes_weight and not m.chooses]
    layers = [m for m in found if m.given_codes() is None]
    together = _alike(layers) and layers[0].weight.device.type in _LAUNCHING
    own = layers[0].siblings if together else None
    if together and (own is None or [*map(id, own.layers)] != [*map(id, layers)]):
        own = Siblings(layers)
    for layer in layers:
        layer.siblings = own
    if own is not None:
        own.forget()


def _alike(layers: Sequence[QuantizedLayer]) -> bool:
    return len({(m.weight.device, m.weight.dtype) for m in layers}) == 1
