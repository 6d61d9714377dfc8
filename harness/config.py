"""Recipes: what one trial does, as validated and frozen data. Torch-free."""

import tomllib
from collections.abc import Mapping, Sequence
from importlib import resources
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from harness.errors import UserError, nearest, require_file
from harness.settings import apply_override, explain

Method = Literal[
    "full_precision",
    "sbs",
    "sbs_prune",
    "sbs_quant",
    "uniform_2",
    "uniform_4",
    "uniform_8",
    "prune_then_quant",
    "policy",
]
ModelName = Literal[
    "resnet20",
    "resnet32",
    "resnet56",
    "resnet18",
    "resnet34",
    "resnet50",
    "resnet101",
    "mobilenetv2",
    "mobilenetv2_cifar",
]
Share = Annotated[float, Field(ge=0.0, le=1.0)]
Positive = Annotated[float, Field(gt=0.0)]
NonNegative = Annotated[float, Field(ge=0.0)]
Count = Annotated[int, Field(ge=1)]


class Section(BaseModel):
    """A frozen part of a recipe that refuses unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True, allow_inf_nan=False)


class ModelConfig(Section):
    """The network; `weights` names a state dict to start from instead of random values."""

    name: ModelName
    num_classes: Annotated[int, Field(ge=2)]
    weights: str | None = None


class DataConfig(Section):
    """The images. `batch_size` is global (all ranks, all accumulated parts), sizes in pixels, `workers` per rank.

    `crop_scale`: area of a random resized crop; `color_jitter`: brightness, contrast, saturation; `cutout`: side of the
    square; `resize_schedule`: pairs (share of the stage's epochs, image size from there on); `mean` and `std`: 0 to
    255, by default those of the training images.
    """

    source: str
    dir: str
    backend: Literal["ffcv", "torch"] = "ffcv"
    image_size: Annotated[int, Field(ge=8)]
    eval_image_size: Annotated[int, Field(ge=8)] | None = None
    eval_crop_share: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    batch_size: Count
    eval_batch_size: Count | None = None
    workers: Count = 1
    augment: Literal["none", "translate", "crop_flip", "resized_crop_flip"] = "none"
    pad: Annotated[int, Field(ge=0)] = 4
    crop_scale: tuple[Share, Share] = (0.08, 1.0)
    color_jitter: tuple[Share, Share, Share] = (0.0, 0.0, 0.0)
    cutout: Annotated[int, Field(ge=0)] = 0
    resize_schedule: tuple[tuple[Share, Annotated[int, Field(ge=8)]], ...] = ()
    memory: Literal["auto", "cache", "stream"] = "auto"
    order: Literal["auto", "random", "quasi_random"] = "auto"
    mean: tuple[float, float, float] | None = None
    std: tuple[Positive, Positive, Positive] | None = None


class TrainConfig(Section):
    """One stage of training. `lr` holds at a global batch of `lr_batch_size` and is scaled linearly from there."""

    epochs: Annotated[int, Field(ge=0)]
    lr: Positive
    lr_batch_size: Count | None = None
    optimizer: Literal["sgd", "adamw"] = "sgd"
    momentum: Share = 0.9
    nesterov: bool = True
    weight_decay: NonNegative = 1e-4
    clip_lr: Positive | None = None
    schedule: Literal["cosine", "step", "one_cycle", "constant"] = "cosine"
    warmup_epochs: NonNegative = 0.0
    step_epochs: tuple[Count, ...] = ()
    step_factor: Positive = 0.1
    final_lr_share: Share = 0.0
    label_smoothing: Share = 0.0
    clip_norm: Positive | None = None
    accumulate: Count = 1
    ema_decay: Annotated[float, Field(gt=0.0, lt=1.0)] | None = None
    distill: Share = 0.0
    distill_temperature: Positive = 4.0

    @model_validator(mode="after")
    def _schedule_is_whole(self) -> Self:
        if (self.schedule == "step") != bool(self.step_epochs):
            raise ValueError("`step_epochs` and `schedule = 'step'` go together: set both or neither")
        if self.epochs and self.warmup_epochs >= self.epochs:
            raise ValueError(f"warmup_epochs = {self.warmup_epochs:g} must be less than epochs = {self.epochs}")
        return self


class SearchConfig(TrainConfig):
    """The search stage and the method.

    What drives the search is one of `lambda`, `budget` (share of full precision's BOPs) and `gbops`. `snapshots`:
    falling budgets whose networks all come from one search; `budget` says which of them is wanted (else the last).
    `policy`: file of the policy that method `policy` trains. `norm_batches`: training batches from which batch norms
    are estimated anew before a network is validated in a search, frozen or finished; 0 leaves running statistics.
    """

    method: Method = "sbs"
    lambda_: Annotated[float | None, Field(ge=0.0, alias="lambda")] = None
    budget: Annotated[float | None, Field(gt=0.0, le=1.0)] = None
    gbops: Positive | None = None
    snapshots: tuple[Annotated[float, Field(gt=0.0, le=1.0)], ...] = ()
    policy: str | None = None
    weight_bits: tuple[Count, ...] = (2, 4, 8)
    activation_bits: tuple[Count, ...] = (2, 4, 8)
    group_size: Count = 4
    max_prune_share: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.7
    prune_only_bits: Literal[8, 32] = 32
    bop_gradient: Literal["alternate", "joint"] = "joint"
    calibration_batches: Count = 4
    norm_batches: Annotated[int, Field(ge=0)] = 16

    @model_validator(mode="before")
    @classmethod
    def _thresholds_have_no_rates(cls, tree: Any) -> Any:
        gone = [key for key in ("bit_threshold_lr", "prune_threshold_lr") if isinstance(tree, Mapping) and key in tree]
        if gone:
            raise ValueError(
                f"`search.{gone[0]}` = {tree[gone[0]]!r} is gone: remove it. Thresholds move at a pace of their own "
                "that fits any network, batch size and number of epochs (docs/method.md, section 3)"
            )
        return tree

    @model_validator(mode="after")
    def _policy_is_set(self) -> Self:
        if (self.method == "policy") != (self.policy is not None):
            raise ValueError(
                "`policy` and `method = 'policy'` go together: name the file of the policy to train, e.g. "
                "policy = 'policy.json', or choose another method"
            )
        return self

    @model_validator(mode="after")
    def _pressure_is_set(self) -> Self:
        for name in ("weight_bits", "activation_bits"):
            check_nesting(name, getattr(self, name))
        if self.ema_decay is not None:
            raise ValueError("`ema_decay` is for pretrain and finetune: the gates of a search decide on live weights")
        if searches(self.method):
            self._check_drive()
        return self

    def _check_drive(self) -> None:
        given = {"lambda": self.lambda_, "gbops": self.gbops, "budget": self.budget or self.snapshots or None}
        named = [name for name, value in given.items() if value is not None]
        if not named:
            raise ValueError(
                f"`lambda` is missing: method {self.method!r} searches under its pressure (0 exerts none); or give a "
                "`budget` (share of full precision's BOPs) or `gbops`"
            )
        if len(named) > 1:
            raise ValueError(f"{' and '.join(named)} exclude one another: each says what drives the search; keep one")
        if named != ["lambda"] and self.method == "prune_then_quant":
            raise ValueError(f"{named[0]} is for methods with one search; give prune_then_quant a `lambda`")
        if any(left <= right for left, right in pairwise(self.snapshots)):
            raise ValueError(f"snapshots = {list(self.snapshots)} must fall, e.g. [0.05, 0.03, 0.015]")
        if self.snapshots and self.budget is not None and self.budget not in self.snapshots:
            raise ValueError(
                f"budget = {self.budget:g} is none of snapshots = {list(self.snapshots)}: choose one of them, "
                "or set snapshots = [] for a search of its own"
            )


def check_nesting(name: str, bits: Sequence[int]) -> None:
    """Raise ValueError unless every grid of 2**b - 1 steps contains the one before (`sbs.space` holds the same rule).

    Said here as well, since a recipe is read where torch is not loaded, long before a search begins.
    """
    if tuple(bits) == (32,):
        return
    if not bits or max(bits) > 16:
        raise ValueError(f"{name} = {list(bits)}: give bit-widths from 1 to 16, e.g. [2, 4, 8], or [32] alone")
    for low, high in pairwise(bits):
        if low >= high or (2**high - 1) % (2**low - 1):
            raise ValueError(
                f"{name} = {list(bits)}: the {low}-bit grid is not contained in the {high}-bit grid; give rising "
                "bit-widths that divide one another, e.g. [2, 4, 8], [1, 2, 4, 8] or [4, 8]"
            )


class RunConfig(Section):
    """Where and how it runs: ranks, devices, arithmetic, safety. `workers` is a number of ranks or [min, max].

    `remote`: an fsspec URL under which a copy of the run directory is kept.
    """

    seed: Annotated[int, Field(ge=0)] = 0
    workers: Count | tuple[Count, Count] = 1
    cpus_per_worker: Positive = 1.0
    gpus_per_worker: NonNegative = 0.0
    threads: Count = 1
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    compile: bool = False
    cuda_graph: Literal["auto"] | bool = "auto"
    deterministic: bool = True
    sync_batchnorm: bool = False
    flip_tta: bool = False
    checkpoint_every_s: Positive = 60.0
    checkpoint_every_steps: Count | None = None
    keep_checkpoints: Count = 2
    max_restarts: Annotated[int, Field(ge=0)] = 5
    stall_limit_s: Positive = 600.0
    profile_steps: Annotated[int, Field(ge=0)] = 0
    remote: str | None = None

    @model_validator(mode="after")
    def _run_is_possible(self) -> Self:
        if isinstance(self.workers, tuple) and self.workers[0] > self.workers[1]:
            raise ValueError(f"workers = {list(self.workers)} must be [min, max] with min <= max")
        if self.gpus_per_worker > 1 and self.gpus_per_worker % 1:
            raise ValueError(
                f"gpus_per_worker = {self.gpus_per_worker:g} is no whole number: a rank uses one GPU; set it to 1"
            )
        if 0 < self.gpus_per_worker < 1 < self.max_workers:
            workers = self.workers if isinstance(self.workers, int) else list(self.workers)
            raise ValueError(
                f"gpus_per_worker = {self.gpus_per_worker:g} with workers = {workers} puts several ranks on one GPU, "
                "which NCCL refuses: set gpus_per_worker = 1, or workers = 1 (several trials may share a GPU)"
            )
        if self.sync_batchnorm and not self.gpus_per_worker:
            raise ValueError("`sync_batchnorm` needs GPUs (NCCL): set gpus_per_worker, or leave it out")
        return self

    @property
    def min_workers(self) -> int:
        """The fewest ranks this trial may run with."""
        return self.workers if isinstance(self.workers, int) else self.workers[0]

    @property
    def max_workers(self) -> int:
        """The most ranks this trial may run with."""
        return self.workers if isinstance(self.workers, int) else self.workers[1]


class Recipe(Section):
    """Everything that decides one trial: pretrain -> search -> compress -> finetune -> report."""

    model: ModelConfig
    data: DataConfig
    pretrain: TrainConfig
    search: SearchConfig
    finetune: TrainConfig
    run: RunConfig = RunConfig()

    @model_validator(mode="after")
    def _batch_divides(self) -> Self:
        stages = {"pretrain": self.pretrain, "search": self.search, "finetune": self.finetune}
        for name, stage in stages.items():
            for workers in range(self.run.min_workers, self.run.max_workers + 1):
                parts = workers * stage.accumulate
                if self.data.batch_size % parts:
                    raise ValueError(
                        f"data.batch_size = {self.data.batch_size} does not divide into run.workers = {workers} "
                        f"x {name}.accumulate = {stage.accumulate} equal parts; take a multiple of {parts}"
                    )
        return self

    def to_dict(self) -> dict[str, Any]:
        """Plain data under the names that the recipe file uses."""
        return self.model_dump(mode="json", by_alias=True)


class TrialSpec(Section):
    """One trial as it travels to other processes: recipe, identity, where it lives, what it starts from."""

    recipe: Recipe
    key: str
    label: str
    run_dir: str
    init: str | None = None
    stage_cache: str | None = None


def recipe_names() -> list[str]:
    """Names of the recipes that come with the package."""
    folder = resources.files("harness") / "recipes"
    return sorted(Path(entry.name).stem for entry in folder.iterdir() if entry.name.endswith(".toml"))


def load_recipe(name_or_path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe by its name or from a file, apply overrides such as `search.lambda=0.3`, and validate it.

    Raises `UserError` naming file, key, value and what is allowed.
    """
    text, origin = _recipe_text(str(name_or_path))
    try:
        tree = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise UserError(f"{origin} is not valid TOML: {error}") from None
    return parse_recipe(tree, origin, overrides)


def parse_recipe(tree: Mapping[str, Any], origin: str, overrides: Sequence[str] = ()) -> Recipe:
    """Validate plain data as a recipe; `origin` is what messages call its source."""
    merged: dict[str, Any] = {key: dict(value) if isinstance(value, Mapping) else value for key, value in tree.items()}
    _drop_other_drives(merged.get("search"), overrides)
    for override in overrides:
        apply_override(merged, override)
    try:
        return Recipe.model_validate(merged)
    except ValidationError as error:
        raise UserError(explain(error, Recipe, origin)) from None


DRIVES: tuple[frozenset[str], ...] = (
    frozenset({"search.lambda"}),
    frozenset({"search.gbops"}),
    frozenset({"search.budget", "search.snapshots"}),
)
"""The keys that say what drives a search; those of one group go together, those of two exclude one another."""


def _drop_other_drives(search: Any, overrides: Sequence[str]) -> None:
    """An override of what drives a search replaces what the recipe says: TOML has no null to unset it with."""
    named = (override.partition("=") for override in overrides)
    keys = {key.strip() for key, _, value in named if value.strip() != "null"}
    chosen = [group for group in DRIVES if keys & group]
    if not isinstance(search, dict) or not chosen:
        return
    dropped = frozenset().union(*DRIVES) - frozenset().union(*chosen)
    if "search.snapshots" in keys:
        dropped |= {"search.budget"}  # one of the list that is replaced
    for key in dropped:
        search.pop(key.removeprefix("search."), None)


def _recipe_text(name_or_path: str) -> tuple[str, str]:
    if name_or_path.endswith(".toml") or "/" in name_or_path:
        remedy = f"Give a TOML file or one of the named recipes: {', '.join(recipe_names())}."
        return require_file(Path(name_or_path), "recipe", remedy).read_text(encoding="utf-8"), name_or_path
    if name_or_path not in recipe_names():
        raise UserError(f"no recipe is named {name_or_path!r}: {nearest(name_or_path, recipe_names())}")
    source = resources.files("harness") / "recipes" / f"{name_or_path}.toml"
    return source.read_text(encoding="utf-8"), f"recipe {name_or_path}"


def searches(method: str) -> bool:
    """Whether a method searches, under the pressure of lambda or towards a budget."""
    return method != "full_precision" and not is_fixed(method)


def is_fixed(method: str) -> bool:
    """Whether a method trains a policy that is given from the start."""
    return method == "policy" or method.startswith("uniform_")


def scaled_lr(stage: TrainConfig, batch_size: int) -> float:
    """Learning rate of a stage at a global batch (linear rule)."""
    return stage.lr if stage.lr_batch_size is None else stage.lr * batch_size / stage.lr_batch_size
