"""freeze -> compress: the super-network in evaluation and the plain fixed-bit network compute the same logits.

Where every partial sum of integer codes stays below 2**24, float32 addition is exact in any order and the logits must
be equal bit for bit; the tests compute that bound themselves. Elsewhere float64 must agree to 1e-9.
"""

from __future__ import annotations

import copy
import json

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import sbs
from tests.numerics import networks, oracle, states
from tests.numerics.chain_networks import CHAINS

EXACT = 0.999 * 2**24  # the bound is itself computed in float32
ZOO = {"resnet20": 16, "resnet18": 32, "resnet50": 32, "mobilenetv2": 32}


def _largest_sum(net: nn.Module, x: Tensor) -> float:
    """max over layers and outputs of sum |activation code| |weight code|: an upper bound of every partial sum."""
    largest = []

    def bound(layer, inputs):
        a, s = inputs[0], layer.settings
        z = oracle.normalise(a, layer.activation_clip, s.signed)
        n = oracle.levels(s.activation_bits[-1])
        codes = (2 * torch.round(z * n) - n if s.signed else torch.round(z * n)).abs()
        w = layer.weight.detach()
        zw = oracle.normalise((w - w.mean()) / w.std(unbiased=False), layer.weight_clip, True)
        nw = oracle.levels(s.weight_bits[-1])
        weight = (2 * torch.round(zw * nw) - nw).abs()
        if isinstance(layer, nn.Linear):
            largest.append((codes @ weight.t()).max().item())
        else:
            largest.append(F.conv2d(codes, weight, None, layer.stride, layer.padding, 1, layer.groups).max().item())

    layers = [m for m in net.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    hooks = [layer.register_forward_pre_hook(bound) for layer in layers]
    with torch.no_grad():
        net.eval()(x)
    for hook in hooks:
        hook.remove()
    assert len(largest) == len(layers)
    return max(largest)


def _logits(net: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return net.eval()(x)


def _numbers(net: nn.Module) -> int:
    return sum(p.numel() for name, p in net.named_parameters() if not name.endswith("_clip"))


def _zoo(name: str, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return sbs.models.build(name, 10)


@pytest.mark.parametrize("bits", [(2, 4), (2, 4, 8)], ids=str)
@pytest.mark.parametrize("name", ZOO)
def test_searched_networks(name, bits):
    size = ZOO[name]
    space = {"weight_bits": bits, "activation_bits": bits, "group_size": 8}
    net = states.searched(_zoo(name), size, seed=1, batch=4, **space)
    x = networks.images(2, size, 5)
    policy = sbs.freeze(net)
    chosen = {(c.weight_bits, c.activation_bits) for c in policy.layers}
    assert len(chosen) > 2
    assert any(c.kept for c in policy.layers)
    small = sbs.compress(net, policy)
    want, got = _logits(net, x), _logits(small, x)
    largest = _largest_sum(small, x)
    if bits == (2, 4):
        assert largest < EXACT  # by construction, so that the strict branch is really taken
    if largest < EXACT:
        assert torch.equal(want, got)
    assert torch.equal(want.argmax(1), got.argmax(1))
    report = sbs.cost(_zoo(name), (3, size, size), policy)
    assert _numbers(small) == report.params == sbs.cost(small, (3, size, size)).params
    assert _numbers(small) < 0.95 * _numbers(net.model)
    torch.testing.assert_close(
        _logits(small.double(), x.double()), _logits(net.double(), x.double()), rtol=0, atol=1e-9
    )


@pytest.mark.parametrize("kind", networks.USER_NETWORKS)
def test_searched_user_networks_lose_exactly_the_channels_that_the_graph_ties(kind):
    net = states.searched(networks.USER_NETWORKS[kind](), 8, seed=2, group_size=2, max_prune_share=0.9)
    policy = sbs.freeze(net)
    small = sbs.compress(net, policy)
    x = networks.images(6, 8, 3)
    assert _largest_sum(small, x) < EXACT
    assert torch.equal(_logits(net, x), _logits(small, x))
    hand = CHAINS[kind]
    for name in hand.order:
        before, after = net.model.get_submodule(name).weight, small.get_submodule(name).weight
        root = next((r for r, members in hand.groups.items() if name in members), None)
        rows = before.shape[0] if root is None else len(policy.layer(root).kept or range(before.shape[0]))
        source, columns = hand.sources.get(name), before.shape[1]
        if source is not None and columns > 1:
            channels = net.model.get_submodule(source).weight.shape[0]
            columns = columns // channels * len(policy.layer(source).kept or range(channels))
        assert after.shape[:2] == (rows, columns), name
        if rows < before.shape[0]:
            rows_kept = before[list(policy.layer(name).kept)]
            assert after.shape[1] != before.shape[1] or torch.equal(after, rows_kept)
    assert _numbers(small) < _numbers(net.model)


UNIFORM = [(n, b) for n in ("resnet20", "mobilenetv2") for b in [(2, 2), (4, 4), (8, 8), (2, 8), (1, 4)]]


@pytest.mark.parametrize(("name", "bits"), [*UNIFORM, ("resnet18", (4, 4)), ("resnet50", (4, 4))], ids=str)
def test_uniform_networks(name, bits):
    """A search space with one candidate and the uniform policy are the same network."""
    size = ZOO[name]
    space = {"weight_bits": bits[:1], "activation_bits": bits[1:], "prune": False}
    net = states.searched(_zoo(name), size, seed=3, **space)
    x = networks.images(4, size, 6)
    policy = sbs.Policy.uniform(_zoo(name), torch.zeros(1, 3, size, size), *bits)
    assert sbs.freeze(net) == policy
    small = sbs.compress(net, policy)
    assert _largest_sum(small, x) < EXACT
    assert torch.equal(_logits(net, x), _logits(small, x))


@pytest.mark.parametrize("name", ZOO)
def test_hand_written_policies(name, tmp_path):
    """A policy typed in by hand, imposed on a super-network by its thresholds alone, and compressed from its file."""
    size = ZOO[name]
    model = networks.randomise(_zoo(name), 4)
    x = networks.images(2, size, 8)
    document = sbs.Policy.uniform(model, x, 4, 4).to_json()
    probe = sbs.prepare(model, sbs.SearchSpace(group_size=1), x)
    roots = [g.root for g in probe.graph.groups][::3]
    with torch.no_grad():
        for i, entry in enumerate(document["layers"][1:-1]):
            entry["weight_bits"], entry["activation_bits"] = (2, 4)[i % 2], (4, 2)[i // 2 % 2]
        for entry in document["layers"]:
            if entry["name"] in roots:
                weight = model.get_submodule(entry["name"]).weight
                gone = set(range(1, weight.shape[0] // 2, 2))
                weight[sorted(gone)] *= 0.05  # well below the others, so that a threshold can tell them apart
                entry["kept"] = [c for c in range(weight.shape[0]) if c not in gone]
    path = tmp_path / "by_hand.json"
    path.write_text(json.dumps(document))
    policy = sbs.Policy.load(path)

    net = sbs.prepare(model, sbs.SearchSpace((2, 4), (2, 4), group_size=1), x)
    sbs.calibrate(net, [networks.images(4, size, 9)])
    with torch.no_grad():
        for side in ("weight", "activation"):
            bank = getattr(net, f"{side}_gates")
            for row, layer in enumerate(net.searched):
                bank.thresholds[row].fill_(3.0 if getattr(policy.layer(layer), f"{side}_bits") == 2 else 0.0)
        for root in roots:
            group = [g.root for g in net.graph.groups].index(root)
            start, stop = net.group_slices[group]
            statistic = net.channel_gates.statistic[start:stop]
            kept = torch.zeros(stop - start, dtype=torch.bool)
            kept[list(policy.layer(root).kept)] = True
            assert statistic[~kept].max() + 0.1 < statistic[kept].min()
            net.channel_gates.thresholds[start:stop] = (statistic[~kept].max() + statistic[kept].min()) / 2
    for _ in range(3):
        sbs.after_step(net)
    frozen = sbs.freeze(net)
    for layer in policy.layers:
        assert (frozen.layer(layer.name).weight_bits, frozen.layer(layer.name).activation_bits) == (
            layer.weight_bits,
            layer.activation_bits,
        )
        assert layer.kept is None or frozen.layer(layer.name).kept == layer.kept
    small = sbs.compress(net, policy)
    assert _largest_sum(small, x) < EXACT
    assert torch.equal(_logits(net, x), _logits(small, x))
    assert _numbers(small) == sbs.cost(model, (3, size, size), policy).params < _numbers(net.model)


@pytest.mark.parametrize("kind", networks.USER_NETWORKS)
def test_what_a_closed_group_computes_changes_nothing(kind):
    net = states.searched(networks.USER_NETWORKS[kind](), 8, seed=6, group_size=2, max_prune_share=0.9).eval()
    x = networks.images(4, 8, 1)
    want = _logits(net, x)
    hand, changed = CHAINS[kind], 0
    with torch.no_grad():
        for root, members in hand.groups.items():
            kept = sbs.freeze(net).layer(root).kept
            closed = [c for c in range(net.model.get_submodule(root).weight.shape[0]) if kept and c not in kept]
            changed += len(closed)
            for name in members:
                net.model.get_submodule(name).weight[closed] *= -3.0
            for name, source in hand.sources.items():
                weight = net.model.get_submodule(name).weight
                if source == root and weight.shape[1] > 1:
                    repeat = weight.shape[1] // net.model.get_submodule(root).weight.shape[0]
                    weight[:, [c * repeat + i for c in closed for i in range(repeat)]] = 7.0
    assert changed > 0
    assert torch.equal(_logits(net, x), want)


def test_thresholds_at_zero_are_the_uniform_network_of_the_highest_width_to_the_last_bit():
    """Values, and three steps of training: while its thresholds are frozen at 0 the search leaves no trace."""
    model = networks.randomise(networks.Residual(), 7)
    x = networks.images(8, 8, 2)
    net = sbs.prepare(model, sbs.SearchSpace(), x)
    sbs.calibrate(net, [x])
    policy = sbs.Policy.uniform(model, x, 8, 8)
    assert sbs.freeze(net) == policy
    uniform = sbs.compress(net, policy)
    assert torch.equal(_logits(net, x), _logits(uniform, x))
    for network in (net, uniform):
        groups = sbs.param_groups(network.train())
        trained = groups["decay"] + groups["no_decay"] + groups["clips"]
        optimizer = torch.optim.SGD(trained, lr=0.05, momentum=0.9)
        for step in range(3):
            optimizer.zero_grad()
            F.cross_entropy(network(networks.images(8, 8, 20 + step)), torch.arange(8) % 5).backward()
            optimizer.step()
            sbs.after_step(network)
    assert not any(bank.flips.any() for bank in net.banks())
    for name, value in uniform.named_parameters():
        assert torch.equal(dict(net.model.named_parameters())[name], value), name
    assert torch.equal(_logits(net, x), _logits(uniform, x))


def test_super_network_round_trip_by_state_dict_alone(tmp_path):
    net = states.searched(networks.Inverted(), 8, seed=8, group_size=2)
    torch.save(net.state_dict(), tmp_path / "net.pt")
    again = sbs.prepare(networks.Inverted(), net.space, torch.zeros(1, 3, 8, 8))
    again.load_state_dict(torch.load(tmp_path / "net.pt", weights_only=True))
    x = networks.images(4, 8, 3)
    assert sbs.freeze(again) == sbs.freeze(net)
    assert torch.equal(_logits(again, x), _logits(net, x))
    for network in (net, again):  # the next training step is the same one, too
        optimizer = torch.optim.SGD(network.train().parameters(), lr=0.05)
        (F.cross_entropy(network(x), torch.arange(4)) + 0.1 * sbs.bop_penalty(network)).backward()
        optimizer.step()
        sbs.after_step(network)
    for (name, a), b in zip(net.state_dict().items(), again.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


def test_compressed_network_round_trip_by_state_dict_alone(tmp_path):
    net = states.searched(networks.Inverted(), 8, seed=9, group_size=2)
    policy = sbs.freeze(net)
    small = sbs.compress(net, policy)
    torch.save(small.state_dict(), tmp_path / "small.pt")
    again = sbs.compress(networks.Inverted(), policy)
    again.load_state_dict(torch.load(tmp_path / "small.pt", weights_only=True))
    x = networks.images(4, 8, 3)
    assert torch.equal(_logits(again, x), _logits(small, x))


def test_compressing_leaves_the_source_alone():
    net = states.searched(networks.Residual(), 8, seed=10, group_size=2)
    before = copy.deepcopy(net.state_dict())
    small = sbs.compress(net, sbs.freeze(net))
    with torch.no_grad():
        for p in small.parameters():
            p.add_(1.0)
    for name, value in net.state_dict().items():
        assert torch.equal(value, before[name]), name
