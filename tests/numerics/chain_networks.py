"""Whole super-networks written out by hand as chains of autograd operations: forward pass, gates and BOPs.

`Chain` reads weights, clips, thresholds and statistics out of a super-network of the product and shares no code with
it. What is tied, gated or signed is not asked of the product: it stands here, derived by hand for each network.
"""

from __future__ import annotations

import copy
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.numerics import oracle


class Chain:
    """Common part of the hand-written networks.

    groups: producer -> layers whose rows it decides (itself and depth-wise followers).
    signed: layers that can see negative inputs. macs: MACs of each unpruned layer for one image.
    """

    groups: ClassVar[dict[str, tuple[str, ...]]] = {}
    signed: frozenset[str] = frozenset()
    sources: ClassVar[dict[str, str]] = {}  # consumer -> producer whose gate it sees
    order: tuple[str, ...] = ()

    def __init__(self, net: nn.Module, macs: dict[str, int]):
        self.bits_w, self.bits_a = net.space.weight_bits, net.space.activation_bits
        self.group_size, self.macs = net.space.group_size, macs
        self.module = copy.deepcopy(net.model)  # its batch norms; convolutions only as holders of stride and bias
        self.leaves: dict[str, Tensor] = {}
        self.statistics: dict[str, Tensor] = {}
        self.seen: dict[str, Tensor] = {}  # activation residual statistics of this batch
        for name in self.order:
            layer = self.module.get_submodule(name)
            for part in ("weight", "bias", "weight_clip", "activation_clip"):
                value = getattr(layer, part)
                if value is not None:
                    self.leaves[f"{name}.{part}"] = value.detach().clone().requires_grad_()
        for name, p in self.module.named_parameters():
            if name.rpartition(".")[0] not in self.order:
                self.leaves[name] = p
        for side in ("weight", "activation"):
            bank = getattr(net, f"{side}_gates")
            for row, name in enumerate(self.order[1:-1]):
                self.leaves[f"{side} thresholds of {name}"] = bank.thresholds[row].detach().clone().requires_grad_()
                self.statistics[f"{side} {name}"] = bank.statistic[row].clone()
        roots = [g.root for g in net.graph.groups]
        assert set(roots) == set(self.groups)
        for root, (start, stop) in zip(roots, net.group_slices, strict=True):
            self.leaves[f"gates of {root}"] = net.channel_gates.thresholds[start:stop].detach().clone().requires_grad_()
            self.statistics[f"gates of {root}"] = net.channel_gates.statistic[start:stop].clone()

    def group_gates(self, root: str) -> Tensor:
        return oracle.gate(self.statistics[f"gates of {root}"], self.leaves[f"gates of {root}"])

    def kept(self, name: str) -> tuple[Tensor | None, Tensor | None]:
        """Kept output rows and input columns of a layer (None: all)."""

        def channels(root: str | None, repeat: int = 1) -> Tensor | None:
            if root is None:
                return None
            return (self.group_gates(root) > 0).repeat_interleave(self.group_size).repeat_interleave(repeat)

        rows = next((root for root, members in self.groups.items() if name in members), None)
        weight = self.leaves[f"{name}.weight"]
        source = self.sources.get(name)
        if source is None or weight.shape[1] == 1:  # a depth-wise convolution has one column
            return channels(rows), None
        return channels(rows), channels(source, weight.shape[1] // self.leaves[f"{source}.weight"].shape[0])

    def bits_of(self, name: str, side: str) -> tuple[int, ...]:
        if name in (self.order[0], self.order[-1]):
            return (8,)
        return self.bits_w if side == "weight" else self.bits_a

    def quantised(self, name: str, x: Tensor) -> Tensor:
        """The layer of that name on the (already gated) feature map x."""
        layer, empty = self.module.get_submodule(name), torch.zeros(0, dtype=x.dtype)
        rows, columns = self.kept(name)
        statistic = {s: self.statistics.get(f"{s} {name}", empty) for s in ("weight", "activation")}
        threshold = {s: self.leaves.get(f"{s} thresholds of {name}", empty) for s in ("weight", "activation")}
        clip, signed = self.leaves[f"{name}.activation_clip"], name in self.signed
        bits = self.bits_of(name, "activation")
        opened = None
        if name in self.sources:
            per_channel = (self.group_gates(self.sources[name]) > 0).repeat_interleave(self.group_size)
            opened = per_channel.repeat_interleave(x.shape[1] // len(per_channel))
        z = oracle.normalise(x.detach(), clip.detach(), signed)
        self.seen[name] = oracle.residual_statistics(z, bits, opened)
        a = oracle.chain_quantiser(x, clip, threshold["activation"], statistic["activation"], bits, signed=signed)
        if signed and name in self.sources:  # zero is not on a signed grid: the gate acts after the quantiser
            a = a * self.group_gates(self.sources[name]).repeat_interleave(self.group_size).view(1, -1, 1, 1)
        w = oracle.chain_weight(
            self.leaves[f"{name}.weight"],
            self.leaves[f"{name}.weight_clip"],
            threshold["weight"],
            self.bits_of(name, "weight"),
            kept_out=rows,
            kept_in=columns,
            statistics=statistic["weight"],
        )
        bias = self.leaves.get(f"{name}.bias")
        if isinstance(layer, nn.Linear):
            return F.linear(a, w, bias)
        return F.conv2d(a, w, bias, layer.stride, layer.padding, layer.dilation, layer.groups)

    def weight_statistics(self, name: str) -> Tensor:
        """Residual statistics of the kept weights, as they are now."""
        rows, columns = self.kept(name)
        weight = self.leaves[f"{name}.weight"].detach()
        rows = torch.ones(weight.shape[0], dtype=torch.bool) if rows is None else rows
        columns = torch.ones(weight.shape[1], dtype=torch.bool) if columns is None else columns
        w, _ = oracle.standardise(weight, rows, columns)
        z = oracle.normalise(w[rows][:, columns], self.leaves[f"{name}.weight_clip"].detach(), True)
        return oracle.residual_statistics(z, self.bits_of(name, "weight"))

    def gate_map(self, root: str, x: Tensor) -> Tensor:
        return oracle.gated_feature_map(x, self.group_gates(root), self.group_size)

    def log_bops(self, gradient: str = "joint") -> Tensor:
        """Natural log of the BOPs, differentiable in the gates that `gradient` names and in the pruning gates."""
        total = torch.zeros((), dtype=torch.float64)
        for name in self.order:
            share = {}
            root = next((r for r, members in self.groups.items() if name in members), None)
            for end, producer in (("out", root), ("in", self.sources.get(name))):
                share[end] = torch.ones((), dtype=torch.float64)
                if producer is not None and not (end == "in" and self.leaves[f"{name}.weight"].shape[1] == 1):
                    gates = self.group_gates(producer)
                    share[end] = gates.sum() / gates.numel()
            bits = {}
            for side in ("weight", "activation"):
                thresholds = self.leaves.get(f"{side} thresholds of {name}")
                if thresholds is None:
                    bits[side] = torch.tensor(8.0, dtype=torch.float64)
                    continue
                gates = oracle.gate(self.statistics[f"{side} {name}"], thresholds)
                held = {"weights": "activation", "activations": "weight"}.get(gradient)
                gates = gates.detach() if side == held else gates
                bits[side] = oracle.effective_bits(list(gates), self.bits_of(name, side))
            total = total + oracle.bit_operations(
                self.macs[name], share["in"], share["out"], bits["weight"], bits["activation"]
            )
        return torch.log(total)


class ChainResidual(Chain):
    """networks.Residual: the hidden channels of both blocks are prunable, everything on the residual path stays."""

    order = ("stem", "conv_a", "conv_b", "conv_c", "conv_d", "short", "fc")
    signed = frozenset({"stem"})
    groups: ClassVar = {"conv_a": ("conv_a",), "conv_c": ("conv_c",)}
    sources: ClassVar = {"conv_b": "conv_a", "conv_d": "conv_c"}

    def forward(self, x: Tensor) -> Tensor:
        m = self.module
        x = F.relu(m.stem_bn(self.quantised("stem", x)))
        y = self.gate_map("conv_a", F.relu(m.bn_a(self.quantised("conv_a", x))))
        y = m.bn_b(self.quantised("conv_b", y))
        x = F.relu(x + y)
        y = self.gate_map("conv_c", F.relu(m.bn_c(self.quantised("conv_c", x))))
        y = m.bn_d(self.quantised("conv_d", y))
        x = F.relu(y + m.short_bn(self.quantised("short", x)))
        return self.quantised("fc", x.mean((2, 3)))


class ChainInverted(Chain):
    """networks.Inverted: expansion and depth-wise convolution are one group, gated once, after the depth-wise ReLU6."""

    order = ("stem.0", "down.0", "expand.0", "depthwise.0", "project.0", "last.0", "head.2")
    signed = frozenset({"stem.0", "expand.0", "last.0"})
    groups: ClassVar = {"stem.0": ("stem.0",), "expand.0": ("expand.0", "depthwise.0"), "last.0": ("last.0",)}
    sources: ClassVar = {"down.0": "stem.0", "depthwise.0": "expand.0", "project.0": "expand.0", "head.2": "last.0"}

    def forward(self, x: Tensor) -> Tensor:
        m = self.module
        x = self.gate_map("stem.0", F.relu6(m.stem[1](self.quantised("stem.0", x))))
        x = m.down[1](self.quantised("down.0", x))
        y = F.relu6(m.expand[1](self.quantised("expand.0", x)))
        y = self.gate_map("expand.0", F.relu6(m.depthwise[1](self.quantised("depthwise.0", y))))
        x = x + m.project[1](self.quantised("project.0", y))
        x = self.gate_map("last.0", F.relu6(m.last[1](self.quantised("last.0", x))))
        return self.quantised("head.2", x.mean((2, 3)))


class ChainPlain(Chain):
    """networks.Plain: every inner channel is prunable, across pooling and a flatten of 2x2 pixels."""

    order = ("features.0", "features.4", "hidden", "head")
    signed = frozenset({"features.0"})
    groups: ClassVar = {"features.0": ("features.0",), "features.4": ("features.4",), "hidden": ("hidden",)}
    sources: ClassVar = {"features.4": "features.0", "hidden": "features.4", "head": "hidden"}

    def forward(self, x: Tensor) -> Tensor:
        f = self.module.features
        x = F.relu(f[1](self.quantised("features.0", x)))
        # max(g x) = g max(x): this way round autograd finds the slope at g = 0, not that of an arbitrary pixel
        x = self.gate_map("features.0", F.max_pool2d(x, 2))
        x = self.gate_map("features.4", F.relu6(f[5](self.quantised("features.4", x))))
        x = F.avg_pool2d(x, 2).flatten(1)
        x = self.gate_map("hidden", F.relu(self.quantised("hidden", x)))
        return self.quantised("head", x)


class ChainSigned(Chain):
    """networks.Signed: the gates of `one` and `two` act behind the signed quantisers of `two` and `three`."""

    order = ("one", "two", "three", "four")
    signed = frozenset({"one", "two", "three"})
    groups: ClassVar = {"one": ("one",), "two": ("two",), "three": ("three",)}
    sources: ClassVar = {"two": "one", "three": "two", "four": "three"}

    def forward(self, x: Tensor) -> Tensor:
        m = self.module
        x = m.one_bn(self.quantised("one", x))
        x = m.two_bn(F.relu(self.quantised("two", x)))
        x = self.gate_map("three", F.relu(m.three_bn(self.quantised("three", x))))
        return self.quantised("four", x.mean((2, 3)))


CHAINS = {"plain": ChainPlain, "residual": ChainResidual, "inverted": ChainInverted, "signed": ChainSigned}
