"""Several ranks are one network: equal gates with different data, and the same steps as one rank with all of it."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

import sbs
from sbs import gate_statistics
from sbs.gates import PACE, GateBank
from tests.numerics import networks

SIZE, STEPS, SEARCH = 8, 24, 30


class Normed(nn.Module):
    """Group norms, which know no batch: what a rank computes for an image does not depend on the other images."""

    def __init__(self, width: int = 8, num_classes: int = 5):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, width, 3, padding=1), nn.GroupNorm(2, width), nn.ReLU())
        self.free = nn.Sequential(nn.Conv2d(width, width, 3, padding=1), nn.ReLU())  # its channels can be pruned
        self.mid = nn.Sequential(nn.Conv2d(width, width, 3, padding=1), nn.GroupNorm(2, width), nn.ReLU())
        self.fc = nn.Linear(width, num_classes)

    def forward(self, x):
        return self.fc(self.mid(self.free(self.stem(x))).mean((2, 3)))


def _build(kind: str, dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(0)
    model = Normed() if kind == "group norm" else networks.Residual()
    model = networks.randomise(model, 0)
    space = sbs.SearchSpace(group_size=2, max_prune_share=0.9)
    net = sbs.prepare(model, space, torch.zeros(1, 3, SIZE, SIZE)).to(dtype)
    sbs.calibrate(net, [networks.images(8, SIZE, 50, dtype)])
    return net


def _train(net: nn.Module, wrapped: nn.Module, batches: list[torch.Tensor], *, frozen_norms: bool) -> None:
    """Most of a short search, in which bits and channels move fast, so that a disagreement would show."""
    groups = sbs.param_groups(net)
    rates = {"decay": 0.05, "no_decay": 0.05, "clips": 0.01}
    optimizer = torch.optim.SGD([{"params": p, "lr": rates[k]} for k, p in groups.items() if p], momentum=0.5)
    net.train()
    for module in net.modules():
        if frozen_norms and isinstance(module, nn.BatchNorm2d):
            module.eval()
    for step, x in enumerate(batches):
        optimizer.zero_grad()
        labels = torch.arange(len(x)) % 5
        gradient = ("weights", "activations")[step % 2]
        (F.cross_entropy(wrapped(x), labels) + 3.0 * sbs.bop_penalty(net, gradient=gradient)).backward()
        optimizer.step()
        sbs.after_step(net, steps=SEARCH)


def _state(net: nn.Module) -> dict[str, torch.Tensor]:
    """Everything but the running statistics of batch norms, which are each rank's own."""
    return {k: v.clone() for k, v in net.state_dict().items() if "running_" not in k and "num_batches" not in k}


SCENARIOS = {"batch norm": False, "group norm": True, "frozen batch norm": True}  # whether ranks share global batches


def _scenario(kind: str, rank: int) -> dict[str, object]:
    share = SCENARIOS[kind]
    dtype = torch.float64 if share else torch.float32
    net = _build(kind, dtype)
    if share:  # this rank's half of every global batch
        batches = [networks.images(10, SIZE, s, dtype)[5 * rank : 5 * rank + 5] for s in range(STEPS)]
    else:
        batches = [networks.images(5, SIZE, 1000 * rank + s, dtype) for s in range(STEPS)]
    calibrated = {}
    if not share:
        sbs.calibrate(net, [networks.images(5, SIZE, 77 + rank, dtype)])
        calibrated = {k: v.clone() for k, v in net.state_dict().items()}
    with mock.patch.object(dist, "all_reduce", wraps=dist.all_reduce) as reduced:
        _train(net, DistributedDataParallel(net, broadcast_buffers=False), batches, frozen_norms=share)
    sizes = [call.args[0].numel() for call in reduced.call_args_list]
    return {"state": _state(net), "policy": sbs.freeze(net).to_json(), "sizes": sizes, "calibrated": calibrated}


def _split_margin(statistic: float) -> float:
    """A threshold that closes an open gate of this float32 statistic, but not that of the next larger one."""

    def stays(value: torch.Tensor, threshold: torch.Tensor) -> bool:
        gate = GateBank(1)
        gate.statistic.fill_(value)
        gate.thresholds.fill_(threshold)
        return bool(gate.wanted(PACE) == 1)

    value = torch.tensor(statistic)
    above, threshold = torch.nextafter(value, torch.tensor(9.0)), value + PACE.band - 1e-6
    while stays(value, threshold):
        threshold = torch.nextafter(threshold, torch.tensor(9.0))
    assert stays(above, threshold)
    return float(threshold)


GATE = 1  # the step from 4 to 8 bits of the first layer, or a group of its channels


def _last_bit(bank: str, what: str, rank: int) -> dict[str, torch.Tensor]:
    """One step without a batch in which the second rank's `what` differs in the last bit, at the edge of a flip."""
    net = _build("batch norm", torch.float32)
    with torch.no_grad():
        own = getattr(net, bank)
        own.thresholds.view(-1)[GATE] = _split_margin(float(own.statistic.view(-1)[GATE]))
    if rank == 1 and what == "threshold":
        with torch.no_grad():
            own.thresholds.copy_(torch.nextafter(own.thresholds, torch.zeros(())))
    elif rank == 1:
        update = gate_statistics._update_channels

        def perturbed(net: nn.Module) -> None:
            update(net)
            own.statistic.copy_(torch.nextafter(own.statistic, torch.tensor(9.0)))

        with mock.patch.object(gate_statistics, "_update_channels", perturbed):
            sbs.after_step(net)
    if rank == 0 or what == "threshold":
        sbs.after_step(net)
    return {"gate": own.open.view(-1)[GATE].clone()} | _state(net)


