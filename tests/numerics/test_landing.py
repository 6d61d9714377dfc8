"""Landing on a budget: what the landed gates cost is counted a second way, by `sbs.cost` of the policy or by hand."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

import sbs
from sbs.errors import SbsError
from tests.numerics import networks

BANKS = ("weight_gates", "activation_gates", "channel_gates")
WIDTH, SIZE, CLASSES = 8, 4, 2


class Narrow(nn.Module):
    """Two searched convolutions between a first and a last layer; the first of the two has the one prunable group."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, WIDTH, 1), nn.GroupNorm(2, WIDTH), nn.ReLU())
        self.free = nn.Conv2d(WIDTH, WIDTH, 1)
        self.mid = nn.Sequential(nn.Conv2d(WIDTH, WIDTH, 1), nn.GroupNorm(2, WIDTH), nn.ReLU())
        self.fc = nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.mid(F.relu(self.free(self.stem(x)))).mean((2, 3)))


def narrow_bops(weight: tuple[int, int], activation: tuple[int, int], kept: int, edge: int = 8) -> int:
    """BOPs of `Narrow` by hand: bits of its two searched layers, and how many of the first one's outputs are left."""
    pixels = SIZE * SIZE
    edges = pixels * 3 * WIDTH + WIDTH * CLASSES
    searched = [w * a * pixels * WIDTH * kept for w, a in zip(weight, activation, strict=True)]
    return edge * edge * edges + sum(searched)


def narrow(**space: object) -> sbs.SuperNet:
    torch.manual_seed(0)
    return sbs.prepare(Narrow(), sbs.SearchSpace(**space), torch.zeros(1, 3, SIZE, SIZE))


@torch.no_grad()
def put(net: sbs.SuperNet, bank: str, margins: list, is_open: object = None) -> None:
    """Give every gate of a bank its margin; open unless said otherwise."""
    gates = getattr(net, bank)
    gates.statistic.copy_(torch.tensor(margins) + 1.0)
    gates.thresholds.fill_(1.0)
    gates.open.copy_(torch.ones_like(gates.open) if is_open is None else torch.tensor(is_open))


def landed(net: sbs.SuperNet, landing: sbs.Landing) -> sbs.SuperNet:
    other = copy.deepcopy(net)
    other.load_state_dict(net.state_dict() | landing.state)
    return other


def bits(policy: sbs.Policy) -> list[tuple[int, int]]:
    return [(layer.weight_bits, layer.activation_bits) for layer in policy.layers[1:-1]]


def test_bits_move_in_the_order_of_their_distance_from_the_threshold():
    net = narrow(prune=False)
    put(net, "weight_gates", [[0.9, 0.1], [0.9, 0.2]])  # per layer: the gate to 4 bits, the gate to 8
    put(net, "activation_gates", [[0.9, 0.3], [0.15, 0.4]])
    assert sbs.bops_of(net) == narrow_bops((8, 8), (8, 8), WIDTH)
    # The order of the distances is 0.1, 0.2, 0.3, 0.4; then the gate at 0.15 is the last activation's next step.
    steps = [
        ((4, 8), (8, 8)),
        ((4, 4), (8, 8)),
        ((4, 4), (4, 8)),
        ((4, 4), (4, 4)),
        ((4, 4), (4, 2)),
    ]
    for moved, (weight, activation) in enumerate(steps, start=1):
        goal = narrow_bops(weight, activation, WIDTH)
        landing = sbs.land(net, goal)
        assert (landing.bops, landing.moved) == (goal, moved)
        assert bits(sbs.freeze(landed(net, landing))) == list(zip(weight, activation, strict=True))


