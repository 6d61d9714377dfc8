"""Where the channel gates of a layer's rows and columns lie in one vector: masks of its weight are views of that."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sbs.graph import NetworkGraph
from sbs.weights import Masks

Span = tuple[int, int]


@dataclass(frozen=True)
class KeptPlaces:
    """index: the gate of every entry of the vector, first every group's channels, then those that layers repeat.

    spans: by layer, of its rows and of its columns; None where no gate touches them.
    """

    index: Tensor
    spans: dict[str, tuple[Span | None, Span | None]]

    @classmethod
    def of(cls, graph: NetworkGraph, gates: Sequence[Tensor]) -> "KeptPlaces":
        """gates: of every group, the gate of each of its channels; none where nothing is pruned."""
        ends = [0, *itertools.accumulate(map(len, gates))]
        index, spans = [torch.zeros(0, dtype=torch.int64), *gates], {}
        for info in graph.layers if gates else ():
            rows = None if info.group is None else (ends[info.group], ends[info.group + 1])
            columns = None
            if info.source is not None and info.kind != "depthwise":
                columns = (ends[info.source], ends[info.source + 1])
                if info.repeat > 1:
                    start = sum(map(len, index))
                    index.append(gates[info.source].repeat_interleave(info.repeat))
                    columns = (start, start + len(index[-1]))
            spans[info.name] = (rows, columns)
        return cls(torch.cat(index), spans)

    def masks(self, kept: Tensor, name: str, dims: int) -> Masks:
        """Of a layer's weight with so many dimensions; views of `kept`."""
        rows, columns = self.spans[name]
        own = [] if rows is None else [kept[slice(*rows)].view(-1, *[1] * (dims - 1))]
        if columns is not None:
            own.append(kept[slice(*columns)].view(1, -1, *[1] * (dims - 2)))
        return tuple(own)
