"""MACs, BOPs, parameters and bytes, each counted a second way: shape tables written by hand, and forward hooks."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import sbs
from sbs.errors import SbsError
from sbs.gates import effective_bits
from tests.numerics import networks, oracle, tables


def _hooked_macs(model: nn.Module, size: int) -> dict[str, int]:
    """MACs per layer in order of execution, from the shapes that really flow (one image)."""
    counts: dict[str, int] = {}

    def count(name):
        def hook(module, _, output):
            counts[name] = output[0].numel() * module.weight[0].numel()

        return hook

    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            module.register_forward_hook(count(name))
    with torch.no_grad():
        model.eval()(torch.zeros(1, 3, size, size))
    return counts


@pytest.mark.parametrize("reference", tables.REFERENCES, ids=lambda r: r.name)
def test_reference_table(reference):
    model = sbs.models.build(reference.name, reference.num_classes)
    report = sbs.cost(model, (3, reference.size, reference.size))
    assert report.convention == "mac_product"
    assert report.macs == reference.macs
    assert report.bops == reference.macs * 32 * 32
    assert report.bops / 1e9 == pytest.approx(reference.gbops, abs=reference.gbops_unit / 2)
    assert report.params == sum(row.params for row in reference.rows) == sum(p.numel() for p in model.parameters())
    by_shape = [(row.c_in, row.c_out, row.macs) for row in reference.rows]
    assert sorted((c.in_channels, c.out_channels, c.macs) for c in report.layers) == sorted(by_shape)
    assert {c.name: c.macs for c in report.layers} == _hooked_macs(model, reference.size)


@pytest.mark.parametrize("bits", [(4, 4), (2, 8)], ids=str)
@pytest.mark.parametrize("reference", tables.REFERENCES[:1] + tables.REFERENCES[4:], ids=lambda r: r.name)
def test_uniform_policies_in_both_conventions(reference, bits):
    model = sbs.models.build(reference.name, reference.num_classes)
    shape = (3, reference.size, reference.size)
    policy = sbs.Policy.uniform(model, torch.zeros(1, *shape), weight_bits=bits[0], activation_bits=bits[1])
    widths = [(8, 8), *[bits] * (len(reference.rows) - 2), (8, 8)]
    product = sum(row.macs * w * a for row, (w, a) in zip(reference.rows, widths, strict=True))
    uniq = sum(
        oracle.uniq_bit_operations(row.macs, w, a, row.fan_in)
        for row, (w, a) in zip(reference.rows, widths, strict=True)
    )
    assert sbs.cost(model, shape, policy).bops == pytest.approx(product, rel=1e-12)
    assert sbs.cost(model, shape, policy, convention="uniq").bops == pytest.approx(uniq, rel=1e-12)


def test_uniq_by_hand():
    """One 3x3 convolution, 3 -> 8 channels, 10 x 10 positions at 8/8 bits, and a linear layer 8 -> 5."""
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5))
    x = torch.zeros(1, 3, 10, 10)
    policy = sbs.Policy.uniform(model, x, weight_bits=4, activation_bits=4)
    report = sbs.cost(model, (3, 10, 10), policy, convention="uniq")
    assert report.bops == pytest.approx(21_600 * (64 + 16 + math.log2(27)) + 40 * (64 + 16 + 3))
    assert sbs.cost(model, (3, 10, 10), policy).bops == (21_600 + 40) * 64


def _pointwise() -> tuple[nn.Module, sbs.Policy]:
    """1x1 convolutions on 3 x 2 x 2 images; the first keeps two of its channels, the third has weights of 2 bits."""
    model = nn.Sequential(
        *(nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 4, 1), nn.ReLU(), nn.Conv2d(4, 4, 1), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5)),
    )
    document = sbs.Policy.uniform(model, torch.zeros(1, 3, 2, 2), 4, 2).to_json()
    document["layers"][0]["kept"] = [0, 1]
    document["layers"][2]["weight_bits"] = 2
    return model, sbs.Policy.from_json(document)


def test_a_pruned_network_by_hand():
    """MACs 4 x 3 x 2, 4 x 2 x 4, 4 x 4 x 4, 4 x 5; bits 8/8, 4/2, 2/2, 8/8; six of 16 channels gone."""
    model, policy = _pointwise()
    report = sbs.cost(model, (3, 2, 2), policy)
    assert [layer.macs for layer in report.layers] == [24, 32, 64, 20]
    assert report.bops == 24 * 64 + 32 * 8 + 64 * 4 + 20 * 64
    assert report.mean_weight_bits == pytest.approx((32 * 4 + 64 * 2) / 96)
    assert report.mean_activation_bits == 2
    assert report.pruned_share == pytest.approx(6 / 16)
    uniq = 24 * (80 + math.log2(3)) + 32 * (8 + 4 + 2 + 1) + 64 * (4 + 2 + 2 + 2) + 20 * (80 + 2)
    assert sbs.cost(model, (3, 2, 2), policy, "uniq").bops == pytest.approx(uniq)


class _Scaled(nn.Module):
    """Parameters of its own, of several sizes; a norm without any that has statistics, a buffer that is not saved."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8, affine=False)
        self.second = nn.Conv2d(8, 8, 3)
        self.by_channel = nn.Parameter(torch.ones(8, 1, 1))
        self.by_one = nn.Parameter(torch.ones(()))
        self.register_buffer("ours", torch.ones(8, 1, 1))
        self.register_buffer("passing", torch.ones(8, 1, 1), persistent=False)
        self.last = nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.second(torch.relu(self.norm(self.first(x)))))
        return self.last((x * self.by_channel * self.by_one * self.ours * self.passing).mean((2, 3)))


