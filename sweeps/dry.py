"""`--dry-run`: the trials of a sweep, what they ask for, what they cost, and how many run at once."""

from dataclasses import dataclass
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

from harness import ray_cluster
from harness.config import Recipe, TrialSpec
from harness.data.manifest import load_manifest
from harness.errors import UserError
from harness.plan import chosen_budget
from harness.run_dir import RunDir
from sweeps import driver
from sweeps.plan import Plan, Planner
from sweeps.resources import Demand, concurrency
from sweeps.space import Space


@dataclass(frozen=True)
class Outlook:
    """A plan as far as it can be made here: without the data or given weights there are no identities yet."""

    plan: Plan
    identities: bool
    at_once: int | None
    remarks: tuple[str, ...]


def outlook(space: Space, base: Recipe, runs_dir: Path) -> Outlook:
    """Plan a sweep whether or not this machine could run it. Raises `UserError` for points that are no recipes."""
    remarks = []
    try:
        checksum = driver.dataset(base)
    except UserError as error:
        checksum = ""
        remarks.append(f"cannot start here: {error}")
    if base.model.weights is not None and not Path(base.model.weights).is_file():
        remarks.append(f"cannot start here: model.weights = {base.model.weights} is not a file")
        base = base.model_copy(update={"model": base.model.model_copy(update={"weights": None})})
    identities = not remarks
    planner = Planner(space, base, (runs_dir / space.name).resolve(), checksum)
    plan = planner.plan()
    at_once = None
    if not ray_cluster.uses_existing_cluster():
        nodes = ray_cluster.local_nodes(gpus=base.run.gpus_per_worker > 0)
        try:
            demands = {Demand.of(spec.recipe) for spec in plan.trials}
            at_once = min(concurrency(demand, nodes, space.name, space.max_concurrent) for demand in demands)
            remarks += driver.idle_remarks(plan, space, nodes)
        except UserError as error:
            remarks.append(f"cannot start here: {error}")
    try:
        driver.check_budgets(planner, plan)
        driver.check_policies(plan)
    except UserError as error:
        remarks.append(f"cannot start: {error}")
    return Outlook(plan, identities, at_once, tuple(remarks))


def show(space: Space, seen: Outlook) -> None:
    """Print the plan; nothing is started or written (but small data sets that write themselves)."""
    table = Table(box=box.SIMPLE_HEAD)
    for header in ("trial", "identity", "needs", "epochs", "hours", "state"):
        table.add_column(header, no_wrap=True, justify="right" if header in ("epochs", "hours") else "left")
    hours = [estimated_hours(space, spec) for spec in seen.plan.trials]
    for spec, cost in zip(seen.plan.trials, hours, strict=True):
        state = "done" if RunDir(spec.run_dir).result_path.is_file() else "to run"
        key = spec.key if seen.identities else "-"
        table.add_row(spec.label, key, str(Demand.of(spec.recipe)), str(epochs(spec.recipe)), _hours(cost), state)
    console = Console(highlight=False, soft_wrap=True)
    console.width = max(console.width, 140)
    console.print(table)
    if space.search.algorithm == "optuna":
        console.print(f"optuna finds {space.search.samples} points as it goes; listed are those that are known")
    at_once = "how many at once depends on the cluster" if seen.at_once is None else f"{seen.at_once} at once"
    console.print(f"{len(seen.plan.trials)} trials, {at_once}")
    known = [cost for cost in hours if cost is not None]
    if known:
        console.print(f"estimated: {sum(known):.3g} worker-hours in all, as [estimate] of the space says")
    for remark in seen.remarks:
        console.print(remark, markup=False)


def epochs(recipe: Recipe) -> int:
    """Epochs of training that a trial adds to its full-precision network and to a search that it shares, or its own."""
    if recipe.search.method == "full_precision":
        return recipe.pretrain.epochs
    if chosen_budget(recipe.search) is not None:
        return recipe.finetune.epochs
    return recipe.search.epochs + recipe.finetune.epochs


def estimated_hours(space: Space, spec: TrialSpec) -> float | None:
    """Worker-hours from the space's own estimate of the speed; None without one, or without the data."""
    if space.estimate is None:
        return None
    try:
        images = load_manifest(Path(spec.recipe.data.dir), "train").num_samples
    except UserError:
        return None
    return images * epochs(spec.recipe) / space.estimate.images_per_s_per_worker / 3600


def _hours(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"
