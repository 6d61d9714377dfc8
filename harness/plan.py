"""What a method's trial consists of: its stages, how each trains, and what each one's outcome depends on. Pure."""

from harness.config import Recipe, SearchConfig, TrainConfig, is_fixed, searches
from harness.identity import digest, identity

# A gate that is tried and taken back flips twice.
_MOST_FLIPS_PER_GATE = 3.0
# However few steps a search has, a gate moves once it has been looked at for 16 of them (`sbs.gates.Pace`).
_STEPS_TO_JUDGE = 16
_WIDE_GAP_POINTS = 10.0


def plan(recipe: Recipe) -> tuple[str, ...]:
    """The stages that a method goes through before its report."""
    method = recipe.search.method
    if method == "full_precision":
        return ("pretrain",)
    if is_fixed(method):
        return ("pretrain", "compress", "finetune")
    if method == "prune_then_quant":
        return ("pretrain", "prune", "search", "compress", "finetune")
    return ("pretrain", "search", "compress", "finetune")


def stage_config(recipe: Recipe, stage: str) -> TrainConfig | None:
    """How a stage trains; None for one that does not.

    All methods get the same epochs: given policies train as long as a search and its finetune, prune-then-quantise
    divides the search's epochs among its two searches.
    """
    method, epochs = recipe.search.method, recipe.search.epochs
    if stage == "finetune" and is_fixed(method):
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


def remark_on_gates(search: SearchConfig, step: int, steps: int, figures: dict[str, float]) -> str | None:
    """A warning, with its cause, of a search whose gates do not do what they should."""
    if not figures["gates/flips"] and search.lambda_ != 0 and 2 * step >= steps:
        if step <= _STEPS_TO_JUDGE:
            return (
                f"no gate can have moved after {step} of {steps} steps: each is looked at for {_STEPS_TO_JUDGE} steps "
                "first; raise the epochs"
            )
        drive = "the epochs" if search.lambda_ is None else f"search.lambda (now {search.lambda_:g})"
        return (
            f"no gate has moved after {step} of {steps} steps: the loss gains more by every gate than the pressure on "
            f"it; raise {drive}"
        )
    if figures["gates/flips_per_gate"] > _MOST_FLIPS_PER_GATE:
        return (
            f"gates chatter: {figures['gates/flips_per_gate']:.1f} flips per gate after {step} of {steps} steps; what "
            "the loss says of them contradicts itself from step to step: raise data.batch_size or the epochs, or lower "
            "search.lr"
        )
    gap = _of_any_stage(figures, "train_top1") - _of_any_stage(figures, "top1")
    if search.norm_batches == 0 and gap > _WIDE_GAP_POINTS:
        return (
            f"validation is {gap:.1f} points below training: batch norm's running statistics belong to networks before "
            "the last flips; set search.norm_batches, so that they are estimated anew"
        )
    return None


def _of_any_stage(figures: dict[str, float], name: str) -> float:
    """A figure of the one stage that these are of."""
    return next((value for key, value in figures.items() if key.endswith(f"/{name}")), 0.0)


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