LAST_BITS = [
    (f"{side}_gates", what) for side in ("weight", "activation", "channel") for what in ("statistic", "threshold")
]

ABLATIONS = {
    "quantise only": {"prune": False},
    "prune only": {"weight_bits": (32,), "activation_bits": (32,)},
    "prune at 8 bits": {"weight_bits": (8,), "activation_bits": (8,)},
    "weights only": {"activation_bits": (8,), "prune": False},
    "nothing to search": {"weight_bits": (8,), "activation_bits": (8,), "prune": False},
}


def _ablation(space: dict[str, object], rank: int, penalty: float) -> str:
    """Three steps; every parameter must get its gradient, or DistributedDataParallel gives up. The error, if any."""
    net = sbs.prepare(networks.Residual(), sbs.SearchSpace(group_size=2, **space), torch.zeros(1, 3, SIZE, SIZE))
    wrapped = DistributedDataParallel(net.train(), broadcast_buffers=False)
    try:
        for step in range(3):
            loss = F.cross_entropy(wrapped(networks.images(5, SIZE, 10 * rank + step)), torch.arange(5))
            if penalty:
                loss = loss + penalty * sbs.bop_penalty(net, gradient=("weights", "activations")[step % 2])
            loss.backward()
            sbs.after_step(net)
    except RuntimeError as error:
        return str(error)
    return ""


def _rank(rank: int, world: int, folder: str) -> None:
    torch.set_num_threads(1)
    sbs.use_compiled(False)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world)
    try:
        results = {kind: _scenario(kind, rank) for kind in SCENARIOS}
        results["ablations"] = {
            name: [_ablation(space, rank, penalty) for penalty in (0.0, 0.1)] for name, space in ABLATIONS.items()
        }
        results["last bits"] = {case: _last_bit(*case, rank) for case in LAST_BITS}
        torch.save(results, f"{folder}/{rank}.pt")
    finally:
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    """What each of two ranks ended with, per scenario."""
    folder = tmp_path_factory.mktemp("ranks")
    mp.spawn(_rank, args=(2, str(folder)), nprocs=2)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


def test_two_ranks_with_different_data_stay_one_network(ranks):
    first, second = (rank["batch norm"] for rank in ranks)
    assert first["policy"] == second["policy"]
    for name, value in first["state"].items():
        assert torch.equal(value, second["state"][name]), name
    flips = [v.sum() for k, v in first["state"].items() if k.endswith("flips")]
    assert len(flips) == 3
    assert all(f > 0 for f in flips), "gates of every kind must have moved, or this shows nothing"


def test_calibration_on_different_data_gives_every_rank_the_same_network(ranks):
    first, second = (rank["batch norm"]["calibrated"] for rank in ranks)
    assert any("running_var" in name for name in first)
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


@pytest.mark.parametrize("name", ABLATIONS)
def test_ablations_train_on_two_ranks(ranks, name):
    assert ranks[0]["ablations"][name] == ["", ""]


@pytest.mark.parametrize("case", LAST_BITS, ids=" ".join)
def test_a_last_bit_that_differs_at_a_threshold_does_not_part_the_ranks(ranks, case):
    """As on two kinds of hardware: the first rank decides, here that the gate closes; alone the second would not."""
    first, second = (rank["last bits"][case] for rank in ranks)
    assert first["gate"] == 0
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


def test_gates_cost_one_small_all_reduce_a_step(ranks):
    """Beside the gradients' own, which do not pass through torch.distributed.all_reduce."""
    sizes = ranks[0]["batch norm"]["sizes"]
    searched_layers, steps, channel_groups = 5, 2, (8 + 16) // 2
    assert len(sizes) == STEPS
    sums, gates = searched_layers * (steps + 1), 2 * searched_layers * steps + channel_groups
    # images, dL/dg and three pressures; of the first rank statistic, threshold, gate, slope and scatter of both sides
    assert set(sizes) == {sums + 1 + gates + 3 + 7 * gates}


@pytest.mark.parametrize("kind", ["group norm", "frozen batch norm"])
def test_two_ranks_with_half_the_batch_are_one_rank_with_all_of_it(ranks, kind):
    """In float64, where no rounding flips a code: measured 1e-13, tolerance 1e-5."""
    first = ranks[0][kind]
    net = _build(kind, torch.float64)
    batches = [networks.images(10, SIZE, s, torch.float64) for s in range(STEPS)]
    _train(net, net, batches, frozen_norms=True)
    assert sbs.freeze(net).to_json() == first["policy"]
    assert all(bank.flips.any() for bank in net.banks())
    for name, value in _state(net).items():
        torch.testing.assert_close(value, first["state"][name], rtol=1e-5, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
