"""Landing on a BOP budget (ours): the gates that are worth least move until the policy costs what it should."""

from dataclasses import dataclass

import torch
from torch import Tensor

from sbs.bops import bops_under, worths
from sbs.errors import SbsError
from sbs.gates import movable, selected
from sbs.supernet import SuperNet, supernet_of

Gates = dict[str, Tensor]
"""Open gates (zeros and ones, float64, on the CPU) by bank: weight_gates, activation_gates, channel_gates."""

# A walk that has crossed the band this often will not find a way into it.
_CROSSINGS = 64

_BANKS = ("weight_gates", "activation_gates", "channel_gates")


@dataclass(frozen=True)
class Landing:
    """Gates that cost `bops`, and how many of them had to `move`; `state` goes over the network's state dict."""

    bops: float
    moved: int
    state: dict[str, Tensor]


def bops_range(net: SuperNet) -> tuple[float, float]:
    """Fewest and most BOPs that gates of `net` can land on, wherever they stand (convention mac_product).

    Where the last channel group of a layer is short, a policy that keeps it alone may be cheaper than the fewest.
    """
    net = supernet_of(net, "bops_range")
    gates = _gates_of(net)
    dearest = {name: torch.ones_like(gate) for name, gate in gates.items()}
    cheapest = {name: torch.zeros_like(gate) for name, gate in gates.items()}
    closable = _closable(net, dearest["channel_gates"])
    cheapest["channel_gates"] = dearest["channel_gates"].clone()
    for start, stop in net.group_slices:
        # a search may have closed the short last group of a layer and kept a whole one
        order = net.macs.sizes[start:stop].cpu().argsort(stable=True)
        cheapest["channel_gates"][start + order[: closable[start]]] = 0.0
    return _bops(net, cheapest), _bops(net, dearest)


def bops_of(net: SuperNet) -> float:
    """BOPs of the gates of `net` as they stand: a sum of whole numbers, the same to the last bit on every rank."""
    net = supernet_of(net, "bops_of")
    return _bops(net, _gates_of(net))


def land(net: SuperNet, bops: float, tolerance: float = 0.03) -> Landing:
    """The gates of `net`, moved as little as it takes to cost between (1 - tolerance) * bops and `bops`.

    First move those with the least loss per log BOPs; before that is known, those nearest to their threshold. Where the
    steps are too coarse for the band the nearest cost that was met is returned; `net` itself stays as it is. Raises
    SbsError for a budget that no policy of the space can meet.
    """
    net = supernet_of(net, "land")
    low, high = bops_range(net)
    if not low * (1 - tolerance) <= bops <= high * (1 + tolerance):
        raise SbsError(
            f"no policy of this search space costs {bops / 1e9:.6g} GBOPs: it reaches from {low / 1e9:.6g} to "
            f"{high / 1e9:.6g}; change the budget, weight_bits, activation_bits or max_prune_share"
        )
    walk = _Walk(net, bops, tolerance)
    best = walk.run()
    dtype, device = net.channel_gates.open.dtype, net.channel_gates.open.device
    before = _gates_of(net)
    moved = sum(int((best[name] != before[name]).sum()) for name in _BANKS)
    state = {f"{name}.open": best[name].to(device=device, dtype=dtype) for name in _BANKS}
    return Landing(_bops(net, best), moved, state)


@dataclass(frozen=True)
class _Move:
    """Set one gate of a bank to `value`; `distance` is how far its threshold is from letting it."""

    bank: str
    index: tuple[int, ...]
    value: float
    distance: float


