"""The three banks of a super-network as one, so that a step is one series of element-wise calls and not three."""

from collections.abc import Sequence

import torch
from torch import Tensor

from sbs.gates import GateBank

CHANNEL = 2
"""Place of the channel gates among the banks."""


class JointBank(GateBank):
    """The gates of all banks, (rows, most steps): layers of the weights, layers of the activations, channel groups.

    A channel gate is the only step of its row. Steps that a row does not have are closed, far from opening and without
    a price. The banks' buffers are views of these ones; replacing one (a move, another type) breaks the link.
    kind: of every row, its place among the banks.
    """

    kind: Tensor
    _of: Tensor

    def __init__(self, banks: Sequence[GateBank]) -> None:
        shapes = [(len(bank.open), bank.open.shape[1] if bank.open.dim() == 2 else 1) for bank in banks]
        rows, steps = sum(n for n, _ in shapes), max(k for _, k in shapes)
        super().__init__(rows, steps)
        like = banks[0].open
        self.to(like)
        kinds = [torch.full((n,), i) for i, (n, _) in enumerate(shapes)]
        self.register_buffer("kind", torch.cat(kinds).to(like.device))
        self.register_buffer("_of", (torch.arange(len(banks), device=like.device).unsqueeze(1) == self.kind).to(like))
        self.statistic.zero_()
        self.thresholds.fill_(1.0)
        self.open.zero_()
        self._starts = [sum(n for n, _ in shapes[:i]) for i in range(len(shapes))]
        self._views = [self._take(bank, start) for bank, start in zip(banks, self._starts, strict=True)]

    def _take(self, bank: GateBank, start: int) -> dict[str, Tensor]:
        """Take a bank's values, and give it views of them in place of its own."""
        views = {}
        for name, own in list(bank.named_buffers()):
            whole = self.get_buffer(name)
            views[name] = whole.view(()) if own.dim() == 0 else _part(whole, own, start)
            views[name].copy_(own)
            setattr(bank, name, views[name])
        return views

    def __reduce__(self) -> tuple[type[None], tuple[()]]:
        """A copied network joins its banks anew: copied views would no longer tell when these are written."""
        return type(None), ()

    def holds(self, banks: Sequence[GateBank]) -> bool:
        """Whether all buffers of the banks are still views of these."""
        pairs = zip(banks, self._views, strict=True)
        return all(getattr(bank, name) is view for bank, views in pairs for name, view in views.items())

    def together(self, figures: Sequence[Tensor]) -> Tensor:
        """One number a gate, by bank -> (rows, steps), zeros where there is no gate."""
        whole = torch.zeros(self.open.shape, dtype=figures[0].dtype, device=figures[0].device)
        for figure, start in zip(figures, self._starts, strict=True):
            _part(whole, figure, start).copy_(figure)
        return whole

    def part(self, whole: Tensor, bank: int) -> Tensor:
        """What of (rows, steps) is of that bank's gates, a view in its shape."""
        return _part(whole, self._views[bank]["open"], self._starts[bank])

    def _total(self, figures: Tensor) -> Tensor:
        """Sums by kind, for every row that of its own."""
        return (self._of @ figures.to(self._of))[self.kind]


def _part(whole: Tensor, like: Tensor, start: int) -> Tensor:
    rows = whole[start : start + len(like)]
    return rows[:, : like.shape[1]] if like.dim() == 2 else rows[:, 0]


def joined(banks: Sequence[GateBank], former: JointBank | None) -> JointBank:
    """The banks as one; `former`: what this returned the last time."""
    if former is not None and former.holds(banks):
        return former
    with torch.inference_mode(False), torch.no_grad():
        return JointBank(banks)
