"""What a convolution or linear layer is by itself: kind, channels, window."""

import math
from typing import Any

from torch import nn


def sizes(m: nn.Module, shape: tuple[int, ...]) -> dict[str, Any]:
    """What `LayerInfo` says of a layer's module alone; shape: of its output, (N, C, H, W) or (N, C)."""
    if isinstance(m, nn.Conv2d):
        depthwise = m.groups > 1 and m.groups == m.in_channels == m.out_channels
        kind = "depthwise" if depthwise else "grouped" if m.groups > 1 else "conv"
        return {
            "kind": kind,
            "in_channels": m.in_channels,
            "out_channels": m.out_channels,
            "window": _window(m, kind),
            "kernel_area": math.prod(m.kernel_size),
            "groups": m.groups,
            "positions": math.prod(shape[2:]),
            "bias": m.bias is not None,
        }
    assert isinstance(m, nn.Linear)
    return {
        "kind": "linear",
        "in_channels": m.in_features,
        "out_channels": m.out_features,
        "window": "linear",
        "kernel_area": 1,
        "groups": 1,
        "positions": 1,
        "bias": m.bias is not None,
    }


def _window(m: nn.Conv2d, kind: str) -> str:
    def sized(sizes: tuple[int, ...]) -> str:
        return "x".join(map(str, sizes if len(set(sizes)) > 1 else sizes[:1]))

    parts = ["x".join(map(str, m.kernel_size))]
    parts += [f"{what} {sized(n)}" for what, n in (("stride", m.stride), ("dilation", m.dilation)) if set(n) != {1}]
    padding = tuple(int(n) for n in m.padding)
    if padding != tuple(d * (k - 1) // 2 for d, k in zip(m.dilation, m.kernel_size, strict=True)):
        parts.append(f"padding {sized(padding)}")
    if kind != "conv":
        parts.append(kind if kind == "depthwise" else f"groups {m.groups}")
    return " ".join(parts)