class _Walk:
    """Moves gates one by one towards the budget, down while above it, up while below the band."""

    def __init__(self, net: SuperNet, bops: float, tolerance: float) -> None:
        self.net, self.top, self.floor = net, bops, bops * (1 - tolerance)
        self.gates = _gates_of(net)
        self.crossed: set[tuple[str, tuple[int, ...]]] = set()
        self.claims = {name: claim.double().cpu() for name, claim in zip(_BANKS, _claims(net), strict=True)}

    def run(self) -> Gates:
        best, best_miss = self._copy(), self._miss(_bops(self.net, self.gates))
        while len(self.crossed) < _CROSSINGS:
            cost = _bops(self.net, self.gates)
            if self._miss(cost) < best_miss:
                best, best_miss = self._copy(), self._miss(cost)
            if best_miss == 0 or not self._step(down=cost > self.top):
                break
        return best

    def _step(self, *, down: bool) -> bool:
        """The nearest move that does not cross the band, else the one that crosses it least; False without any.

        A gate that crossed the band stays where it went, or steps too coarse for the band would go in circles.
        """
        moves = sorted(self._moves(down=down), key=lambda move: (move.distance, move.bank, move.index))
        crossing: list[tuple[float, _Move]] = []
        for move in moves:
            if (move.bank, move.index) in self.crossed:
                continue
            old = float(self.gates[move.bank][move.index])
            self.gates[move.bank][move.index] = move.value
            cost = _bops(self.net, self.gates)
            if (cost >= self.floor) if down else (cost <= self.top):
                return True
            self.gates[move.bank][move.index] = old
            crossing.append((self._miss(cost), move))
        if not crossing:
            return False
        least = min(crossing, key=lambda pair: (pair[0], pair[1].distance))[1]
        self.gates[least.bank][least.index] = least.value
        self.crossed.add((least.bank, least.index))
        return True

    def _moves(self, *, down: bool) -> list[_Move]:
        sign = 1.0 if down else -1.0  # an open gate's margin is above its threshold, a closed one's below
        moves = []
        for bank in ("weight_gates", "activation_gates"):
            is_open = self.gates[bank]
            if is_open.shape[1] == 0:
                continue
            for row, chosen in enumerate(selected(is_open).tolist()):
                column = chosen - 1 if down else chosen
                if 0 <= column < is_open.shape[1]:
                    distance = sign * float(self.claims[bank][row, column])
                    moves.append(_Move(bank, (row, column), 0.0 if down else 1.0, distance))
        is_open = self.gates["channel_gates"]
        closable = _closable(self.net, is_open)
        for gate, value in enumerate(is_open.tolist()):
            if (value == 1.0 and closable[gate] > 0) if down else value == 0.0:
                distance = sign * float(self.claims["channel_gates"][gate])
                moves.append(_Move("channel_gates", (gate,), 1.0 - value, distance))
        return moves

    def _miss(self, cost: float) -> float:
        return max(0.0, cost / self.top - 1, self.floor / cost - 1)

    def _copy(self) -> Gates:
        return {name: gate.clone() for name, gate in self.gates.items()}


def _claims(net: SuperNet) -> list[Tensor]:
    """What each gate is worth, by bank: the loss per log BOPs that it saves; before that is known, its margin."""
    banks, gates = net.banks(), [bank.decided() for bank in net.banks()]
    known = [
        (bank.weight_open + bank.weight_closed > 0) | ~movable(gate) for bank, gate in zip(banks, gates, strict=True)
    ]
    if all(bool(each.all()) for each in known):
        return worths(net, gates)
    return [bank.margin() for bank in banks]


def _gates_of(net: SuperNet) -> Gates:
    return {name: getattr(net, name).decided().double().cpu() for name in _BANKS}


def _closable(net: SuperNet, is_open: Tensor) -> list[int]:
    """How many more gates of its layer may close, for every channel gate."""
    result: list[int] = []
    for start, stop in net.group_slices:
        closed = int((is_open[start:stop] == 0).sum())
        result += [int(net.space.max_prune_share * (stop - start)) - closed] * (stop - start)
    return result


def _bops(net: SuperNet, gates: Gates) -> float:
    device = net.macs.constant.device
    return float(bops_under(net, [gates[name].to(device) for name in _BANKS]))
