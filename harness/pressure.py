"""The second term of a search's objective, lambda * log BOPs: with a given lambda, or with one that a budget steers."""

import logging
import math
from collections.abc import Callable
from typing import Literal

import torch

import sbs
from harness.checkpoint import State, to_cpu
from harness.config import Recipe, SearchConfig
from harness.errors import UserError
from harness.networks import example_input, full_precision, supernet
from harness.plan import budgets, takes_budget
from harness.ranks import Ranks

log = logging.getLogger(__name__)

Note = Callable[[str, int], None]
"""Records a remark that was made after so many steps of the search."""

TOLERANCE = 0.03
"""A policy lands at most this share below its budget."""

# The way down to the budget takes this share of the steps, the rest is for the weights to settle at it.
_ARRIVAL = 0.7
# A gap of 1 (in log BOPs) that lasts for a twentieth of the search multiplies the pressure by e.
_GAIN = 20.0
# Within this gap the pressure falls off in proportion, and turns round below the course.
_BAND = 0.1
_LEAST, _FIRST, _MOST = 1e-6, 1e-2, 1e2


class Pressure:
    """lambda * log BOPs of `net` with the lambda of the recipe; the bits' gradients alternate unless it says joint."""

    def __init__(self, net: sbs.SuperNet, search: SearchConfig) -> None:
        self.net, self._search = net, search

    def penalty(self, step: int) -> torch.Tensor:
        """The term to add to the loss of a step."""
        sides: tuple[Literal["weights", "activations"], ...] = ("weights", "activations")
        gradient = "joint" if self._search.bop_gradient == "joint" else sides[step % 2]
        log_bops = sbs.bop_penalty(self.net, gradient=gradient)
        return self.pressure(step, log_bops.detach()) * log_bops

    def pressure(self, step: int, log_bops: torch.Tensor) -> torch.Tensor | float:  # noqa: ARG002 - steered ones look
        """Lambda of a step."""
        return self._search.lambda_ or 0.0

    def stepped(self, step: int) -> None:
        """Called after every optimiser step with its number, on every rank."""

    def finish(self) -> dict[str, State]:
        """Called after the last step; states of the networks that were set aside on the way, by their budget."""
        return {}

    def figures(self) -> dict[str, float]:
        """What to record of it after an epoch."""
        return {}

    def state(self) -> State:
        """All that steps change."""
        return {}

    def restore(self, state: State) -> None:
        """Go on from a saved state."""