def test_closed_gates_open_in_the_order_of_their_distance():
    net = narrow(prune=False)
    closed = [[0.0, 0.0], [0.0, 0.0]]
    put(net, "weight_gates", [[-0.3, -0.2], [-0.05, -0.06]], closed)
    put(net, "activation_gates", [[-0.1, -0.5], [-0.4, -0.01]], closed)
    # -0.01 is the nearest, but behind a closed gate: to open it would change nothing.
    for weight, activation in [((2, 4), (2, 2)), ((2, 8), (2, 2)), ((2, 8), (4, 2))]:
        goal = narrow_bops(weight, activation, WIDTH)
        landing = sbs.land(net, goal)
        assert landing.bops == goal
        assert bits(sbs.freeze(landed(net, landing))) == list(zip(weight, activation, strict=True))


def test_channels_close_and_open_in_the_order_of_their_distance():
    fixed = {"weight_bits": (32,), "activation_bits": (32,), "group_size": 1, "max_prune_share": 0.5}
    net = narrow(**fixed)
    put(net, "channel_gates", [0.5, 0.2, 0.8, 0.1, 0.7, 0.4, 0.6, 0.3])
    goal = narrow_bops((32, 32), (32, 32), WIDTH - 3, edge=32)
    landing = sbs.land(net, goal)
    assert (landing.bops, landing.moved) == (goal, 3)
    assert sbs.freeze(landed(net, landing)).layer("free").kept == (0, 2, 4, 5, 6)
    put(net, "channel_gates", [0.5, -0.2, 0.8, -0.1, 0.7, -0.4, 0.6, -0.3], [1.0, 0.0, 1.0, 0.0, 1.0, 0.0, 1.0, 0.0])
    landing = sbs.land(net, narrow_bops((32, 32), (32, 32), 6, edge=32))
    assert sbs.freeze(landed(net, landing)).layer("free").kept == (0, 1, 2, 3, 4, 6)


def test_reach_is_that_of_all_policies():
    space = {"weight_bits": (2, 4), "activation_bits": (4, 8), "group_size": 2, "max_prune_share": 0.6}
    costs = []
    for chosen in itertools.product((2, 4), (2, 4), (4, 8), (4, 8), *[(0, 1)] * 4):
        is_open = chosen[4:]
        if sum(is_open) >= 2:  # int(0.6 * 4) = 2 of the 4 groups may close
            costs.append(narrow_bops(chosen[:2], chosen[2:4], 2 * sum(is_open)))
    assert sbs.bops_range(narrow(**space)) == (min(costs), max(costs))
    assert min(costs) == narrow_bops((2, 2), (4, 4), 4)


def test_reach_counts_on_a_whole_group_where_the_last_one_is_short():
    """Groups of 3, 3 and 2 channels, of which two may close: whichever a search has closed, 3 channels can be met."""
    net = narrow(prune=True, weight_bits=(8,), activation_bits=(8,), group_size=3, max_prune_share=0.7)
    low, _ = sbs.bops_range(net)
    assert low == narrow_bops((8, 8), (8, 8), 3)
    for is_open in itertools.product((0.0, 1.0), repeat=3):
        if sum(is_open) >= 1:
            put(net, "channel_gates", [0.1 if gate else -0.1 for gate in is_open], list(is_open))
            assert sbs.land(net, low).bops == low


@pytest.mark.parametrize("share", [0.0, 0.34, 0.9])
def test_the_ends_of_the_reach_can_be_landed_on_and_nothing_beyond(share: float):
    net = narrow(group_size=2, max_prune_share=share)
    low, high = sbs.bops_range(net)
    for goal in (low, high):
        assert sbs.land(net, goal).bops == goal
    for goal in (0.9 * low, 1.1 * high):
        with pytest.raises(SbsError) as caught:
            sbs.land(net, goal)
        for words in [f"costs {goal / 1e9:.6g} GBOPs", f"{low / 1e9:.6g} to {high / 1e9:.6g}", "max_prune_share"]:
            assert words in str(caught.value)


def test_steps_too_coarse_for_the_band_end_with_the_nearest_cost_that_was_met():
    net = narrow(weight_bits=(8,), activation_bits=(2, 8), prune=False)
    put(net, "activation_gates", [[0.1], [0.2]])
    costs = [narrow_bops((8, 8), activation, WIDTH) for activation in ((8, 8), (2, 8), (2, 2))]
    middle = 0.9 * costs[1]
    assert all(abs(cost / middle - 1) > 0.03 for cost in costs)
    landing = sbs.land(net, middle)
    assert landing.bops == costs[1]
    assert landing.moved == 1


