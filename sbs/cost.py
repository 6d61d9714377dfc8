"""Bit-operations, MACs, parameters and bytes of a network under a policy: pure arithmetic over the graph.

    mac_product  BOPs(layer) = MACs * b_w * b_a                                   full precision = 32 x 32
    uniq         BOPs(layer) = MACs * (b_w * b_a + b_w + b_a + log2(fan-in))      Baskin et al., UNIQ
MACs count kept input and output channels; biases, norms and activations are not counted. Every convolution and linear
layer counts, the first and the last included.
"""

import math
from dataclasses import dataclass

import torch
from torch import nn

from sbs.convert import policy_of
from sbs.errors import SbsError
from sbs.graph import LayerInfo, NetworkGraph, analyze
from sbs.modules import first_parameter, unwrapped
from sbs.policy import Policy
from sbs.space import FULL_PRECISION_BITS
from sbs.supernet import SuperNet

CONVENTIONS = ("mac_product", "uniq")
FLOAT_BYTES = 4


@dataclass(frozen=True)
class LayerCost:
    """One layer's configuration and cost; macs and bops are for one image."""

    name: str
    kind: str
    weight_bits: int
    activation_bits: int
    in_channels: int
    out_channels: int
    kept_in: int
    kept_out: int
    macs: int
    bops: float
    params: int
    bytes: int
    edge: bool


@dataclass(frozen=True)
class CostReport:
    """Cost of one network for one image: totals and layers. bytes: packed weight codes, the rest in float32."""

    macs: int
    bops: float
    params: int
    bytes: int
    layers: tuple[LayerCost, ...]
    convention: str

    @property
    def gbops(self) -> float:
        """BOPs in units of 1e9."""
        return self.bops / 1e9

    @property
    def mean_weight_bits(self) -> float:
        """MAC-weighted mean over the searched layers (all but the first and the last)."""
        return self._mean_bits([layer.weight_bits for layer in self.layers])

    @property
    def mean_activation_bits(self) -> float:
        """MAC-weighted mean over the searched layers (all but the first and the last)."""
        return self._mean_bits([layer.activation_bits for layer in self.layers])

    @property
    def pruned_share(self) -> float:
        """Share of output channels removed, over all layers but the classifier (whose outputs are the classes)."""
        total = sum(layer.out_channels for layer in self.layers[:-1])
        kept = sum(layer.kept_out for layer in self.layers[:-1])
        return 1 - kept / total if total else 0.0

    def _mean_bits(self, bits: list[int]) -> float:
        macs = [0 if layer.edge else layer.macs for layer in self.layers]
        if not any(macs):
            macs = [layer.macs for layer in self.layers]
        return sum(b * m for b, m in zip(bits, macs, strict=True)) / sum(macs)


def check_convention(convention: str) -> str:
    """Return a known convention; raise SbsError otherwise."""
    if convention not in CONVENTIONS:
        raise SbsError(f"BOP convention {convention!r} is unknown; known conventions: {', '.join(CONVENTIONS)}")
    return convention


def layer_macs(info: LayerInfo, kept_in: int, kept_out: int) -> int:
    """Multiply-accumulates of one layer for one image."""
    per_output = 1 if info.kind == "depthwise" else kept_in // info.groups
    return info.positions * info.kernel_area * per_output * kept_out


def layer_bops(macs: int, fan_in: int, weight_bits: int, activation_bits: int, convention: str) -> float:
    """Bit-operations of `macs` multiply-accumulates; fan_in = input channels / groups * kernel area (uniq alone)."""
    product = weight_bits * activation_bits
    if convention == "mac_product":
        return float(macs * product)
    return macs * (product + weight_bits + activation_bits + math.log2(fan_in))


def cost(
    net_or_model: nn.Module,
    input_shape: tuple[int, ...],
    policy: "Policy | None" = None,
    convention: str = "mac_product",
) -> CostReport:
    """Cost of a float model (under `policy`, else 32 x 32), a super-network as it stands, or a compressed network.

    input_shape: (C, H, W) of one image. A compressed network is counted as it is: it does not know what was pruned, so
    pruned_share and the original channels come from cost(model, input_shape, policy). Raises SbsError for an unknown
    convention or a policy of another network.
    """
    check_convention(convention)
    net_or_model = unwrapped(net_or_model)
    graph = trace(net_or_model, input_shape)
    policy = policy_of(net_or_model, graph) if policy is None else policy.checked(graph)
    return cost_of(graph, policy, _others(net_or_model, graph), convention)