class BudgetPressure(Pressure):
    """Steers lambda so that log BOPs fall evenly to the last of the recipe's budgets; lands each policy on its own.

    Below the course the pressure turns negative, which opens gates again. Each budget but the last is frozen in
    passing, at the first step at or below it; the last one when the search ends.
    """

    def __init__(self, net: sbs.SuperNet, recipe: Recipe, steps: int, ranks: Ranks, note: Note) -> None:
        super().__init__(net, recipe.search)
        self._ranks, self._steps, self._note = ranks, steps, note
        full_bops = sbs.cost(full_precision(recipe), tuple(example_input(recipe).shape[1:])).bops
        self._goals = {share: share * full_bops for share in budgets(recipe.search, full_bops)}
        self._start = math.log(sbs.bops_range(net)[1])
        self._magnitude = torch.full((), _FIRST, dtype=torch.float64, device=ranks.device)
        self._lambda = torch.zeros((), dtype=torch.float64, device=ranks.device)
        self._taken: dict[str, State] = {}

    def pressure(self, step: int, log_bops: torch.Tensor) -> torch.Tensor:
        """Lambda of a step; stays on the device."""
        gap = log_bops.double() - self.course(step)
        grown = self._magnitude * torch.exp(_GAIN / self._steps * gap.clamp(-1, 1))
        self._magnitude = grown.clamp(_LEAST, _MOST)
        self._lambda = self._magnitude * (gap / _BAND).clamp(-1, 1)
        return self._lambda.to(log_bops.dtype)

    def course(self, step: int) -> float:
        """Where log BOPs should be at a step."""
        way = min(1.0, (step + 1) / max(1.0, _ARRIVAL * self._steps))
        return self._start + way * (math.log(min(self._goals.values())) - self._start)

    def stepped(self, step: int) -> None:
        """Set aside the network for every budget but the last that its BOPs have just passed."""
        *passing, _ = self._goals
        due = [share for share in passing if str(share) not in self._taken]
        if not due:
            return
        bops = sbs.bops_of(self.net)
        for share in due:
            if bops <= self._goals[share]:
                self._take(share, step + 1)

    def finish(self) -> dict[str, State]:
        """Land the network on the last budget, after those that it never passed."""
        *passing, last = self._goals
        for share in passing:
            if str(share) not in self._taken:
                self._take(share, self._steps)
        self.net.load_state_dict(self.net.state_dict() | self._landed(last, self._steps))
        return self._taken

    def figures(self) -> dict[str, float]:
        """Lambda of the last step."""
        return {"search/lambda": float(self._lambda)}

    def state(self) -> State:
        """The pressure, and the networks set aside."""
        return {"magnitude": float(self._magnitude), "lambda": float(self._lambda), "taken": self._taken}

    def restore(self, state: State) -> None:
        """Go on from a saved state."""
        self._magnitude.fill_(state["magnitude"])
        self._lambda.fill_(state["lambda"])
        self._taken = dict(state["taken"])

    def _take(self, share: float, steps: int) -> None:
        self._ranks.average_norms(self.net)
        self._taken[str(share)] = to_cpu(self.net.state_dict() | self._landed(share, steps))

    def _landed(self, share: float, steps: int) -> State:
        """Gates that meet a budget, for the network's state dict."""
        landing = sbs.land(self.net, self._goals[share], TOLERANCE)
        found, before = (share * bops / self._goals[share] for bops in (landing.bops, sbs.bops_of(self.net)))
        gates = sum(tensor.numel() for tensor in landing.state.values())
        text = (
            f"budget of {share:.4g} of full precision's BOPs: the gates came to {before:.4g}, landed on {found:.4g} "
            f"({landing.moved} of {gates} gates moved)"
        )
        if abs(found / share - 1) > TOLERANCE:
            text += f"; missed, for single gates change it by more than {TOLERANCE:.0%}: lower search.group_size"
            if self._ranks.main:
                log.warning("%s", text)
        self._note(text, steps)
        return landing.state


def pressure_of(net: sbs.SuperNet, recipe: Recipe, steps: int, ranks: Ranks, note: Note) -> Pressure:
    """What a recipe's search of so many steps is driven by; `note` records a remark."""
    if takes_budget(recipe.search):
        return BudgetPressure(net, recipe, steps, ranks, note)
    return Pressure(net, recipe.search)


def check_budgets(recipe: Recipe) -> None:
    """Raise `UserError` if the recipe names a budget that no policy of its search space can meet."""
    if not takes_budget(recipe.search):
        return
    model = full_precision(recipe)
    low, high = sbs.bops_range(supernet(recipe, model))
    full_bops = sbs.cost(model, tuple(example_input(recipe).shape[1:])).bops
    for share in budgets(recipe.search, full_bops):
        if not low / full_bops <= share <= high / full_bops:
            key = "search.gbops" if recipe.search.gbops is not None else "search.budget or search.snapshots"
            raise UserError(
                f"{key}: {share:.4g} of full precision's {full_bops / 1e9:.6g} GBOPs cannot be met: the search space "
                f"reaches from {low / full_bops:.4g} ({low / 1e9:.4g} GBOPs) to {high / full_bops:.4g} "
                f"({high / 1e9:.4g} GBOPs); change it, or search.weight_bits, activation_bits, max_prune_share"
            )
