"""What a network does around its tensors, as a digest that two networks of the same structure share."""

import hashlib

import torch
from torch import fx, nn
from torch.nn import functional as F

from sbs.layers import QuantizedLayer
from sbs.tracing import NORMS, nodes_of

# nothing in evaluation
_ABSENT = (nn.Identity, nn.Dropout, nn.Dropout2d)
_RELUS = {nn.ReLU: "relu", torch.relu: "relu", F.relu: "relu", "relu": "relu", "relu_": "relu"}
_RELUS |= {nn.ReLU6: "relu6", F.relu6: "relu6"}


def structure(net: nn.Module) -> str:
    """Operations in order, what each reads, and its constants; sizes of weights are left out, and the kind of norm.

    Raises whatever forward() raises when torch.fx traces it.
    """
    numbers: dict[fx.Node, int] = {}
    described: list[tuple[object, ...]] = []
    for node in nodes_of(net):
        inputs = [numbers[n] for n in node.all_input_nodes]
        m = net.get_submodule(str(node.target)) if node.op == "call_module" else None
        if isinstance(m, _ABSENT):
            numbers[node] = inputs[0]
            continue
        numbers[node] = len(described)
        described.append((*(_call(node) if m is None else _module(m)), inputs))
    return hashlib.sha256(repr(described).encode()).hexdigest()[:16]


def _module(m: nn.Module) -> tuple[object, ...]:
    if isinstance(m, nn.Conv2d | nn.Linear):
        signed = m.settings.signed if isinstance(m, QuantizedLayer) else None
        geometry = (m.kernel_size, m.stride, m.padding, m.dilation, m.groups == 1) if isinstance(m, nn.Conv2d) else ()
        return ("layer", signed, geometry)
    if isinstance(m, NORMS):
        return ("norm", m.eps)
    if type(m) in _RELUS:
        return (_RELUS[type(m)], ())
    return (type(m).__name__, m.extra_repr())


def _call(node: fx.Node) -> tuple[object, ...]:
    if node.op in {"call_function", "call_method"}:
        if node.target in _RELUS:
            return (_RELUS[node.target], ())
        name = node.target if isinstance(node.target, str) else node.target.__name__
        given = fx.node.map_arg((node.args, node.kwargs), lambda _: None)
        return (name, repr(given))
    return (node.op, ())
