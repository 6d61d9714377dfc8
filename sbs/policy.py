"""A policy: bits and kept channels of every layer, as a versioned JSON document.

Written by hand it may be short: every layer's name, weight_bits and activation_bits; `kept`, a list of output channels,
only where channels go. `channels` and `window`, which tell the network apart, may be left out. Layers that the graph
ties to a pruned one (depth-wise followers, consumers) follow by themselves.
"""

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from types import MappingProxyType
from typing import Any

from torch import Tensor, nn

from sbs.errors import SbsError
from sbs.graph import LayerInfo, NetworkGraph, analyze
from sbs.modules import unwrapped
from sbs.space import EDGE_BITS, FULL_PRECISION_BITS, MAX_QUANTIZED_BITS

FORMAT = "sbs-policy"
VERSION = 1


@dataclass(frozen=True)
class LayerPolicy:
    """One layer's choice. kept: indices of the kept output channels in rising order, None for all of them.

    channels: output channels of the unpruned layer; window: "linear", or kernel, stride and so on, as "3x3 stride 2". A
    network whose layer differs is refused; None where nobody said, and for the classes of a last layer.
    """

    name: str
    weight_bits: int
    activation_bits: int
    kept: tuple[int, ...] | None = None
    channels: int | None = None
    window: str | None = None


