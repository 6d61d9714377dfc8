"""MACs of every layer as a differentiable function of the channel gates, for all layers in one expression."""

import itertools

import torch
from torch import Tensor, nn

from sbs.graph import NetworkGraph


class MacTable(nn.Module):
    """macs(layer) = constant * kept(output group) * kept(input group); index 0 of `kept` is the constant 1.

    group_sizes: channels of every channel gate; slices: the gates of each ChannelGroup. In float64, since MACs of a
    whole network do not fit the 24 bits of a float32 exactly.
    """

    constant: Tensor
    outputs: Tensor
    inputs: Tensor
    sizes: Tensor
    totals: Tensor
    owner: Tensor
    searched_index: Tensor

    def __init__(self, graph: NetworkGraph, group_sizes: Tensor, slices: tuple[tuple[int, int], ...]) -> None:
        super().__init__()
        constant: list[float] = []
        outputs: list[int] = []
        inputs: list[int] = []
        for info in graph.layers:
            out_index = 0 if info.group is None or not slices else info.group + 1
            in_index = 0 if info.source is None or info.kind == "depthwise" or not slices else info.source + 1
            factor = float(info.positions * info.kernel_area)
            if out_index == 0:
                factor *= info.out_channels
            if info.kind != "depthwise":
                factor *= info.repeat if in_index else info.in_channels
                factor /= info.groups
            constant.append(factor)
            outputs.append(out_index)
            inputs.append(in_index)
        rows = list(itertools.accumulate((not info.edge for info in graph.layers), initial=0))
        searched = [rows[-1] if info.edge else rows[i] for i, info in enumerate(graph.layers)]
        owner = [i for i, (start, stop) in enumerate(slices) for _ in range(stop - start)]
        self.groups = len(slices)
        self.register_buffer("constant", torch.tensor(constant, dtype=torch.float64), persistent=False)
        self.register_buffer("outputs", torch.tensor(outputs), persistent=False)
        self.register_buffer("inputs", torch.tensor(inputs), persistent=False)
        self.register_buffer("sizes", group_sizes.double(), persistent=False)
        totals = torch.tensor([float(group_sizes[start:stop].sum()) for start, stop in slices], dtype=torch.float64)
        self.register_buffer("totals", totals, persistent=False)
        self.register_buffer("owner", torch.tensor(owner, dtype=torch.int64), persistent=False)
        # row of each layer among the searched ones; first and last layers point behind the last row
        self.register_buffer("searched_index", torch.tensor(searched), persistent=False)

    def forward(self, channel_gates: Tensor) -> Tensor:
        """Gates of all groups (..., groups) -> MACs (..., layers), float64."""
        # net.float() and the like convert the buffers
        constant, kept = self.constant.double(), self._kept(channel_gates)
        kept = torch.cat([torch.ones_like(kept[..., :1].sum(-1, keepdim=True)), kept], dim=-1)
        return constant * kept[..., self.outputs] * kept[..., self.inputs]

    def shares(self, channel_gates: Tensor) -> Tensor:
        """Share of every ChannelGroup's channels that its gates leave open, (ChannelGroups,), in the gates' type."""
        return self._kept(channel_gates).to(channel_gates.dtype) / self.totals.to(channel_gates.dtype)

    def _kept(self, channel_gates: Tensor) -> Tensor:
        """Open channels of every ChannelGroup, (..., ChannelGroups), float64."""
        channels = channel_gates.double() * self.sizes.double()
        return channels.new_zeros(*channels.shape[:-1], self.groups).index_add(-1, self.owner, channels)