@pytest.fixture(scope="module", params=["all", "bits alone", "channels alone"])
def resnet(request: pytest.FixtureRequest) -> tuple[nn.Module, sbs.SuperNet]:
    torch.manual_seed(0)
    model = sbs.models.build("resnet20", 10)
    space = {
        "all": {"group_size": 4, "max_prune_share": 0.7},
        "bits alone": {"prune": False},
        "channels alone": {"weight_bits": (32,), "activation_bits": (32,), "group_size": 2},
    }[request.param]
    return model, sbs.prepare(model, sbs.SearchSpace(**space), torch.zeros(1, 3, 16, 16))


@torch.no_grad()
def scatter(net: sbs.SuperNet, seed: int) -> None:
    """Gates, statistics and thresholds as a search could have left them."""
    generator = torch.Generator().manual_seed(seed)
    for name in BANKS:
        bank = getattr(net, name)
        bank.statistic.copy_(torch.rand(bank.statistic.shape, generator=generator))
        bank.thresholds.copy_(torch.rand(bank.statistic.shape, generator=generator))
        bank.open.copy_((bank.margin() >= 0).float())
    for start, stop in net.group_slices:
        margin = net.channel_gates.margin()[start:stop]
        closable = int(net.space.max_prune_share * (stop - start))
        closed = [gate for gate in margin.argsort()[:closable].tolist() if margin[gate] < 0]
        net.channel_gates.open[start:stop] = 1.0
        net.channel_gates.open[[start + gate for gate in closed]] = 0.0
    net.refresh_kept()


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**31), place=st.floats(0.0, 1.0))
def test_a_network_of_many_gates_lands_in_the_band(resnet: tuple[nn.Module, sbs.SuperNet], seed: int, place: float):
    model, net = resnet
    scatter(net, seed)
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    low, high = sbs.bops_range(net)
    goal = low * (high / low) ** place
    landing = sbs.land(net, goal)
    for name, tensor in net.state_dict().items():
        assert torch.equal(tensor, before[name]), f"{name} was touched"
    other = landed(net, landing)
    policy = sbs.freeze(other)
    assert landing.bops == sbs.cost(model, (3, 16, 16), policy).bops
    assert 0.97 <= landing.bops / goal <= 1.0 or goal == pytest.approx(low)
    assert landing.moved == sum(int((getattr(net, b).open != getattr(other, b).open).sum()) for b in BANKS)
    assert sbs.bops_of(net) == sbs.cost(model, (3, 16, 16), sbs.freeze(net)).bops
    for start, stop in net.group_slices:
        closed = int((other.channel_gates.open[start:stop] == 0).sum())
        assert closed <= int(net.space.max_prune_share * (stop - start))


@pytest.mark.parametrize("kind", networks.USER_NETWORKS)
def test_networks_of_few_gates_come_no_farther_from_the_budget(kind: str):
    """Depth-wise groups, signed inputs, flattened channels; single gates are coarse here, so the band may be missed."""
    torch.manual_seed(0)
    model = networks.USER_NETWORKS[kind]()
    net = sbs.prepare(model, sbs.SearchSpace(group_size=3, max_prune_share=0.7), torch.zeros(1, 3, 8, 8))
    low, high = sbs.bops_range(net)
    for seed in range(6):
        scatter(net, seed)
        goal = low * (high / low) ** (seed / 6 + 0.1)
        landing = sbs.land(net, goal)
        policy = sbs.freeze(landed(net, landing))
        assert landing.bops == sbs.cost(model, (3, 8, 8), policy).bops
        assert miss(landing.bops, goal) <= miss(sbs.bops_of(net), goal)
        assert miss(landing.bops, goal) < 0.1


def miss(bops: float, goal: float) -> float:
    return max(0.0, bops / goal - 1, 0.97 * goal / bops - 1)
