"""What the method needs to know of a network's graph: layers, tied channels, where values can be negative.

The network is traced with torch.fx; nothing of it is changed. Channels that only reach convolutions and linear layers
(through element-wise operations, pooling and flattening) form a prunable group; a depth-wise convolution joins the
group of its producer; channels that reach an addition, a group norm or the output stay (SBS, section 3.2).
"""

import operator
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from sbs.errors import SbsError
from sbs.sizes import sizes
from sbs.tracing import NORMS, SUPPORTED, check_conv, check_plain, read_by_idle_modules, tensors_besides, trace

_NONNEGATIVE = (nn.ReLU, nn.ReLU6, nn.Sigmoid, nn.Hardsigmoid)
_SIGNED = (nn.LeakyReLU, nn.GELU, nn.SiLU, nn.Hardswish, nn.ELU, nn.Tanh, nn.PReLU)
_POOLS = (nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d)
_TRANSPARENT = (nn.Dropout, nn.Dropout2d, nn.Identity, nn.Flatten, *_POOLS)
_MIXING = (nn.GroupNorm,)
# the same memory comes out that goes in
_ALIASES = (nn.Identity, nn.Flatten, nn.Dropout, nn.Dropout2d)
_NONNEGATIVE_CALLS = {torch.relu, F.relu, F.relu6, torch.sigmoid, F.sigmoid, "relu", "relu_", "sigmoid"}
_SIGNED_CALLS = {F.leaky_relu, F.gelu, F.silu, F.hardswish, F.elu, torch.tanh, "tanh"}
_POOL_CALLS = {F.max_pool2d, F.avg_pool2d, F.adaptive_avg_pool2d, F.adaptive_max_pool2d, "boolean_dispatch"}
_RESHAPES = {torch.flatten, "flatten", "view", "reshape", "contiguous", torch.reshape}
_TRANSPARENT_CALLS = {F.dropout, F.dropout2d, *_POOL_CALLS, *_RESHAPES}
_ADDS = {operator.add, operator.iadd, torch.add, "add", "add_"}
_ADDS_IN_PLACE = {operator.iadd, "add_"}
_PRODUCTS = {operator.mul, torch.mul, "mul"}
_MEANS = {torch.mean, "mean"}
_SHAPE_CALLS = {"size", "dim", getattr, operator.getitem, operator.floordiv}


@dataclass(frozen=True)
class LayerInfo:
    """One convolution or linear layer; sizes are those of the unpruned network.

    kind: "conv", "depthwise", "grouped" or "linear". positions: output height x width (1 for linear).
    signed: the input can be negative. source: index of the channel group that feeds it, None if its inputs stay;
    repeat: input features per channel of that group (flattened maps). group: index of the group its outputs form.
    window: "linear", or a convolution's kernel and what of it is not the usual, as "3x3 stride 2". edge: first or last.
    """

    name: str
    kind: str
    in_channels: int
    out_channels: int
    window: str
    kernel_area: int
    groups: int
    positions: int
    bias: bool
    signed: bool
    image: bool
    edge: bool
    last: bool
    source: int | None
    repeat: int
    group: int | None


@dataclass(frozen=True)
class ChannelGroup:
    """Channels that are pruned together: the producing layer, depth-wise followers, norms, and the consumers."""

    root: str
    channels: int
    followers: tuple[str, ...]
    norms: tuple[str, ...]
    consumers: tuple[str, ...]


@dataclass(frozen=True)
class NetworkGraph:
    """Layers in order of execution, prunable channel groups, and the input's shape without the batch (C, H, W).

    others: names of the parameters and buffers that evaluation uses besides those of the layers.
    """

    layers: tuple[LayerInfo, ...]
    groups: tuple[ChannelGroup, ...]
    input_shape: tuple[int, ...]
    others: tuple[str, ...]

    def layer(self, name: str) -> LayerInfo:
        """The layer of that name; KeyError if there is none."""
        return next(layer for layer in self.layers if layer.name == name)

    def kept(self, channels: Sequence[Tensor | None]) -> Iterator[tuple[LayerInfo, Tensor | None, Tensor | None]]:
        """Every layer with the rows and the columns of its weight that stay; None for all of them.

        channels: indices of the kept channels of every group, None where all are kept; on the CPU.
        """
        for info in self.layers:
            rows = None if info.group is None else channels[info.group]
            columns = None if info.source is None or info.kind == "depthwise" else channels[info.source]
            if columns is not None and info.repeat > 1:
                columns = (columns.unsqueeze(1) * info.repeat + torch.arange(info.repeat)).reshape(-1)
            yield info, rows, columns