def test_parameters_of_a_networks_own_count_whatever_their_shape():
    report = sbs.cost(_Scaled(), (3, 8, 8))
    assert report.params == sum(p.numel() for p in _Scaled().parameters())
    assert report.bytes == 4 * (report.params + 16 + 8)  # with running mean and variance, and the saved buffer


class _Sharing(nn.Module):
    """One parameter under two names; modules that forward() leaves out."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Conv2d(3, 8, 3), nn.Linear(8, 5)
        self.scale = nn.Parameter(torch.ones(8, 1, 1))
        self.again = nn.ParameterList([self.scale])
        self.idle_norm, self.idle_table = nn.BatchNorm2d(8), nn.Embedding(10, 64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head((torch.relu(self.body(x)) * self.scale * self.again[0]).mean((2, 3)))


def test_what_is_shared_counts_once_and_what_is_idle_not_at_all():
    report = sbs.cost(_Sharing(), (3, 8, 8))
    assert report.params == 8 * 3 * 9 + 8 + 8 * 5 + 5 + 8
    assert report.bytes == 4 * report.params


def test_unknown_convention_is_refused_with_the_known_ones():
    with pytest.raises(SbsError, match=r"(?s)flops.*mac_product.*uniq"):
        sbs.cost(networks.Residual(), (3, 8, 8), convention="flops")


@settings(max_examples=50, deadline=None)
@given(
    bits=st.sampled_from([(2, 4, 8), (1, 2, 4, 8), (4, 8), (2, 4, 8, 16)]),
    seed=st.integers(0, 2**31),
)
def test_effective_bits_and_their_slopes_by_finite_differences(bits, seed):
    """Effective bits are linear in every single gate, so central differences are exact."""
    rng = torch.Generator().manual_seed(seed)
    gates = torch.rand(3, len(bits) - 1, generator=rng, dtype=torch.float64, requires_grad=True)
    value = effective_bits(gates, bits)
    want = torch.stack([oracle.effective_bits(list(row), bits) for row in gates.detach()])
    torch.testing.assert_close(value.detach(), want)
    value.sum().backward()
    for row in range(3):
        for j in range(len(bits) - 1):
            ends = []
            for step in (0.25, -0.25):
                moved = gates.detach().clone()
                moved[row, j] += step
                ends.append(effective_bits(moved, bits).sum())
            assert gates.grad[row, j].item() == pytest.approx(((ends[0] - ends[1]) / 0.5).item(), abs=1e-12)


def test_macs_of_channel_gates_are_those_of_the_network_with_the_channels_gone():
    """Every group of networks.Inverted closed by hand in turn, counted again by a network built that small."""
    x = torch.zeros(1, 3, 8, 8)
    net = sbs.prepare(networks.Inverted(), sbs.SearchSpace(group_size=2), x)
    for group, (start, stop) in zip(net.graph.groups, net.group_slices, strict=True):
        gates = torch.ones_like(net.channel_gates.open)
        gates[start + 1 : stop] = 0.0  # two channels stay
        policy = sbs.Policy.uniform(networks.Inverted(), x, 4, 4).to_json()
        next(e for e in policy["layers"] if e["name"] == group.root)["kept"] = [0, 1]
        small = sbs.compress(networks.Inverted(), sbs.Policy.from_json(policy))
        assert net.macs(gates).tolist() == list(_hooked_macs(small, 8).values())