@dataclass(frozen=True)
class Policy:
    """The configuration that a search found, or a person wrote: one LayerPolicy per layer in order of execution."""

    model: str
    input_shape: tuple[int, ...]
    layers: tuple[LayerPolicy, ...]

    def layer(self, name: str) -> LayerPolicy:
        """The choice for one layer; KeyError if the policy has none."""
        for layer in self.layers:
            if layer.name == name:
                return layer
        raise KeyError(name)

    def kept_channels(self, graph: NetworkGraph, group: int) -> tuple[int, ...]:
        """Kept channels of a ChannelGroup of `graph`."""
        info = graph.groups[group]
        kept = self.layer(info.root).kept
        return tuple(range(info.channels)) if kept is None else kept

    @classmethod
    def uniform(
        cls,
        model: nn.Module,
        example_input: Tensor,
        weight_bits: int,
        activation_bits: int,
        edge_bits: int | None = None,
    ) -> "Policy":
        """The same bits for every layer but the first and the last, which get `edge_bits`; nothing pruned.

        edge_bits is 8 by default, and 32 where weights and activations are to stay in full precision.
        """
        if edge_bits is None:
            full = weight_bits == activation_bits == FULL_PRECISION_BITS
            edge_bits = FULL_PRECISION_BITS if full else EDGE_BITS
        model = unwrapped(model)
        graph = analyze(model, example_input)
        bits = {i.name: (edge_bits,) * 2 if i.edge else (weight_bits, activation_bits) for i in graph.layers}
        return cls.of(type(model).__name__, graph, bits).checked(graph)

    @classmethod
    def of(
        cls,
        model: str,
        graph: NetworkGraph,
        bits: Mapping[str, tuple[int, int]],
        kept: Mapping[str, tuple[int, ...]] = MappingProxyType({}),
    ) -> "Policy":
        """Bits of weights and activations by layer, kept channels where some go, and what tells the network apart."""
        layers = tuple(
            LayerPolicy(
                info.name,
                *bits[info.name],
                kept=kept.get(info.name),
                channels=None if info.last else info.out_channels,  # one may search with other classes
                window=info.window,
            )
            for info in graph.layers
        )
        return cls(model, graph.input_shape, layers)

    def checked(self, graph: NetworkGraph) -> "Policy":
        """Return self if it belongs to `graph`; raise SbsError naming the first thing that does not fit."""
        ours, theirs = [i.name for i in graph.layers], [layer.name for layer in self.layers]
        doubled = sorted(name for name, count in Counter(theirs).items() if count > 1)
        if doubled:
            raise SbsError(f"the policy (of {self.model}) has more than one entry for {_some(doubled)}: leave one each")
        if sorted(ours) != sorted(theirs):
            missing, unknown = sorted(set(ours) - set(theirs)), sorted(set(theirs) - set(ours))
            raise SbsError(
                f"the policy (of {self.model}) is of another network: "
                f"layers without a policy: {_some(missing)}; layers that this network does not have: {_some(unknown)}"
            )
        if self.input_shape[:1] != graph.input_shape[:1]:
            raise SbsError(
                f"the policy (of {self.model}) is of another network: it is for inputs of {self.input_shape}, whose "
                f"channels come first; this network's are {graph.input_shape}"
            )
        for info in graph.layers:
            self._check_layer(graph, info)
        return self

    def _check_layer(self, graph: NetworkGraph, info: LayerInfo) -> None:
        choice = self.layer(info.name)
        for key in ("weight_bits", "activation_bits"):
            bits = getattr(choice, key)
            if type(bits) is not int or (bits != FULL_PRECISION_BITS and not 1 <= bits <= MAX_QUANTIZED_BITS):
                raise SbsError(
                    f"policy, layer {info.name!r}: {key}={bits!r}; "
                    f"use an int, 1 to {MAX_QUANTIZED_BITS}, or {FULL_PRECISION_BITS}"
                )
        if choice.channels not in (None, info.out_channels):
            raise SbsError(
                f"the policy (of {self.model}) is of another network: its layer {info.name!r} has {choice.channels} "
                f"output channels, this network's has {info.out_channels}"
            )
        if choice.window not in (None, info.window):
            raise SbsError(
                f"the policy (of {self.model}) is of another network: its layer {info.name!r} is {choice.window!r}, "
                f"this network's {info.window!r}"
            )
        if choice.kept is None:
            return
        if info.group is None:
            raise SbsError(
                f"policy, layer {info.name!r}: its channels cannot be pruned (they reach an addition or the output), "
                "but `kept` is given; remove it"
            )
        if not choice.kept or list(choice.kept) != sorted(set(choice.kept)):
            raise SbsError(f"policy, layer {info.name!r}: `kept` must be a non-empty list of rising channel indices")
        if choice.kept[0] < 0 or choice.kept[-1] >= info.out_channels:
            raise SbsError(
                f"policy, layer {info.name!r}: `kept` names channel {choice.kept[-1]}, "
                f"but the layer has {info.out_channels} (0 to {info.out_channels - 1})"
            )
        root = graph.groups[info.group].root
        if self.layer(root).kept != choice.kept:
            raise SbsError(
                f"policy, layer {info.name!r}: its channels follow {root!r}, but the two keep different ones"
            )

    def to_json(self) -> dict[str, Any]:
        """The document as plain data."""
        layers = [{k: v for k, v in asdict(layer).items() if v is not None} for layer in self.layers]
        for layer in layers:
            if "kept" in layer:
                layer["kept"] = list(layer["kept"])  # as it comes back from a file
        return {
            "format": FORMAT,
            "version": VERSION,
            "model": self.model,
            "input_shape": list(self.input_shape),
            "layers": layers,
        }

    @classmethod
    def from_json(cls, document: Any, where: str = "policy") -> "Policy":
        """A policy from plain data; SbsError names `where` and the key that is wrong."""
        if not isinstance(document, dict) or document.get("format") != FORMAT:
            raise SbsError(f'{where}: not a policy; the document starts with "format": "{FORMAT}"')
        if document.get("version") != VERSION:
            raise SbsError(
                f"{where}: policy version {document.get('version')!r} is not known; "
                f"this release reads version {VERSION}"
            )
        try:
            if not isinstance(document["layers"], list):
                raise TypeError("`layers` must be a list with one entry per layer")
            layers = tuple(_layer_from_json(entry) for entry in document["layers"])
            return cls(str(document["model"]), tuple(int(n) for n in document["input_shape"]), layers)
        except KeyError as error:
            raise SbsError(f"{where}: the key {error} is missing") from None
        except (TypeError, ValueError) as error:
            raise SbsError(f"{where}: {error}") from None

    def save(self, path: str | Path) -> None:
        """Write the JSON document."""
        Path(path).write_text(json.dumps(self.to_json(), indent=1) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> "Policy":
        """Read a JSON document; raises SbsError naming the file and what is wrong with it."""
        try:
            document = json.loads(Path(path).read_text())
        except OSError as error:
            raise SbsError(f"{path}: cannot be read: {error.strerror}") from None
        except ValueError as error:
            raise SbsError(f"{path}: not JSON: {error}") from None
        return cls.from_json(document, str(path))


def _layer_from_json(entry: dict[str, Any]) -> LayerPolicy:
    if not isinstance(entry, dict):
        raise TypeError(f"`layers`: {entry!r} is not a table with name, weight_bits and activation_bits")
    unknown = set(entry) - {field.name for field in fields(LayerPolicy)}
    if unknown:
        raise ValueError(f"layer {entry.get('name')!r}: unknown key {min(unknown)!r}")
    kept = entry.get("kept")
    if kept is not None and not (isinstance(kept, list) and all(type(c) is int for c in kept)):
        raise ValueError(f"layer {entry.get('name')!r}: `kept` must be a list of channel indices")
    whole = ["weight_bits", "activation_bits"]
    if entry.get("channels") is not None:
        whole.append("channels")
    for key in whole:
        if type(entry[key]) is not int:
            raise ValueError(f"layer {entry.get('name')!r}: {key}={entry[key]!r} is not a whole number")
    window = entry.get("window")
    if window is not None and not isinstance(window, str):
        raise ValueError(f"layer {entry.get('name')!r}: window={window!r} is not a text as '3x3 stride 2'")
    return LayerPolicy(
        str(entry["name"]),
        entry["weight_bits"],
        entry["activation_bits"],
        None if kept is None else tuple(kept),
        entry.get("channels"),
        window,
    )


def _some(names: list[str]) -> str:
    if not names:
        return "none"
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