def analyze(model: nn.Module, example_input: Tensor) -> NetworkGraph:
    """Trace `model` on `example_input` (N, C, H, W) and return its graph.

    Raises SbsError naming the module or operation that cannot be handled, and why.
    """
    if not isinstance(example_input, Tensor) or example_input.dim() not in (2, 4):
        given = tuple(example_input.shape) if isinstance(example_input, Tensor) else example_input
        raise SbsError(f"example_input is {given!r}: give a batch of images, a tensor (N, C, H, W)")
    if isinstance(model, nn.Conv2d | nn.Linear):
        raise SbsError(f"the network is a lone {type(model).__name__}: put it in an nn.Sequential")
    parameter = next(model.parameters(), None)
    if parameter is not None:
        example_input = example_input.to(parameter.device, parameter.dtype)
    return _Analysis(model, example_input).result()


class _Analysis:
    """One walk over a traced graph; `result` is what is kept of it."""

    def __init__(self, model: nn.Module, example_input: Tensor) -> None:
        self.input_shape = tuple(example_input.shape[1:])
        self.traced = trace(model, example_input)
        self.modules = dict(self.traced.named_modules())
        self.nodes = [n for n in self.traced.graph.nodes if self._is_tensor(n)]
        for node in self.nodes:
            self._check(node)
        self.layer_nodes = {str(n.target): n for n in self.nodes if self._is_layer(n)}
        self._check_calls()
        if not self.layer_nodes:
            raise SbsError(f"{type(model).__name__} has no Conv2d or Linear layer: there is nothing to compress")
        self.held = read_by_idle_modules(model, {str(n.target) for n in self.nodes if n.op == "call_module"})

    def _is_tensor(self, node: fx.Node) -> bool:
        if "shape" not in node.meta or node.op in ("output", "get_attr"):
            return False
        if node.meta["shape"] is None:
            what = f"module {node.target!r} ({type(m).__name__})" if (m := self._module(node)) else repr(node.target)
            raise SbsError(f"{what} returns several tensors, which is not supported: {SUPPORTED}")
        return True

    def _module(self, node: fx.Node) -> nn.Module | None:
        return self.modules[str(node.target)] if node.op == "call_module" else None

    def _is_layer(self, node: fx.Node) -> bool:
        return isinstance(self._module(node), nn.Conv2d | nn.Linear)

    @staticmethod
    def _shape(node: fx.Node) -> tuple[int, ...]:
        return tuple(node.meta["shape"])

    @staticmethod
    def _inputs(node: fx.Node) -> list[fx.Node]:
        return [n for n in node.all_input_nodes if "shape" in n.meta]

    # -- refusals

    def _check(self, node: fx.Node) -> None:
        m = self._module(node)
        if m is None:
            known = _NONNEGATIVE_CALLS | _SIGNED_CALLS | _TRANSPARENT_CALLS | _ADDS | _PRODUCTS | _MEANS | _SHAPE_CALLS
            if node.op != "placeholder" and self._call(node) not in known:
                raise SbsError(f"operation {node.name!r} ({node.target}) is not supported: {SUPPORTED}")
            return
        if not isinstance(m, (nn.Conv2d, nn.Linear, *NORMS, *_NONNEGATIVE, *_SIGNED, *_TRANSPARENT, *_MIXING)):
            raise SbsError(f"module {node.target!r} ({type(m).__name__}) is not supported: {SUPPORTED}")
        if isinstance(m, nn.Conv2d | nn.Linear):
            check_plain(str(node.target), m)
        if isinstance(m, nn.Conv2d):
            check_conv(str(node.target), m)
        if isinstance(m, nn.Linear) and len(self._shape(self._inputs(node)[0])) != 2:
            shape = self._shape(self._inputs(node)[0])
            raise SbsError(
                f"module {node.target!r} (Linear) gets an input of shape {shape}: flatten it to (N, features)"
            )

    def _check_calls(self) -> None:
        seen: set[str] = set()
        owner: dict[int, str] = {}
        for node in self.nodes:
            m = self._module(node)
            if m is None or not (isinstance(m, NORMS) or any(True for _ in m.parameters())):
                continue
            for parameter in m.parameters():
                first = owner.setdefault(id(parameter), str(node.target))
                if first != str(node.target):
                    raise SbsError(
                        f"modules {first!r} and {node.target!r} share a parameter: shared weights cannot have one "
                        "bit-width each; give each module its own"
                    )
            if str(node.target) in seen:
                raise SbsError(
                    f"module {node.target!r} ({type(m).__name__}) is called more than once in forward(): "
                    "what is shared between places cannot have one bit-width, or statistics, each; make them separate "
                    "modules"
                )
            seen.add(str(node.target))

    @staticmethod
    def _call(node: fx.Node) -> Callable[..., object] | str | None:
        """What a call node calls: a function, or the name of a tensor's method; None for any other node."""
        if node.op not in ("call_function", "call_method"):
            return None
        target = node.target
        # fx records max_pool2d as its boolean_dispatch wrapper, a closure of that name
        if callable(target) and getattr(target, "__qualname__", "").startswith("boolean_dispatch"):
            return "boolean_dispatch"
        return target

    # -- signs and edges

    def _nonnegative(self, node: fx.Node) -> bool:
        m, call = self._module(node), self._call(node)
        if len(node.users) > 1 and self._is_added_to(node):
            return False
        if isinstance(m, _NONNEGATIVE) or call in _NONNEGATIVE_CALLS:
            return True
        arithmetic = call in _ADDS | _PRODUCTS
        if arithmetic and any(v < 0 for v in (*node.args, *node.kwargs.values()) if isinstance(v, int | float)):
            return False  # a negative constant, or alpha
        if isinstance(m, _TRANSPARENT) or arithmetic or call in _TRANSPARENT_CALLS | _MEANS:
            return all(self._nonnegative(n) for n in self._inputs(node))
        return False

    def _is_added_to(self, node: fx.Node) -> bool:
        """Whether a sum is written into the node's memory, which others may read under the node's name."""
        aliases = [u for u in node.users if isinstance(self._module(u), _ALIASES) or self._call(u) in _RESHAPES]
        added = any(self._call(u) in _ADDS_IN_PLACE and u.args[0] is node for u in node.users)
        return added or any(self._is_added_to(u) for u in aliases)

    def _from_image(self, node: fx.Node, *, through: tuple[type[nn.Module], ...] = ()) -> bool:
        """Whether a tensor is the image but for operations without parameters, and modules of the types `through`."""
        if node.op == "placeholder":
            return True
        m = self._module(node)
        parametric = m is not None and not isinstance(m, through) and any(True for _ in m.parameters())
        return not parametric and all(self._from_image(n, through=through) for n in self._inputs(node))

    def _is_last(self, node: fx.Node) -> bool:
        """Whether a layer ends a path: its output is a result itself, or a summand of one that no other layer reads.

        Every block of a residual network without a classifier adds to the result; only the last one is an end.
        """
        if self._reaches_output(node, through_sums=False):
            return True
        return self._reaches_output(node, through_sums=True) and not self._feeds_a_layer(node)

    def _reaches_output(self, node: fx.Node, *, through_sums: bool) -> bool:
        for user in node.users:
            if user.op == "output":
                return True
            barrier = self._is_layer(user) or (not through_sums and len(self._inputs(user)) > 1)
            if not barrier and self._reaches_output(user, through_sums=through_sums):
                return True
        return False

    def _feeds_a_layer(self, node: fx.Node) -> bool:
        return any(self._is_tensor(u) and (self._is_layer(u) or self._feeds_a_layer(u)) for u in node.users)

    # -- channel groups

    def _follow(self, node: fx.Node, channels: int, found: "_Found", repeat: int = 1) -> None:
        """Walk on from a tensor of `channels` (each `repeat` features wide); sets found.stays at a barrier."""
        for user in node.users:
            m, call = self._module(user), self._call(user)
            if not self._is_tensor(user) and user.op != "output":
                continue  # x.size() and the like: what is made of it is a reshape, judged there
            if isinstance(m, nn.Conv2d) and m.groups > 1:
                if m.groups == m.in_channels == m.out_channels:
                    found.followers.append(str(user.target))
                    self._follow(user, channels, found, repeat)
                else:
                    found.stays = True
            elif isinstance(m, nn.Conv2d | nn.Linear):
                found.consumers[str(user.target)] = repeat
            elif isinstance(m, NORMS):
                found.norms.append((str(user.target), repeat))
                self._follow(user, channels, found, repeat)
            elif not self._keeps_channels(user) or (isinstance(m, nn.PReLU) and m.num_parameters > 1):
                found.stays = True
            else:
                shape = self._shape(user)
                features = shape[1] if len(shape) > 1 else 0
                flattened = isinstance(m, nn.Flatten) or call in _RESHAPES
                joined = len(shape) > 1 and shape[0] != self._shape(node)[0]  # images that become one
                if joined or features == 0 or features % channels or (not flattened and features != channels * repeat):
                    found.stays = True
                else:
                    self._follow(user, channels, found, features // channels)

    def _keeps_channels(self, node: fx.Node) -> bool:
        m, call = self._module(node), self._call(node)
        if m is not None:
            return isinstance(m, (*_NONNEGATIVE, *_SIGNED, *_TRANSPARENT))
        if call in _MEANS:
            return _is_spatial_mean(node)
        if call in {"view", "reshape", torch.reshape}:
            # sizes in figures would name the unpruned channel count
            return len(node.args) == 3 and bool(node.args[2] == -1)
        return call in _NONNEGATIVE_CALLS | _SIGNED_CALLS | _TRANSPARENT_CALLS | _MEANS

    def _groups(self) -> tuple[list[ChannelGroup], dict[str, tuple[int, int]], dict[str, int]]:
        groups: list[ChannelGroup] = []
        source: dict[str, tuple[int, int]] = {}
        member: dict[str, int] = {}
        for name, node in self.layer_nodes.items():
            m = self.modules[name]
            channels = m.out_channels if isinstance(m, nn.Conv2d) else int(m.out_features)
            if isinstance(m, nn.Conv2d) and m.groups > 1:
                continue
            found = _Found()
            self._follow(node, channels, found)
            # a norm over flattened maps would need its own repeat; no known network has one
            held = not self.held.isdisjoint((name, *found.followers))
            if held or found.stays or not found.consumers or any(r != 1 for _, r in found.norms):
                continue
            for layer in (name, *found.followers):
                member[layer] = len(groups)
            for layer, repeat in found.consumers.items():
                source[layer] = (len(groups), repeat)
            norms = tuple(n for n, _ in found.norms)
            groups.append(ChannelGroup(name, channels, tuple(found.followers), norms, tuple(found.consumers)))
        return groups, source, member

    def result(self) -> NetworkGraph:
        groups, source, member = self._groups()
        layers = []
        for name, node in self.layer_nodes.items():
            m = self.modules[name]
            before = self._inputs(node)[0]
            image, last = self._from_image(before), self._is_last(node)
            group, repeat = source.get(name, (None, 1))
            layers.append(
                LayerInfo(
                    name=name,
                    **sizes(m, self._shape(node)),
                    signed=not self._nonnegative(before),
                    image=image,
                    edge=self._from_image(before, through=NORMS) or last,
                    last=last,
                    source=group,
                    repeat=repeat,
                    group=member.get(name),
                )
            )
        others = tensors_besides(self.traced, set(self.layer_nodes))
        return NetworkGraph(tuple(layers), tuple(groups), self.input_shape, others)


class _Found:
    """What one walk from a producer met."""

    def __init__(self) -> None:
        self.stays = False
        self.followers: list[str] = []
        self.norms: list[tuple[str, int]] = []
        self.consumers: dict[str, int] = {}


def _is_spatial_mean(node: fx.Node) -> bool:
    """Whether a mean of an (N, C, H, W) tensor runs over H and W alone."""
    dims = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim")
    dims = dims if isinstance(dims, tuple | list) else (dims,)
    before = node.all_input_nodes[0].meta.get("shape")
    return before is not None and len(before) == 4 and all(d in {2, 3, -1, -2} for d in dims)
