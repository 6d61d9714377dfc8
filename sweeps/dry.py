"""`--dry-run`: the trials of a sweep, what they ask for, what they cost, and how many run at once."""

from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

from harness.config import Recipe, TrialSpec
from harness.run_dir import RunDir
from sweeps.driver import Sweep
from sweeps.resources import Demand


def show(sweep: Sweep) -> None:
    """Print the plan; nothing is started or written (but small data sets that write themselves)."""
    table = Table(box=box.SIMPLE_HEAD)
    for header in ("trial", "identity", "needs", "epochs", "hours", "state"):
        table.add_column(header, no_wrap=True, justify="right" if header in ("epochs", "hours") else "left")
    hours = [estimated_hours(sweep, spec) for spec in sweep.plan.trials]
    for spec, cost in zip(sweep.plan.trials, hours, strict=True):
        state = "done" if RunDir(spec.run_dir).result_path.is_file() else "to run"
        cells = (spec.label, spec.key, str(Demand.of(spec.recipe)), str(epochs(spec.recipe)), _hours(cost), state)
        table.add_row(*cells)
    console = Console(highlight=False)
    console.width = max(console.width, 140)
    console.print(table)
    count = sweep.total
    if sweep.space.search.algorithm == "optuna":
        console.print("optuna finds the points as it goes; listed are those that are known")
    if sweep.nodes is None:
        console.print(f"{count} trials; how many run at once depends on the cluster at RAY_ADDRESS")
    else:
        at_once = sweep.at_once(sweep.nodes)
        console.print(f"{count} trials, {at_once} at once")
    known = [cost for cost in hours if cost is not None]
    if known:
        console.print(f"estimated: {sum(known):.3g} worker-hours in all, as [estimate] of the space says")


def epochs(recipe: Recipe) -> int:
    """Epochs of training that a trial adds to its full-precision network, or that network's own."""
    if recipe.search.method == "full_precision":
        return recipe.pretrain.epochs
    return recipe.search.epochs + recipe.finetune.epochs


def estimated_hours(sweep: Sweep, spec: TrialSpec) -> float | None:
    """Worker-hours from the space's own estimate of the speed; None without one."""
    if sweep.space.estimate is None:
        return None
    from harness.data.manifest import load_manifest

    images = load_manifest(Path(spec.recipe.data.dir), "train").num_samples
    return images * epochs(spec.recipe) / sweep.space.estimate.images_per_s_per_worker / 3600


def _hours(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"
