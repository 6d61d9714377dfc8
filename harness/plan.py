"""What a method's trial consists of: its stages, how each trains, and what each one's outcome depends on. Pure."""

from harness.config import Recipe, SearchConfig, TrainConfig, searches
from harness.identity import digest, identity


def plan(recipe: Recipe) -> tuple[str, ...]:
    """The stages that a method goes through before its report."""
    method = recipe.search.method
    if method == "full_precision":
        return ("pretrain",)
    if method.startswith("uniform_"):
        return ("pretrain", "compress", "finetune")
    if method == "prune_then_quant":
        return ("pretrain", "prune", "search", "compress", "finetune")
    return ("pretrain", "search", "compress", "finetune")


def stage_config(recipe: Recipe, stage: str) -> TrainConfig | None:
    """How a stage trains; None for one that does not.

    All methods get the same epochs: uniform networks train as long as a search and its finetune, prune-then-quantise
    divides the search's epochs among its two searches.
    """
    method, epochs = recipe.search.method, recipe.search.epochs
    if stage == "finetune" and method.startswith("uniform_"):
        return recipe.finetune.model_copy(update={"epochs": epochs + recipe.finetune.epochs})
    if method == "prune_then_quant" and stage in {"prune", "search"}:
        return recipe.search.model_copy(update={"epochs": epochs // 2 if stage == "prune" else epochs - epochs // 2})
    return {"pretrain": recipe.pretrain, "search": recipe.search, "finetune": recipe.finetune}.get(stage)


def stage_key(recipe: Recipe, stage: str, data_checksum: str, init: str | None = None) -> str:
    """Sixteen hex digits over all that the outcome of a stage depends on; `init` is a digest of given weights."""
    tree = identity(recipe, data_checksum)
    needed = {"model", "data", "run", "stage_format"} | ({"pretrain"} if init is None else set())
    if stage != "pretrain":
        needed.add("search")
    if stage == "search" and recipe.search.snapshots:
        tree["search"].pop("budget", None)  # one search for all of its snapshots
    if stage == "finetune":
        needed.add("finetune")
    return digest({"stage": stage, "init": init} | {key: tree[key] for key in needed})


def idle_gates(search: SearchConfig, step: int, steps: int, figures: dict[str, float]) -> str | None:
    """A warning when pressure has moved no gate by the middle of a search."""
    if figures["gates/flips"] or search.lambda_ == 0 or 2 * step < steps:
        return None
    drive = "the epochs" if search.lambda_ is None else f"search.lambda (now {search.lambda_:g})"
    nearest = min(value for name, value in figures.items() if name.startswith("gates/margin_"))
    return (
        f"no gate has moved after {step} of {steps} steps (nearest threshold margin {nearest:.3g}): "
        f"raise {drive} or search.bit_threshold_lr / search.prune_threshold_lr "
        f"(now {search.bit_threshold_lr:g} / {search.prune_threshold_lr:g})"
    )


def takes_budget(search: SearchConfig) -> bool:
    """Whether a search is driven by budgets instead of a lambda."""
    return search.lambda_ is None and searches(search.method)


def budgets(search: SearchConfig, full_bops: float) -> tuple[float, ...]:
    """The budgets of a search as falling shares of full precision's BOPs."""
    if search.snapshots:
        return search.snapshots
    return ((search.gbops * 1e9 / full_bops) if search.gbops is not None else (search.budget or 1.0),)


def chosen_budget(search: SearchConfig) -> float | None:
    """Which of the snapshots a trial is about; None for the one that the search ends with."""
    return search.budget if search.budget in search.snapshots[:-1] else None
