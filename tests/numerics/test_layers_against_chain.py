"""One quantised layer of the product against the written-out chain: value, residual statistics and every gradient."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from sbs.kernels import GateMode
from sbs.layers import LayerContext, QuantSettings, from_float
from tests.numerics import oracle

BIT_SETS = [(2, 4, 8), (1, 2, 4, 8), (4, 8), (3, 6), (2, 4, 8, 16), (8,), (4,)]


@dataclass(frozen=True)
class Case:
    """One random layer, its input, and the state of its gates."""

    kind: str
    signed: bool
    weight_bits: tuple[int, ...]
    activation_bits: tuple[int, ...]
    gate_mode: GateMode
    stride: int
    bias: bool
    channels_last: bool
    kept: bool
    relu: float | None
    seed: int


@st.composite
def cases(draw: st.DrawFn) -> Case:
    signed = draw(st.booleans())
    gated = GateMode.AFTER if signed else GateMode.BEFORE
    return Case(
        kind=draw(st.sampled_from(["conv", "grouped", "depthwise", "pointwise", "linear"])),
        signed=signed,
        weight_bits=draw(st.sampled_from(BIT_SETS)),
        activation_bits=draw(st.sampled_from(BIT_SETS)),
        gate_mode=draw(st.sampled_from([GateMode.NONE, gated, GateMode.STATISTICS])),
        stride=draw(st.sampled_from([1, 2])),
        bias=draw(st.booleans()),
        channels_last=draw(st.booleans()),
        kept=draw(st.booleans()),
        relu=None if signed else draw(st.sampled_from([None, math.inf, 1.25])),
        seed=draw(st.integers(0, 2**31)),
    )


def _float_layer(case: Case) -> nn.Conv2d | nn.Linear:
    if case.kind == "linear":
        return nn.Linear(8, 6, bias=case.bias)
    kernel = 1 if case.kind == "pointwise" else 3
    groups = {"conv": 1, "pointwise": 1, "grouped": 2, "depthwise": 8}[case.kind]
    return nn.Conv2d(8, 8, kernel, case.stride, kernel // 2, groups=groups, bias=case.bias)


class Setting:
    """The tensors of a case in one type, drawn from its seed; `leaves` are what gradients are compared for."""

    def __init__(self, case: Case, dtype: torch.dtype):
        g = torch.Generator().manual_seed(case.seed)

        def uniform(low: float, high: float, *shape: int) -> Tensor:
            return torch.rand(shape, generator=g, dtype=torch.float64) * (high - low) + low

        self.layer = _float_layer(case).to(dtype)
        with torch.no_grad():
            for p in self.layer.parameters():
                p.copy_(torch.randn(p.shape, generator=g, dtype=torch.float64) * 0.3 + 0.05)
        shape = (3, 8) if case.kind == "linear" else (2, 8, 5, 4)
        x = torch.randn(shape, generator=g, dtype=torch.float64)
        self.x = (x if case.signed or case.relu is not None else x.relu()).to(dtype)
        # clips of few digits and inputs on them: the interval is closed, in every type and without rounding
        self.activation_clip, self.weight_clip = uniform(4, 32).round() / 16, uniform(0.5, 3.0)
        self.x.view(-1)[:3] = torch.stack([self.activation_clip, -self.activation_clip * case.signed, torch.zeros(())])
        self.statistics = {s: uniform(0, 3, len(self.bits(case, s)) - 1) for s in ("weight", "activation")}
        self.thresholds = {s: uniform(0, 3, len(self.bits(case, s)) - 1) for s in ("weight", "activation")}
        for side, value in self.statistics.items():  # some gates sit exactly on their threshold: H(0) = 1
            at_zero = torch.rand(value.shape, generator=g) < 0.2
            self.thresholds[side] = torch.where(at_zero, value, self.thresholds[side])
        self.channel_statistic, self.channel_threshold = uniform(0, 2, 8), uniform(0, 2, 8)
        # closed groups elsewhere in the network leave the weights' mean and standard deviation, rows and columns alike
        rows, columns = torch.rand(self.layer.weight.shape[0], generator=g) < 0.7, torch.rand(8, generator=g) < 0.7
        rows[0] = columns[0] = True
        self.kept_out = rows if case.kept else torch.ones_like(rows)
        whole = not case.kept or case.kind in {"grouped", "depthwise"}
        self.kept_in = torch.ones(self.layer.weight.shape[1], dtype=torch.bool) if whole else columns
        self.dtype, self.generator = dtype, g

    @staticmethod
    def bits(case: Case, side: str) -> tuple[int, ...]:
        return case.weight_bits if side == "weight" else case.activation_bits

    def leaf(self, value: Tensor) -> Tensor:
        return value.detach().to(self.dtype).clone().requires_grad_()


def _behind_relu(case: Case, x: Tensor) -> Tensor:
    return x if case.relu is None else x.clamp(0.0, case.relu)


def _of_the_chain(case: Case, s: Setting) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor], Tensor]:
    """Output, leaves, thresholds by what they decide, and residual statistics."""
    leaves = {
        "input": s.leaf(s.x),
        "weight": s.leaf(s.layer.weight),
        "activation_clip": s.leaf(s.activation_clip),
        "weight_clip": s.leaf(s.weight_clip),
    }
    thresholds = {f"{side} gates": s.leaf(value) for side, value in s.thresholds.items()}
    x, opened = leaves["input"], None
    if case.relu is not None:
        x = F.relu(x) if math.isinf(case.relu) else F.hardtanh(x, 0.0, case.relu)
    if case.gate_mode is not GateMode.NONE:
        thresholds["channel gates"] = s.leaf(s.channel_threshold)
        opened = s.channel_statistic >= s.channel_threshold
    gates = None if opened is None else oracle.gate(s.channel_statistic, thresholds["channel gates"])
    if case.gate_mode is GateMode.BEFORE:
        x = oracle.gated_feature_map(x, gates, 1)
    a = oracle.chain_quantiser(
        x,
        leaves["activation_clip"],
        thresholds["activation gates"],
        s.statistics["activation"],
        case.activation_bits,
        signed=case.signed,
    )
    if case.gate_mode is GateMode.AFTER:
        a = oracle.gated_feature_map(a, gates, 1)
    w = oracle.chain_weight(
        leaves["weight"],
        leaves["weight_clip"],
        thresholds["weight gates"],
        case.weight_bits,
        kept_out=s.kept_out,
        kept_in=s.kept_in,
        statistics=s.statistics["weight"],
    )
    bias = None if s.layer.bias is None else s.leaf(s.layer.bias)
    if bias is not None:
        leaves["bias"] = bias
    if case.kind == "linear":
        y = F.linear(a, w, bias)
    else:
        y = F.conv2d(a, w, bias, s.layer.stride, s.layer.padding, s.layer.dilation, s.layer.groups)
    if opened is not None and not opened.any():
        assume(False)
    z = oracle.normalise(_behind_relu(case, s.x), s.activation_clip.to(s.dtype), case.signed)
    return y, leaves, thresholds, oracle.residual_statistics(z, case.activation_bits, opened)


def _of_the_product(case: Case, s: Setting) -> tuple[Tensor, dict[str, Tensor], Tensor]:
    layer = from_float(
        s.layer,
        QuantSettings(case.weight_bits, case.activation_bits, case.signed, gate_mode=case.gate_mode, relu=case.relu),
    )
    layer.set_clip("activation", s.activation_clip)
    layer.set_clip("weight", s.weight_clip)
    if case.kept:
        kept = s.kept_out.to(s.dtype).unsqueeze(1) * s.kept_in.to(s.dtype)
        layer.keep((kept if case.kind == "linear" else kept[..., None, None],))
    context, leaves = {}, {"input": s.leaf(s.x)}
    if case.channels_last and case.kind != "linear":
        leaves["input"] = s.leaf(s.x.contiguous(memory_format=torch.channels_last))
        layer = layer.to(memory_format=torch.channels_last)
    for side in ("weight", "activation"):
        bits = s.bits(case, side)
        statistic, thresholds = s.statistics[side].to(s.dtype), s.thresholds[side].to(s.dtype)
        chosen = oracle.selected_bits(statistic.tolist(), thresholds.tolist(), bits)
        context[f"{side}_levels"] = torch.tensor(float(oracle.levels(chosen)), dtype=s.dtype)
        if len(bits) > 1:
            context[f"{side}_gates"] = leaves[f"{side} gates"] = s.leaf(statistic >= thresholds)
    if case.gate_mode is not GateMode.NONE:
        opened = s.channel_statistic.to(s.dtype) >= s.channel_threshold.to(s.dtype)
        context["channel_gate"] = leaves["channel gates"] = s.leaf(opened)
    layer.context = LayerContext(**context, collect=True)
    leaves |= {
        "weight": layer.weight,
        "weight_clip": layer.weight_clip,
        "activation_clip": layer.activation_clip,
    }
    if layer.bias is not None:
        leaves["bias"] = layer.bias
    y = layer(leaves["input"])
    pending = layer.pending_activation
    return y, leaves, torch.zeros(0) if pending is None else pending.sums / pending.counted()


def _compare(case: Case, dtype: torch.dtype, tolerance: float) -> None:
    setting = Setting(case, dtype)
    reference = Setting(case, torch.float64)
    if dtype != torch.float64:  # the same numbers in both types, away from ties, so that both round alike
        reference.x = setting.x.double()
        reference.activation_clip = setting.activation_clip = setting.activation_clip.to(dtype).double()
        z = oracle.normalise(_behind_relu(case, reference.x), reference.activation_clip, case.signed).numpy()
        w, _ = oracle.standardise(reference.layer.weight.detach(), reference.kept_out, reference.kept_in)
        zw = oracle.normalise(w, reference.weight_clip, True).numpy()
        near = oracle.distance_to_tie(z, case.activation_bits).min(), oracle.distance_to_tie(zw, case.weight_bits).min()
        assume(min(near) > 1e-6)
    want, want_leaves, thresholds, want_statistics = _of_the_chain(case, reference)
    got, got_leaves, got_statistics = _of_the_product(case, setting)
    torch.testing.assert_close(got.double(), want, rtol=tolerance, atol=tolerance)
    if len(case.activation_bits) > 1:
        torch.testing.assert_close(got_statistics.double(), want_statistics, rtol=100 * tolerance, atol=100 * tolerance)
    cotangent = torch.randn(want.shape, generator=reference.generator, dtype=torch.float64)
    want.backward(cotangent)
    got.backward(cotangent.to(dtype))
    gradients = {name: leaf.grad for name, leaf in want_leaves.items()}
    for side, statistic in [*reference.statistics.items(), ("channel", reference.channel_statistic)]:
        threshold = thresholds.get(f"{side} gates")
        if (
            threshold is not None
            and threshold.numel()
            and not (side == "channel" and case.gate_mode is GateMode.STATISTICS)
        ):
            gradients[f"{side} gates"] = oracle.gate_gradient(statistic, threshold)
    for name, gradient in gradients.items():
        assert got_leaves[name].grad is not None, name
        scale = gradient.abs().max().clamp_min(1.0).item()
        difference = (got_leaves[name].grad.double() - gradient).abs().max().item()
        assert difference <= tolerance * scale, f"{name}: {difference} of {scale}"


@settings(max_examples=200, deadline=None)
@given(case=cases())
def test_layer_equals_the_chain_in_float64(case: Case):
    _compare(case, torch.float64, 1e-11)


@settings(max_examples=60, deadline=None)
@given(case=cases())
def test_layer_equals_the_chain_in_float32(case: Case):
    _compare(case, torch.float32, 2e-4)
