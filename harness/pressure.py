"""The second term of a search's objective, lambda * log BOPs, with a given lambda or the one that leads to a budget."""

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

# The course falls from the time on at which the gates' gains are known to the time that leaves the gates a while to
# settle at the budget, and the weights as long again after them (shares of the search's steps).
_DEPARTURE, _ARRIVAL = 0.03, 0.55


class Pressure:
    """lambda * log BOPs of `net` with the lambda of the recipe, felt by weights and activations at once or in turn."""

    def __init__(self, net: sbs.SuperNet, search: SearchConfig) -> None:
        self.net, self._search = net, search

    def penalty(self, step: int) -> torch.Tensor:
        """The term to add to the loss of a step."""
        sides: tuple[Literal["weights", "activations"], ...] = ("weights", "activations")
        gradient = "joint" if self._search.bop_gradient == "joint" else sides[step % 2]
        return self.pressure(step) * sbs.bop_penalty(self.net, gradient=gradient)

    def pressure(self, step: int) -> torch.Tensor | float:  # noqa: ARG002 - a course does
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
    """Chooses lambda so that log BOPs fall evenly to the last of the recipe's budgets; lands each policy on its own.

    Lambda is the one under which the gates would settle on the course (`sbs.pressure_for`). Each budget but the last is
    frozen in passing, when the course comes to it. The network lands on the last one when the gates stand still,
    so that the rest of the search trains the policy that it ends with.
    """

    def __init__(self, net: sbs.SuperNet, recipe: Recipe, steps: int, ranks: Ranks, note: Note) -> None:
        super().__init__(net, recipe.search)
        self._ranks, self._steps, self._note = ranks, steps, note
        full_bops = sbs.cost(full_precision(recipe), tuple(example_input(recipe).shape[1:])).bops
        self._goals = {share: share * full_bops for share in budgets(recipe.search, full_bops)}
        self._start = math.log(sbs.bops_range(net)[1])
        self._end = math.log(min(self._goals.values()))
        *passing, _ = self._goals
        self._due = {share: self._step_at(share) for share in passing}
        self._lambda = torch.zeros((), dtype=torch.float64, device=ranks.device)
        self._taken: dict[str, State] = {}
        self._has_landed = False

    def pressure(self, step: int) -> torch.Tensor:  # noqa: ARG002 - the network counts its steps on the device
        """Lambda of a step; stays on the device."""
        self._lambda.copy_(sbs.pressure_for(self.net, self.course(self.net.steps_done)))
        return self._lambda.to(self.net.channel_gates.open.dtype)

    def course(self, steps_done: torch.Tensor) -> torch.Tensor:
        """Where log BOPs should be after so many steps."""
        way = ((steps_done.double() / self._steps - _DEPARTURE) / (_ARRIVAL - _DEPARTURE)).clamp(0.0, 1.0)
        return self._start + way * (self._end - self._start)

    def _step_at(self, share: float) -> int:
        """After which step the course comes to a budget."""
        way = (self._start - math.log(self._goals[share])) / max(1e-9, self._start - self._end)
        return math.ceil(self._steps * (_DEPARTURE + max(0.0, way) * (_ARRIVAL - _DEPARTURE)))

    def stepped(self, step: int) -> None:
        """Set aside the network for a budget that the course comes to; land on the last one when the gates rest."""
        for share, due in self._due.items():
            if step + 1 >= due and str(share) not in self._taken:
                self._take(share, step + 1)
        if not self._has_landed and sbs.at_rest(step + 1, self._steps):
            self._land(step + 1)

    def finish(self) -> dict[str, State]:
        """Land on the budgets that are still due."""
        for share in self._due:
            if str(share) not in self._taken:
                self._take(share, self._steps)
        if not self._has_landed:
            self._land(self._steps)
        return self._taken

    def _land(self, steps: int) -> None:
        *_, last = self._goals
        self.net.load_state_dict(self.net.state_dict() | self._landed(last, steps))
        self._has_landed = True

    def figures(self) -> dict[str, float]:
        """Lambda of the last step."""
        return {"search/lambda": float(self._lambda)}

    def state(self) -> State:
        """The pressure, the networks set aside, and whether the last budget was landed on."""
        return {"lambda": float(self._lambda), "taken": self._taken, "has_landed": self._has_landed}

    def restore(self, state: State) -> None:
        """Go on from a saved state."""
        self._lambda.fill_(state["lambda"])
        self._taken, self._has_landed = dict(state["taken"]), state["has_landed"]

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
