"""The super-network: every bit-width and every channel group of a search space in one set of weights."""

import copy
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from sbs.absorb import absorb, absorbable
from sbs.errors import SbsError
from sbs.gates import GateBank, selected
from sbs.graph import NetworkGraph, analyze
from sbs.joint import JointBank, joined
from sbs.kept import KeptPlaces
from sbs.kernels import GateMode
from sbs.layers import LayerContext, QuantizedLayer, check_own_weights, from_float, units
from sbs.mac_table import MacTable
from sbs.modules import first_parameter, put, unwrapped
from sbs.quantizer import codes_type
from sbs.settings import settings_of
from sbs.space import FULL_PRECISION_BITS, SearchSpace, describe, levels
from sbs.tracing import check_calls, check_unhooked
from sbs.weights import Snapshot, WeightCodes, moments, weight_codes


class SuperNet(nn.Module):
    """`model` with its convolutions and linear layers replaced, and the gate banks of the search.

    weight_gates, activation_gates: (searched layers, bit-widths - 1). channel_gates: all groups of all ChannelGroups
    in one vector. Layers that are not searched (first and last) have one bit-width and no gates.
    """

    def __init__(
        self, model: nn.Module, space: SearchSpace, graph: NetworkGraph, *, absorb_relus: bool = False
    ) -> None:
        super().__init__()
        self.training = model.training
        self.space, self.graph = space, graph
        self.model = copy.deepcopy(model)
        self._quantize(absorbable(self.model) if absorb_relus else {})
        named = dict(self.layers())
        self.searched = tuple(info.name for info in graph.layers if not info.edge)
        device = first_parameter(model).device
        rows = len(self.searched)
        self.weight_gates = GateBank(rows, len(space.weight_bits) - 1).to(device)
        self.activation_gates = GateBank(rows, len(space.activation_bits) - 1).to(device)
        self.group_slices = _slices(graph, space) if space.prune else ()
        total = self.group_slices[-1][1] if self.group_slices else 0
        self.channel_gates = GateBank(total).to(device)
        # images of the last step on all ranks, and steps of the search so far; dL/d(log BOPs) of the step, for the
        # gates of every bank
        self.register_buffer("images", torch.zeros((), dtype=torch.int64, device=device))
        self.register_buffer("steps_done", torch.zeros((), dtype=torch.int64, device=device))
        felt = [[1, 1, 1], [1, 0, 1], [0, 1, 1]]
        self.register_buffer("_felt", torch.tensor(felt, dtype=torch.float64, device=device), persistent=False)
        self.register_buffer("pressure", torch.zeros(3, dtype=torch.float64, device=device), persistent=False)
        self._index_channels(device)
        self.macs = MacTable(graph, self.group_sizes, self.group_slices).to(device)
        sizes = [group.channels for group in graph.groups] if self.group_slices else []
        self._kept_places = KeptPlaces.of(graph, self.channel_index.cpu().split(sizes) if sizes else ())
        self.register_buffer("kept_index", self._kept_places.index.to(device), persistent=False)
        self.register_buffer("kept_gates", torch.ones(len(self.kept_index), device=device), persistent=False)
        self._rows = {name: i for i, name in enumerate(self.searched)}
        edges = [info.name for info in graph.layers if info.edge]
        self.coded = tuple(name for name in (*self.searched, *edges) if named[name].quantizes_weight)
        self._kept_version: tuple[int, int] | None = None
        self._left_moments: tuple[Snapshot, tuple[Tensor, Tensor]] | None = None
        self._joint: list[JointBank | None] = [None]
        self._is_started = False
        self._passed = 0
        for side in ("weight", "activation"):
            bits = getattr(space, f"{side}_bits")
            steps = torch.tensor([float(levels(b)) for b in bits], device=device)
            self.register_buffer(f"_{side}_steps", steps, persistent=False)
        edge_steps = torch.full((len(edges),), float(levels(space.first_last_bits)), device=device)
        self.register_buffer("_edge_steps", edge_steps, persistent=False)
        self.register_load_state_dict_post_hook(_refresh_after_load)

    def _quantize(self, relus: dict[str, tuple[str, float]]) -> None:
        """Replace every layer by its quantised one; relus: those that layers can compute, and their limits."""
        names = [info.name for info in self.graph.layers]
        for info in self.graph.layers:
            layer = self.model.get_submodule(info.name)
            relu, limit = relus.get(info.name, (None, None))
            settings = settings_of(info, self.space, limit)
            if settings.activation_bits == (FULL_PRECISION_BITS,):
                settings = replace(settings, relu=None)
            elif relu is not None:
                absorb(self.model, relu)
            put(self.model, info.name, from_float(layer, settings))
        check_calls(self.model, names)

    def get_extra_state(self) -> Tensor:
        """The search space in figures, part of the state dict: gates of another space would fit in shape alone."""
        return torch.tensor(self.space.signature())

    def set_extra_state(self, state: Tensor) -> None:
        """Raise SbsError if the state dict is of another search space."""
        theirs = tuple(int(n) for n in state)
        if theirs != self.space.signature():
            raise SbsError(
                f"these weights are of a search over {describe(theirs)}; this super-network was prepared for "
                f"{describe(self.space.signature())}: prepare it with the space of the weights"
            )

    def _index_channels(self, device: torch.device) -> None:
        """Buffers that map channels to their group's gate, and gates to their ChannelGroup."""
        channel_index, sizes, layer_index = [], [], []
        for i, (start, stop) in enumerate(self.group_slices):
            channels = torch.arange(self.graph.groups[i].channels) // self.space.group_size
            channel_index.append(channels + start)
            sizes.append(channels.bincount())
            layer_index.append(torch.full((stop - start,), i))
        empty = torch.zeros(0, dtype=torch.int64)
        for name, parts in (("channel_index", channel_index), ("group_sizes", sizes), ("layer_index", layer_index)):
            self.register_buffer(name, torch.cat([empty, *parts]).to(device), persistent=False)
        # by gate: the first gate of its layer, and the fewest of that layer that stay open
        first = [torch.full((stop - start,), start) for start, stop in self.group_slices]
        least = [torch.full_like(f, len(f) - int(self.space.max_prune_share * len(f))) for f in first]
        self.register_buffer("first_gate", torch.cat([empty, *first]).to(device), persistent=False)
        self.register_buffer("least_open", torch.cat([empty, *least]).to(device), persistent=False)
        # channels of every gate, short groups filled up with the index behind the last channel
        index = self.channel_index.cpu()
        members = torch.full((len(self.group_sizes), self.space.group_size), len(index))
        for gate in range(len(members)):
            own = (index == gate).nonzero().squeeze(1)
            members[gate, : len(own)] = own
        self.register_buffer("group_members", members.to(device), persistent=False)

    def layers(self) -> Iterator[tuple[str, QuantizedLayer]]:
        """Name and module of every quantised layer, in order of execution."""
        for info in self.graph.layers:
            layer = self.model.get_submodule(info.name)
            assert isinstance(layer, QuantizedLayer)
            yield info.name, layer

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> logits, with the gates as they were decided after the last step."""
        self._warn_without_start()
        if self.training and torch.is_grad_enabled():
            self._passed += len(x)
        before = self._contexts()
        self._set_contexts()
        try:
            output: Tensor = self.model(x)
        finally:
            # kept until after_step, codes of weights among them, for activation checkpointing: it runs layers again in
            # the backward pass
            if not torch.is_grad_enabled() or torch.compiler.is_compiling():
                self._give_contexts(before)
        return output

    def _contexts(self) -> list[LayerContext | None]:
        return [layer.context for _, layer in self.layers()]

    def _give_contexts(self, contexts: Sequence[LayerContext | None]) -> None:
        for (_, layer), context in zip(self.layers(), contexts, strict=True):
            layer.context = context

    def _warn_without_start(self) -> None:
        if self._is_started or not self.training or not torch.is_grad_enabled() or torch.compiler.is_compiling():
            return
        self._is_started = True
        warnings.warn(
            "this super-network trains from clips of 1 and made-up gate statistics: call sbs.calibrate(net, batches) "
            "before the first step",
            stacklevel=5,  # whoever called the network
        )

    @torch.no_grad()
    def graph_for(self, image: Tensor) -> NetworkGraph:
        """The graph for images (1, C, H, W) of another size than the network was prepared with."""
        if tuple(image.shape[1:]) == self.graph.input_shape:
            return self.graph
        before = self._contexts()
        self._give_contexts([LayerContext()] * len(before))  # shapes need no gates
        try:
            return analyze(self.model, image)
        finally:
            self._give_contexts(before)

    def channel_gates_of(self, gates: Tensor) -> list[Tensor]:
        """Gate per channel of every ChannelGroup from the vector of all group gates."""
        return list(gates[self.channel_index.to(gates.device)].split([g.channels for g in self.graph.groups]))

    def _set_contexts(self) -> None:
        self.refresh_kept()
        layers = [layer for _, layer in self.layers()]
        layers[0].check_type()
        gates = [bank.gates() for bank in self.banks()]
        steps = [self._steps(side, bank.detach()) for side, bank in zip(("weight", "activation"), gates, strict=False)]
        weights, scaling = self._weight_codes(*steps)
        weight, activation = (self._bit_contexts(bank, own) for bank, own in zip(gates, steps, strict=False))
        channels, shares = None, None
        if self.group_slices:
            channels, shares = self.channel_gates_of(gates[2]), self.macs.shares(gates[2].detach())
        for info, layer in zip(self.graph.layers, layers, strict=True):
            gate = share = None
            if channels is not None and shares is not None:
                if layer.settings.gate_mode is GateMode.STATISTICS:
                    assert info.group is not None
                    gate, share = channels[info.group].detach(), shares[info.group]
                elif info.source is not None:
                    gate, share = channels[info.source], shares[info.source]
                    gate = gate if info.repeat == 1 else gate.repeat_interleave(info.repeat)
            row = self._rows.get(info.name)
            wg, wl = (None, None) if row is None else weight[row]
            ag, al = (None, None) if row is None else activation[row]
            layer.context = LayerContext(
                weights.get(info.name), scaling.get(info.name), wg, wl, ag, al, gate, share, collect=self.training
            )

    def _steps(self, side: str, gates: Tensor) -> Tensor:
        """Steps n of the selected bit-width of every searched layer."""
        steps: Tensor = getattr(self, f"_{side}_steps")
        return steps[selected(gates)]

    def _bit_contexts(self, gates: Tensor, steps: Tensor) -> list[tuple[Tensor | None, Tensor | None]]:
        """Gates and selected steps by row."""
        if gates.shape[1] == 0:
            return [(None, None)] * len(self.searched)
        return list(zip(gates.unbind(0), steps.unbind(0), strict=True))

    def _weight_codes(
        self, weight_steps: Tensor, activation_steps: Tensor
    ) -> tuple[dict[str, WeightCodes], dict[str, tuple[Tensor, Tensor]]]:
        """Codes of every quantised weight at its selected bit-width, and units (see LayerContext), all together."""
        layers = self.coded_layers()
        if not layers:
            return {}, {}
        whole = len(layers) == len(self.graph.layers)
        weight_steps = torch.cat([weight_steps, self._edge_steps]) if whole else self._edge_steps
        most = max(layer.settings.weight_bits[-1] for layer in layers)
        weights, clips = [layer.weight for layer in layers], [layer.weight_clip for layer in layers]
        made = weight_codes(weights, clips, weight_steps, self._moments(layers), codes_type(weights[0], most))
        codes = dict(zip(self.coded, made, strict=True))
        if not whole or self.space.activation_bits == (FULL_PRECISION_BITS,):
            return codes, {}
        own = units(layers, made, torch.cat([activation_steps, self._edge_steps]))
        return codes, dict(zip(self.coded, own, strict=True))

    def _moments(self, layers: list[QuantizedLayer]) -> tuple[Tensor, Tensor]:
        """Mean and deviation of the kept weights; those that after_step left serve the next training pass, once."""
        left, self._left_moments = self._left_moments, None
        if left and self.training and left[0].holds([layer.weight for layer in layers]):
            return left[1]
        return moments([layer.weight for layer in layers], [layer.kept for layer in layers])

    # -- what steps of the search change

    channel_index: Tensor
    group_sizes: Tensor
    group_members: Tensor
    layer_index: Tensor
    first_gate: Tensor
    least_open: Tensor
    kept_index: Tensor
    kept_gates: Tensor
    _edge_steps: Tensor
    images: Tensor
    steps_done: Tensor
    pressure: Tensor
    _felt: Tensor

    def banks(self) -> tuple[GateBank, GateBank, GateBank]:
        """Gates of the weights' bits, of the activations' bits, and of the channel groups."""
        return self.weight_gates, self.activation_gates, self.channel_gates

    def joint_bank(self) -> JointBank:
        """The banks as one: what is written to it is written to them."""
        joint = joined(self.banks(), self._joint[0])
        self._joint = [joint]  # in a list, for it is no part of the network
        return joint

    def coded_layers(self) -> list[QuantizedLayer]:
        """The layers whose weights are quantised: those that are searched, in the order of their rows, then others."""
        named = dict(self.layers())
        return [named[name] for name in self.coded]

    def searched_layers(self) -> list[QuantizedLayer]:
        """The layers whose bits are searched, in the order of the rows of the bit gates."""
        return [layer for name, layer in self.layers() if name in self._rows]

    def take_passed(self) -> Tensor:
        """How many images passed in training since this was last asked, 0-dim, float64."""
        passed, self._passed = self._passed, 0
        return torch.full((), float(passed), dtype=torch.float64, device=self.images.device)

    def kept_aside(self) -> Callable[[], None]:
        """A function that puts back what passes have left for `after_step` in Python, as it is now."""
        layers = [layer for _, layer in self.layers()]
        passed, contexts, pending = self._passed, self._contexts(), [layer.pending_activation for layer in layers]

        def restore() -> None:
            self._passed = passed
            self._give_contexts(contexts)
            for layer, sums in zip(layers, pending, strict=True):
                layer.pending_activation = sums

        return restore

    def forget_contexts(self) -> None:
        """End the step: a layer has no gates until the next forward pass."""
        self._give_contexts([None] * len(self.graph.layers))

    def mark_started(self) -> None:
        """Note that clips and statistics are no longer made up."""
        self._is_started = True

    @torch.no_grad()
    def press(self, pressure: Tensor, gradient: int) -> None:
        """Take note of dL/d(log BOPs), for the gates that feel it; gradient: its place in `objective.GRADIENTS`."""
        self.pressure += pressure * self._felt[gradient]

    @torch.no_grad()
    def forget_pulls(self) -> None:
        """Drop what backward passes have said of the gates."""
        for bank in self.banks():
            bank.pull.zero_()
        self.pressure.zero_()

    def leave_moments(self, means: Tensor, stds: Tensor) -> None:
        """Leave the moments of the quantised weights for the next training pass, if the weights stay."""
        # on a GPU asking whether they did would wait for it; tensors of inference mode no later step can use
        if self.steps_done.device.type == "cpu" and not torch.is_inference_mode_enabled():
            self._left_moments = Snapshot.of([layer.weight for layer in self.coded_layers()]), (means, stds)

    def refresh_kept(self) -> None:
        """Tell the layers what channel gates leave of their weights, if those were written since the last time."""
        gates_open = self.channel_gates.open
        # whoever writes the buffer (a state dict, an averaged model, a broadcast) raises its version
        version = (gates_open._version, gates_open.data_ptr())  # noqa: SLF001
        # writing through `.data` does not; in evaluation there is time to look
        if not self.group_slices or (self.training and version == self._kept_version):
            return
        self._kept_version = version
        self.kept_gates.copy_(self.channel_gates.decided()[self.kept_index])
        # where they lie: a captured step reads them there
        kept, places = self.kept_gates, self._kept_places
        changed = [layer.keep(places.masks(kept, name, layer.weight.dim())) for name, layer in self.layers()]
        if any(changed):
            self._left_moments = None


def _refresh_after_load(net: SuperNet, _: object) -> None:
    net._is_started = True  # noqa: SLF001
    net.joint_bank()  # sums over views add up in another order than sums over tensors of their own
    net.refresh_kept()


def supernet_of(net: nn.Module, caller: str) -> SuperNet:
    """The super-network, out of what wraps it; SbsError naming the caller where there is none."""
    found = unwrapped(net)
    if not isinstance(found, SuperNet):
        raise SbsError(f"{caller}() takes the super-network that prepare() returned, not a {type(found).__name__}")
    return found


def prepare(model: nn.Module, space: SearchSpace, example_input: Tensor, *, absorb_relus: bool = False) -> SuperNet:
    """Build the super-network of `model` (whose weights are copied, never changed).

    example_input: (N, C, H, W), only its shape matters. Call `calibrate` before the first step.
    absorb_relus: have quantisers compute the ReLUs in front of them, which is faster and computes the same; not for
    networks that show feature maps to others than their layers (kept in attributes, hooks on blocks): those may then
    be from before the ReLU.
    Raises SbsError naming the module that cannot be handled, and why.
    """
    if not isinstance(space, SearchSpace):
        raise SbsError(f"prepare() takes a SearchSpace, for example sbs.SearchSpace(), not {space!r}")
    model = unwrapped(model)
    if isinstance(model, SuperNet):
        raise SbsError("this network is a super-network already; prepare() takes the float network")
    check_own_weights(model)
    graph = analyze(model, example_input)
    check_unhooked(model, [info.name for info in graph.layers])
    return SuperNet(model, space, graph, absorb_relus=absorb_relus)


def _slices(graph: NetworkGraph, space: SearchSpace) -> tuple[tuple[int, int], ...]:
    ends, result = 0, []
    for group in graph.groups:
        count = math.ceil(group.channels / space.group_size)
        result.append((ends, ends + count))
        ends += count
    return tuple(result)
