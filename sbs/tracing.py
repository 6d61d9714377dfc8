"""Tracing a network with torch.fx, and what of its modules is refused or warned of before anything is made of it."""

import contextlib
import copy
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, fx, nn

from sbs.errors import SbsError
from sbs.layers import AbsorbedReLU, QuantConv2d, QuantizedLayer, QuantLinear, is_hooked

NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.SyncBatchNorm)
SUPPORTED = (
    "networks are made of Conv2d, Linear, batch or group norm, element-wise activations, pooling, dropout, "
    "flatten, addition and multiplication. Replace it, or keep that part outside the compressed network"
)


class Tracer(fx.Tracer):
    """Takes layers, of torch or ours, as the leaves of the graph."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Whether the graph has one node for `m`."""
        return isinstance(m, nn.Conv2d | nn.Linear | AbsorbedReLU) or super().is_leaf_module(m, module_qualified_name)


class _Shapes(fx.Interpreter):
    """Leaves in the meta of every node the shape of its tensor, and of several tensors None."""

    extra_traceback = False

    def run_node(self, n: fx.Node) -> Any:
        """The node's result."""
        result = super().run_node(n)
        if isinstance(result, Tensor):
            n.meta["shape"] = tuple(result.shape)
        elif isinstance(result, tuple | list) and any(isinstance(part, Tensor) for part in result):
            n.meta["shape"] = None
        return result


def nodes_of(model: nn.Module) -> list[fx.Node]:
    """What forward() does in evaluation, in order. Raises whatever forward() raises when it is traced."""
    with _evaluating(model):
        return list(Tracer().trace(model).nodes)


def trace(model: nn.Module, example_input: Tensor) -> fx.GraphModule:
    """The traced network in evaluation mode, with the shape of every tensor; SbsError where that is not possible."""
    try:
        with _evaluating(model):
            traced = fx.GraphModule(model, Tracer().trace(model))
            with torch.no_grad():
                _Shapes(traced).run(example_input)
    except SbsError:
        raise
    except Exception as error:
        raise SbsError(
            f"{type(model).__name__} cannot be traced with torch.fx on an input of shape {tuple(example_input.shape)}: "
            f"{error}. The input must fit the network, and control flow that depends on values "
            "cannot be in forward()"
        ) from error
    return traced


@contextlib.contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """In evaluation mode, and back to each module's own."""
    training = {m: m.training for m in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for m, mode in training.items():
            m.training = mode


def check_unhooked(model: nn.Module, names: list[str]) -> None:
    """Refuse hooks on layers that are to be replaced: they may be part of what the network computes.

    Those on layers of ours, which come after a whole search, are but warned of: most only look.
    """
    for name in names:
        m = model.get_submodule(name)
        if not is_hooked(m) and not any(p._backward_hooks for p in m.parameters(recurse=False)):  # noqa: SLF001
            continue
        lost = f"module {name!r} ({type(m).__name__}) has hooks, which "
        if isinstance(m, QuantizedLayer):
            warnings.warn(lost + "the layer that takes its place does not have", stacklevel=3)
            continue
        raise SbsError(
            lost + "would be lost with it: remove them, and register them again on the layer that takes its place"
        )


def check_calls(model: nn.Module, names: list[str]) -> None:
    """Raise SbsError unless forward() calls the modules of these names, which took the place of others.

    It would not where it keeps the old ones in a list or a closure of its own.
    """
    try:
        called, reason = {node.target for node in nodes_of(model) if node.op == "call_module"}, ""
    except Exception as error:  # noqa: BLE001 - of forward(), which may be anybody's
        called, reason = set(), f" ({error})"
    missing = [repr(name) for name in names if name not in called]
    if missing:
        raise SbsError(
            f"{type(model).__name__}.forward() does not call its quantised {', '.join(missing[:4])} but what they took "
            f"the place of{reason}: keep layers in attributes or an nn.ModuleList, not in a plain list, dict or closure"
        )


_FORWARDS = {c.forward for c in (nn.Conv2d, nn.Linear, QuantConv2d, QuantLinear)}


def check_plain(name: str, m: nn.Conv2d | nn.Linear) -> None:
    """Refuse what replacing the module would lose: a forward() of its own, a reparametrised weight."""
    convolution = getattr(type(m), "_conv_forward", nn.Conv2d._conv_forward)  # noqa: SLF001
    if type(m).forward not in _FORWARDS or "forward" in vars(m) or convolution is not nn.Conv2d._conv_forward:  # noqa: SLF001
        raise SbsError(f"module {name!r} ({type(m).__name__}) has a forward() of its own: use a plain Conv2d or Linear")
    if "weight" not in m._parameters:  # noqa: SLF001  a parametrisation hides it there
        raise SbsError(
            f"module {name!r} ({type(m).__name__}) computes its weight (weight_norm or the like): remove that"
        )


def check_conv(name: str, m: nn.Conv2d) -> None:
    """Refuse paddings that the quantised convolution does not know."""
    if m.padding_mode != "zeros":
        raise SbsError(f"module {name!r} (Conv2d) pads with {m.padding_mode!r}: only zero padding is supported")
    if isinstance(m.padding, str):
        raise SbsError(f"module {name!r} (Conv2d) has padding={m.padding!r}: give the number of pixels instead")


def tensors_besides(traced: fx.GraphModule, layers: set[str]) -> tuple[str, ...]:
    """Names of the parameters and buffers that a traced network uses, each tensor once, without those of the layers."""
    names: list[str] = []
    for node in traced.graph.nodes:
        if node.op == "get_attr":
            names.append(str(node.target))
        elif node.op == "call_module" and node.target not in layers:
            m = traced.get_submodule(str(node.target))
            names += [f"{node.target}.{name}" for name, _ in (*m.named_parameters(), *m.named_buffers())]
    return tuple(dict.fromkeys(names))


def read_by_idle_modules(model: nn.Module, called: set[str]) -> set[str]:
    """Which of the `called` layers are read by layers or norms that evaluation does not call: their channels must stay.

    Not refused but warned of: a head that only training calls is no part of the network that will be used.
    """
    idle = {n: m for n, m in model.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear, *NORMS)) and n not in called}
    if not idle:
        return set()
    layers = [repr(n) for n, m in idle.items() if not isinstance(m, NORMS)]
    try:
        nodes = list(Tracer().trace(copy.deepcopy(model).train()).nodes)
    except Exception:  # noqa: BLE001 - control flow that cannot be followed, in training alone
        nodes = []
    if layers or not nodes:
        pruning = "" if nodes else ", and no channel is pruned, as forward() cannot be traced in training"
        warnings.warn(
            f"{type(model).__name__} does not call {', '.join(layers or map(repr, idle))} in evaluation: such layers "
            f"stay in full precision and are not counted{pruning}. If they are left over, delete them from the network",
            stacklevel=5,  # whoever called prepare()
        )
    sources = {name for name in called if isinstance(model.get_submodule(name), nn.Conv2d | nn.Linear)}
    return _read_by(nodes, set(idle), sources) if nodes else sources


def _read_by(nodes: list[fx.Node], readers: set[str], sources: set[str]) -> set[str]:
    """Names among `sources` that the readers see with no other of them between."""
    ahead = [n for node in nodes if node.op == "call_module" and node.target in readers for n in node.all_input_nodes]
    found, seen = set(), set(ahead)
    while ahead:
        node = ahead.pop()
        if node.op == "call_module" and node.target in sources:
            found.add(str(node.target))
            continue
        ahead += [n for n in node.all_input_nodes if n not in seen]
        seen.update(node.all_input_nodes)
    return found
