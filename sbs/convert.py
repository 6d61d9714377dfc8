"""From a super-network to a policy, and from a policy to a plain fixed-bit network without its pruned channels."""

import copy
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from sbs.absorb import restore
from sbs.calibrate import calibrate
from sbs.errors import SbsError
from sbs.gates import selected
from sbs.graph import NORMS, NetworkGraph, analyze
from sbs.layers import QuantizedLayer, QuantSettings, check_own_weights, from_float
from sbs.modules import first_parameter, put, unwrapped
from sbs.policy import Policy
from sbs.space import FULL_PRECISION_BITS
from sbs.supernet import SuperNet, supernet_of
from sbs.tracing import check_calls, check_unhooked


def freeze(net: SuperNet) -> Policy:
    """The policy that the super-network's gates stand for now (what it computes in evaluation)."""
    net = supernet_of(net, "freeze")
    rows = {name: i for i, name in enumerate(net.searched)}
    weight = selected(net.weight_gates.decided()).tolist()
    activation = selected(net.activation_gates.decided()).tolist()
    channels = net.channel_gates_of(net.channel_gates.decided()) if net.group_slices else []
    bits, kept = {}, {}
    for info in net.graph.layers:
        bits[info.name] = (net.space.first_last_bits,) * 2
        if info.name in rows:
            row = rows[info.name]
            bits[info.name] = (net.space.weight_bits[weight[row]], net.space.activation_bits[activation[row]])
        if info.group is not None and channels and bool((channels[info.group] == 0).any()):
            kept[info.name] = tuple(int(c) for c in channels[info.group].nonzero().squeeze(1))
    return Policy.of(type(net.model).__name__, net.graph, bits, kept)


def policy_of(net: nn.Module, graph: NetworkGraph) -> Policy:
    """The policy that a network embodies now: super-network (its open gates), compressed or float network."""
    if isinstance(net, SuperNet):
        return freeze(net)
    bits = {}
    for info in graph.layers:
        layer = net.get_submodule(info.name)
        bits[info.name] = (FULL_PRECISION_BITS, FULL_PRECISION_BITS)
        if isinstance(layer, QuantizedLayer):
            bits[info.name] = (layer.settings.weight_bits[-1], layer.settings.activation_bits[-1])
    return Policy.of(type(net).__name__, graph, bits)


def compress(
    net_or_model: nn.Module,
    policy: Policy,
    *,
    example_input: Tensor | None = None,
    calibration: Iterable[Tensor] | None = None,
) -> nn.Module:
    """A plain network with the policy's bits, pruned channels physically removed; still trainable.

    From a super-network the clips come along and the logits in evaluation are the same. From a float model the clips
    are unset until `calibration` batches are given or a state dict is loaded. example_input: (N, C, H, W), by default
    of the policy's input_shape. Raises SbsError for a policy of another network.
    """
    if not isinstance(policy, Policy):
        raise SbsError(f"compress() takes a Policy, not {policy!r}: Policy.load() reads one from a file")
    net_or_model = unwrapped(net_or_model)
    if isinstance(net_or_model, SuperNet):
        model, graph = net_or_model.model, net_or_model.graph
    else:
        model = net_or_model
        check_own_weights(model)
        parameter = first_parameter(model)
        if example_input is None:
            example_input = torch.zeros(1, *policy.input_shape, device=parameter.device, dtype=parameter.dtype)
        graph = analyze(model, example_input)
    policy.checked(graph)
    names = [info.name for info in graph.layers]
    check_unhooked(model, names)
    result = copy.deepcopy(model)
    restore(result)
    kept = [_index(policy, graph, i) for i in range(len(graph.groups))]
    for info, rows, columns in graph.kept(kept):
        choice = policy.layer(info.name)
        source = result.get_submodule(info.name)
        assert isinstance(source, nn.Conv2d | nn.Linear)
        settings = QuantSettings((choice.weight_bits,), (choice.activation_bits,), info.signed, info.image)
        put(result, info.name, _fixed_layer(source, settings, rows, columns))
    check_calls(result, names)
    for group, channels in zip(graph.groups, kept, strict=True):
        for norm in group.norms:
            _slice_norm(result.get_submodule(norm), channels)
    if calibration is not None:
        calibrate(result, calibration)
    return result


def _index(policy: Policy, graph: NetworkGraph, group: int) -> Tensor | None:
    channels = policy.kept_channels(graph, group)
    return None if len(channels) == graph.groups[group].channels else torch.tensor(channels)


@torch.no_grad()
def _fixed_layer(
    source: nn.Conv2d | nn.Linear, settings: QuantSettings, rows: Tensor | None, columns: Tensor | None
) -> nn.Module:
    layer = _slice_layer(source, rows, columns)
    if settings.weight_bits == settings.activation_bits == (FULL_PRECISION_BITS,):
        return layer
    fixed = from_float(layer, settings)
    if isinstance(source, QuantizedLayer):
        for name in ("weight_clip", "activation_clip", "weight_clip_floor", "activation_clip_floor"):
            ours, theirs = getattr(fixed, name), getattr(source, name)
            ours.copy_(theirs)
            if isinstance(ours, nn.Parameter) and isinstance(theirs, nn.Parameter):
                ours.requires_grad_(theirs.requires_grad)
    return fixed


@torch.no_grad()
def _slice_layer(m: nn.Conv2d | nn.Linear, rows: Tensor | None, columns: Tensor | None) -> nn.Conv2d | nn.Linear:
    """A float layer with the kept rows and columns of `m`."""
    weight, bias = m.weight.detach(), None if m.bias is None else m.bias.detach()
    if rows is not None:
        rows = rows.to(weight.device)
        weight, bias = weight[rows], None if bias is None else bias[rows]
    if columns is not None:
        weight = weight[:, columns.to(weight.device)]
    options = {"device": weight.device, "dtype": weight.dtype}
    layer: nn.Conv2d | nn.Linear
    if isinstance(m, nn.Conv2d):
        groups = weight.shape[0] if m.groups > 1 and m.groups == m.in_channels == m.out_channels else m.groups
        layer = nn.Conv2d(
            weight.shape[1] * groups,
            weight.shape[0],
            m.kernel_size,  # type: ignore[arg-type]
            m.stride,  # type: ignore[arg-type]
            m.padding,  # type: ignore[arg-type]
            m.dilation,  # type: ignore[arg-type]
            groups,
            bias is not None,
            **options,  # type: ignore[arg-type]
        )
    else:
        layer = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, **options)
    layer.weight = nn.Parameter(weight.clone(), requires_grad=m.weight.requires_grad)
    if m.bias is not None and bias is not None:
        layer.bias = nn.Parameter(bias.clone(), requires_grad=m.bias.requires_grad)
    layer.train(m.training)
    return layer


@torch.no_grad()
def _slice_norm(norm: nn.Module, rows: Tensor | None) -> None:
    assert isinstance(norm, NORMS)
    if rows is None:
        return
    rows = rows.to(norm.weight.device if norm.affine else torch.device("cpu"))
    norm.num_features = len(rows)
    if norm.affine:
        for name in ("weight", "bias"):
            whole = getattr(norm, name)
            setattr(norm, name, nn.Parameter(whole.detach()[rows], requires_grad=whole.requires_grad))
    if norm.track_running_stats:
        norm.running_mean, norm.running_var = norm.running_mean[rows], norm.running_var[rows]  # type: ignore[index]
