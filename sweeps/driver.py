"""One sweep from its space to its table: plan, preflight, run what is missing, mirror, report."""

import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from harness import data, ray_cluster
from harness.config import Recipe
from harness.plan import takes_budget
from harness.ray_cluster import Node
from harness.run_dir import RunDir
from harness.settings import EXIT_PREEMPTED
from harness.tracking.copying import Place, is_sent
from harness.tracking.mirror import Mirror
from harness.tracking.store import Store, default_uri
from sweeps import folder, outcome
from sweeps.plan import Plan, Planner, finished, unfinished
from sweeps.resources import Demand, concurrency, idle_gpus
from sweeps.space import Space
from sweeps.stopping import StopRequest
from sweeps.trial import run_trial
from sweeps.tuner import TrialFunction
from sweeps.waves import Clock, Waves


@dataclass(frozen=True)
class Sweep:
    """A planned sweep: what it tries, where it lives, what this machine offers (None: a cluster will tell)."""

    planner: Planner
    plan: Plan
    nodes: tuple[Node, ...] | None

    @property
    def space(self) -> Space:
        """What the sweep tries."""
        return self.planner.space

    @property
    def path(self) -> Path:
        """The sweep's folder."""
        return self.planner.folder

    @property
    def total(self) -> int:
        """Trials in all, those included that Optuna has not asked for yet."""
        if self.space.search.algorithm == "optuna":
            return len(self.plan.first) + max(self.space.search.samples or 0, len(self.plan.rest))
        return len(self.plan.trials)

    @property
    def missing(self) -> int:
        """Trials that are still to run."""
        return self.total - len(self.plan.trials) + len(unfinished(self.plan.trials, self.space))

    def idle(self, nodes: Sequence[Node]) -> list[str]:
        """Words for every kind of trial that leaves GPUs idle."""
        return idle_remarks(self.plan, self.space, nodes)

    def at_once(self, nodes: Sequence[Node]) -> int:
        """How many trials run at once. Raises `UserError` with the arithmetic if one never can."""
        demands = {Demand.of(spec.recipe) for spec in self.plan.trials}
        return min(concurrency(demand, nodes, self.space.name, self.space.max_concurrent) for demand in demands)


def idle_remarks(plan: Plan, space: Space, nodes: Sequence[Node]) -> list[str]:
    """Words for GPUs that stay idle, once for each kind of trial."""
    demands = dict.fromkeys(Demand.of(spec.recipe) for spec in plan.trials)
    return [text for each in demands if (text := idle_gpus(each, nodes, space.max_concurrent))]


def prepare(space: Space, base: Recipe, runs_dir: Path) -> Sweep:
    """Plan a sweep and refuse what cannot work, before anything heavy starts. Raises `UserError`."""
    nodes = None
    if not ray_cluster.uses_existing_cluster():
        nodes = tuple(ray_cluster.local_nodes(gpus=base.run.gpus_per_worker > 0))
        # Before any data is written; the points may ask for more and are looked at below.
        concurrency(Demand.of(base), nodes, space.name)
    planner = Planner(space, base, (runs_dir / space.name).resolve(), dataset(base))
    sweep = Sweep(planner, planner.plan(), nodes)
    if nodes is not None:
        sweep.at_once(nodes)
    check_budgets(sweep.planner, sweep.plan)
    check_policies(sweep.plan)
    return sweep


def check_budgets(planner: Planner, plan: Plan) -> None:
    """Raise `UserError` for a budget that no network of its search space can meet.

    Loads torch where there are budgets: a message now spares the training of the full-precision network.
    """
    recipes = [spec.recipe for spec in plan.trials] + planner.ends()
    steered = {_reach_key(recipe): recipe for recipe in recipes if takes_budget(recipe.search)}
    if steered:
        from harness import pressure

        for recipe in steered.values():
            pressure.check_budgets(recipe)


def check_policies(plan: Plan) -> None:
    """Raise `UserError` for a file of a policy that is none, or is one of another network.

    Loads torch where there are policies, for the reason of `check_budgets`.
    """
    recipes = [spec.recipe for spec in plan.trials if spec.recipe.search.policy is not None]
    different = {(recipe.model, recipe.data.image_size, recipe.search.policy): recipe for recipe in recipes}
    if different:
        from harness.networks import full_precision, given_policy

        for recipe in different.values():
            given_policy(recipe, full_precision(recipe))


def _reach_key(recipe: Recipe) -> tuple[object, ...]:
    """Budgets, and what decides whether they can be met: trials that differ in other things need no second look."""
    search = recipe.search
    budget = None if search.snapshots else search.budget
    bits = (search.weight_bits, search.activation_bits, search.prune_only_bits)
    groups = (search.group_size, search.max_prune_share)
    return (recipe.model, recipe.data.image_size, search.method, bits, groups, budget, search.gbops, search.snapshots)


def dataset(base: Recipe) -> str:
    """The data's checksum. A source that needs no place (`digits`) is written on first use; others must be there."""
    if ":" in base.data.source:
        return data.data_checksum(base.data.dir)
    return data.ensure(base.data.source, base.data.dir)


def store_of(runs_dir: Path) -> Store:
    """The tracking store that a runs folder reports to."""
    return Store(default_uri(runs_dir), runs_dir / "mlartifacts")


def run(
    space: Space, base: Recipe, runs_dir: Path, say: Callable[[str], None], *, trial: TrialFunction = run_trial
) -> int:
    """Run what is missing of a sweep and report all of it; exit status 0, 1 with failed trials, 85 if asked to leave.

    `trial` is what runs in Tune's processes. Raises `UserError`.
    """
    clock, start_ms = Clock(), round(time.time() * 1000)
    with folder.held(runs_dir / space.name):
        with clock.measuring("data and plan"):
            sweep = prepare(space, base, runs_dir)
            folder.claim(sweep.path, space, base, sweep.planner.checksum, sweep.plan.trials)
        to_run = sweep.missing
        say(f"sweep {space.name}: {sweep.total} trials, {sweep.total - to_run} done, {to_run} to run")
        parent = outcome.Parent(sweep.path, space, base, start_ms)
        if to_run:
            parent.write("RUNNING", None, None)
        stop = StopRequest(sweep.path)
        store = store_of(runs_dir)
        done = [RunDir(spec.run_dir) for spec in finished(sweep.plan.trials)]
        unsent = [each for each in done if not is_sent(store, each)]  # an earlier driver's, or the store was lost
        with Mirror(store, Place(space.name, space.name), sweep.path) as mirror:
            for trial_dir in unsent:
                mirror.ended(trial_dir, "FINISHED")
            try:
                endings = Waves(sweep, mirror, stop, clock).run(trial) if to_run else []
            except BaseException:
                parent.write("FAILED", None, None)
                raise
            with clock.measuring("tables"):
                frontier = outcome.from_folders([sweep.path])
                artifacts = outcome.write(frontier, sweep.path)
                outcome.draw_layers(sweep.path)
            if to_run or not parent.exists():
                parent.write("FINISHED" if stop.signal is None else "KILLED", frontier, artifacts)
            with clock.measuring("MLflow after the last trial"):
                leftover = mirror.close(30.0 if stop.signal is None else 5.0)
    outcome.show_table(frontier)
    outcome.show_summary(outcome.Summary(sweep.path, store, endings, clock.seconds, leftover))
    if stop.signal is not None:
        return 130 if stop.signal == signal.SIGINT else EXIT_PREEMPTED
    return 1 if any(ending.ended == "failed" for ending in endings) else 0