def trace(net_or_model: nn.Module, input_shape: tuple[int, ...]) -> NetworkGraph:
    """The graph of any network of ours for images of `input_shape` (C, H, W)."""
    sizes = input_shape if isinstance(input_shape, tuple | list | torch.Size) else ()
    if len(sizes) not in (1, 3) or not all(type(n) is int and n > 0 for n in sizes):
        raise SbsError(f"input_shape={input_shape!r}: give (channels, height, width) of one image, as (3, 224, 224)")
    parameter = first_parameter(net_or_model)
    image = torch.zeros(1, *input_shape, device=parameter.device, dtype=parameter.dtype)
    return net_or_model.graph_for(image) if isinstance(net_or_model, SuperNet) else analyze(net_or_model, image)


@dataclass(frozen=True)
class OtherTensor:
    """A parameter or buffer that is no layer's, most often a norm's, in numbers.

    group: index of the ChannelGroup that a norm belongs to, and then the numbers are those of one channel; else None.
    """

    group: int | None
    numbers: int
    parameter: bool


def _others(net: nn.Module, graph: NetworkGraph) -> tuple[OtherTensor, ...]:
    """Those that the network uses and saves, each once though two modules may hold it; of buffers those of floats."""
    model = net.model if isinstance(net, SuperNet) else net
    group_of = {norm: i for i, g in enumerate(graph.groups) for norm in g.norms}
    parameters, buffers = dict(model.named_parameters(remove_duplicate=False)), dict(model.named_buffers())
    saved = model.state_dict()
    found: dict[int, OtherTensor] = {}
    for name in graph.others:
        tensor = parameters.get(name, buffers.get(name))
        if tensor is None or name not in saved or not (name in parameters or tensor.is_floating_point()):
            continue
        group = group_of.get(name.rpartition(".")[0])
        channels = 1 if group is None else graph.groups[group].channels
        found.setdefault(id(tensor), OtherTensor(group, tensor.numel() // channels, name in parameters))
    return tuple(found.values())


def cost_of(graph: NetworkGraph, policy: Policy, others: tuple[OtherTensor, ...], convention: str) -> CostReport:
    """The pure part of `cost`: a graph, a policy that belongs to it, and the tensors that are no layer's."""
    layers = tuple(_layer_cost(graph, info, policy, convention) for info in graph.layers)
    kept = [len(policy.kept_channels(graph, i)) for i in range(len(graph.groups))]
    numbers = [each.numbers * (1 if each.group is None else kept[each.group]) for each in others]
    parameters = sum(n for n, each in zip(numbers, others, strict=True) if each.parameter)
    return CostReport(
        macs=sum(layer.macs for layer in layers),
        bops=sum(layer.bops for layer in layers),
        params=sum(layer.params for layer in layers) + parameters,
        bytes=sum(layer.bytes for layer in layers) + FLOAT_BYTES * sum(numbers),
        layers=layers,
        convention=convention,
    )


def _layer_cost(graph: NetworkGraph, info: LayerInfo, policy: Policy, convention: str) -> LayerCost:
    choice = policy.layer(info.name)
    kept_out = info.out_channels if info.group is None else len(policy.kept_channels(graph, info.group))
    kept_in = info.in_channels
    if info.kind == "depthwise":
        kept_in = kept_out
    elif info.source is not None:
        kept_in = len(policy.kept_channels(graph, info.source)) * info.repeat
    macs = layer_macs(info, kept_in, kept_out)
    per_output = 1 if info.kind == "depthwise" else kept_in // info.groups
    fan_in = per_output * info.kernel_area
    weights = fan_in * kept_out
    biases = kept_out if info.bias else 0
    packed = math.ceil(weights * choice.weight_bits / 8)
    # a scale for a quantised weight and one for a quantised input
    scales = sum(bits != FULL_PRECISION_BITS for bits in (choice.weight_bits, choice.activation_bits))
    return LayerCost(
        name=info.name,
        kind=info.kind,
        weight_bits=choice.weight_bits,
        activation_bits=choice.activation_bits,
        in_channels=info.in_channels,
        out_channels=info.out_channels,
        kept_in=kept_in,
        kept_out=kept_out,
        macs=macs,
        bops=layer_bops(macs, fan_in, choice.weight_bits, choice.activation_bits, convention),
        params=weights + biases,
        bytes=packed + FLOAT_BYTES * (biases + scales),
        edge=info.edge,
    )
