"""Spaces: what a sweep tries, as validated data read from TOML, and the points that follow from it. Torch-free."""

import itertools
import json
import math
import random
import tomllib
from collections.abc import Iterable, Iterator, Sequence
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, PrivateAttr, ValidationError, model_validator

from harness.config import DRIVES, Method, Recipe, Section, explain, load_recipe, parse_recipe
from harness.errors import UserError, nearest, require_file

Point = dict[str, Any]
"""One value for every axis: recipe key -> value."""


class Distribution(Section):
    """What an axis draws from when it is not a plain list: exactly one of the three."""

    choice: tuple[Any, ...] | None = None
    uniform: tuple[float, float] | None = None
    log_uniform: tuple[float, float] | None = None

    @model_validator(mode="after")
    def _exactly_one(self) -> Self:
        given = [name for name in ("choice", "uniform", "log_uniform") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"give exactly one of choice, uniform, log_uniform (found: {', '.join(given) or 'none'})")
        for name in ("uniform", "log_uniform"):
            bounds = getattr(self, name)
            if bounds and (bounds[0] >= bounds[1] or (name == "log_uniform" and bounds[0] <= 0)):
                raise ValueError(f"{name} = {list(bounds)} must be [low, high] with low < high (log_uniform: 0 < low)")
        if self.choice is not None and not self.choice:
            raise ValueError("choice must not be empty")
        return self

    def values(self) -> tuple[Any, ...]:
        """The choices, or the lowest and the highest value."""
        return self.choice or self.uniform or self.log_uniform or ()

    def draw(self, generator: random.Random) -> Any:
        """One value; log-uniform ones are rounded to 6 significant digits so that they read well and hash stably."""
        if self.choice is not None:
            return generator.choice(self.choice)
        if self.uniform is not None:
            return float(f"{generator.uniform(*self.uniform):.6g}")
        assert self.log_uniform is not None
        low, high = self.log_uniform
        return float(f"{math.exp(generator.uniform(math.log(low), math.log(high))):.6g}")


class SearchPlan(Section):
    """How points are found. `samples` counts draws of random and optuna; grid takes every combination."""

    algorithm: Literal["grid", "random", "optuna"] = "grid"
    samples: Annotated[int, Field(ge=1)] | None = None
    seed: int = 0

    @model_validator(mode="after")
    def _samples_fit(self) -> Self:
        if (self.algorithm == "grid") != (self.samples is None):
            raise ValueError("`samples` belongs to algorithm = 'random' or 'optuna' and is needed there")
        return self


class SchedulerPlan(Section):
    """Which trials go on. `asha` stops trials whose top-1 lags at the same epoch; epochs count over all stages."""

    name: str = "fifo"
    grace_epochs: Annotated[int, Field(ge=1)] = 1
    reduction: Annotated[int, Field(ge=2)] = 3

    @model_validator(mode="after")
    def _is_supported(self) -> Self:
        refused = {
            "pbt": "population based training copies checkpoints between trials through Tune, which does not see "
            "those of Train worker groups: it would silently do nothing",
            "bohb": "BOHB pauses trials, and a paused trial loses its Train worker group",
        }
        if self.name in refused:
            raise ValueError(f"{self.name} is refused: {refused[self.name]}. Use fifo or asha")
        if self.name not in ("fifo", "asha"):
            raise ValueError(nearest(self.name, ["asha", "fifo"]))
        return self


class Estimate(Section):
    """For `--dry-run`: training images per second that one worker reaches in the search stage."""

    images_per_s_per_worker: Annotated[float, Field(gt=0)]


class Space(Section):
    """One sweep: a base recipe, what is set for every trial, the methods and seeds, and the axes that vary."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    recipe: str
    methods: tuple[Method, ...] = ("sbs",)
    seeds: tuple[Annotated[int, Field(ge=0)], ...] = (0,)
    retries: Annotated[int, Field(ge=0, le=10)] = 1
    max_concurrent: Annotated[int, Field(ge=1)] | None = None
    set: dict[str, Any] = {}  # noqa: RUF012 - pydantic copies defaults
    axes: dict[str, tuple[Any, ...] | Distribution] = {}  # noqa: RUF012
    search: SearchPlan = SearchPlan()
    scheduler: SchedulerPlan = SchedulerPlan()
    estimate: Estimate | None = None
    _origin: str = PrivateAttr(default="")

    @property
    def origin(self) -> str:
        """What messages call it: the file, or else the name."""
        return self._origin or f"space {self.name}"

    @model_validator(mode="after")
    def _is_coherent(self) -> Self:
        for key in ("search.method", "run.seed"):
            if key in self.axes or key in self.set:
                own = {"search.method": "methods", "run.seed": "seeds"}[key]
                raise ValueError(f"{key} is varied by the space's own key `{own}`, not by [axes] or [set]")
        if both := sorted(set(self.axes) & set(self.set)):
            raise ValueError(f"{', '.join(both)} stands in [set] and in [axes]: keep one")
        for key, axis in self.axes.items():
            if isinstance(axis, tuple) and not axis:
                raise ValueError(f"axis {key} is empty: give at least one value")
            if self.search.algorithm == "grid" and not isinstance(axis, tuple) and axis.choice is None:
                raise ValueError(f"axis {key} is a distribution: search.algorithm = 'grid' takes lists; use 'random'")
        if self.search.algorithm == "optuna":
            self._check_optuna()
        if not self.seeds or not self.methods:
            raise ValueError("`seeds` and `methods` need at least one value each")
        return self

    def _check_optuna(self) -> None:
        if len(self.seeds) > 1:
            raise ValueError("optuna learns from one seed: give one value in `seeds`")
        if len(self.methods) > 1 or self.methods[0] == "full_precision":
            raise ValueError("optuna learns about one method: give one that searches in `methods`")
        for key in self.axes:
            if not key.startswith(("search.", "finetune.")):
                raise ValueError(f"optuna varies search.* and finetune.* only (one full-precision network), not {key}")
        if self.scheduler.name != "fifo":
            raise ValueError("optuna needs the final BOPs of every trial: use scheduler.name = 'fifo'")

    def points(self) -> Iterator[Point]:
        """Every combination of the axes (grid) or `samples` draws (random); none for optuna, which asks as it goes."""
        if self.search.algorithm == "grid":
            values = [axis if isinstance(axis, tuple) else axis.choice or () for axis in self.axes.values()]
            for combination in itertools.product(*values):
                yield dict(zip(self.axes, combination, strict=True))
        elif self.search.algorithm == "random":
            generator = random.Random(self.search.seed)
            for _ in range(self.search.samples or 0):
                yield {
                    key: generator.choice(axis) if isinstance(axis, tuple) else axis.draw(generator)
                    for key, axis in self.axes.items()
                }


def space_names() -> list[str]:
    """Names of the spaces that come with the package."""
    folder = resources.files("sweeps") / "spaces"
    return sorted(Path(entry.name).stem for entry in folder.iterdir() if entry.name.endswith(".toml"))


def load_space(name_or_path: str | Path, *, name: str | None = None) -> Space:
    """Read a space by its name or from a file; `name` replaces the sweep's own.

    Raises `UserError` naming file, key, value and what is allowed.
    """
    text, origin = _text(str(name_or_path))
    try:
        tree = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise UserError(f"{origin} is not valid TOML: {error}") from None
    for key in ("set", "axes"):
        tree[key] = _dotted(tree.get(key, {}))
    if name is not None:
        tree["name"] = name
    recipe = str(tree.get("recipe", ""))
    if recipe.endswith(".toml") and not Path(recipe).is_absolute():
        tree["recipe"] = str(Path(origin).parent / recipe)
    try:
        space = Space.model_validate(tree)
    except ValidationError as error:
        raise UserError(explain(error, Space, origin)) from None
    space._origin = origin if origin.endswith(".toml") else f"space {origin}"  # noqa: SLF001 - ours
    return space


def base_recipe(space: Space, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe that all trials share: the named one, the space's [set], then `overrides`.

    Raises `UserError` if an override touches an axis, which would be silently overwritten, and for snapshots where one
    search cannot serve several trials.
    """
    keys = [override.partition("=")[0].strip() for override in overrides]
    for key, override in zip(keys, overrides, strict=True):
        if key in space.axes or key in ("search.method", "run.seed"):
            raise UserError(f"--set {override}: {key} is varied by space {space.name!r}; change it in the space's file")
    _check_one_drive(space, keys)
    given = {key: value for key, value in space.set.items() if not _other_drive(key, keys)}
    settings = [f"{key}={json.dumps(value)}" for key, value in given.items()]
    if "policy" in space.methods and "search.policy" in {*given, *keys}:
        settings.append("search.method=policy")
    try:
        base = load_recipe(space.recipe, [*settings, *overrides])
    except UserError as error:
        raise UserError(f"{space.origin}: recipe = {space.recipe!r}: {error}") from None
    if base.search.snapshots or "search.snapshots" in space.axes:
        _check_snapshots(space)
    return base


def _other_drive(key: str, keys: Iterable[str]) -> bool:
    """Whether `key` says what drives a search while one of `keys` says something else."""
    return any(key in group and bool(_drives(keys) - group) for group in DRIVES)


def _check_one_drive(space: Space, overrides: Sequence[str]) -> None:
    """A recipe's lambda gives way to a space's budget; within one space such a silent change would be a mistake."""
    for key in [*space.set, *overrides]:
        if _other_drive(key, space.axes):
            varied = ", ".join(sorted(_drives(space.axes)))
            raise UserError(
                f"space {space.name!r} varies {varied}, and {key} is set: each says what drives the search; keep one"
            )


def _drives(keys: Iterable[str]) -> set[str]:
    return set(keys) & set().union(*DRIVES)


def _check_snapshots(space: Space) -> None:
    if space.search.algorithm == "optuna":
        raise UserError("optuna asks for one network at a time: give search.budget, not search.snapshots")
    if space.scheduler.name != "fifo":
        raise UserError(
            f"scheduler {space.scheduler.name!r} would stop a search together with all of its snapshots: use 'fifo', "
            "or give search.budget for a search per network"
        )


def recipe_at(base: Recipe, space: Space, point: Point, *, method: str, seed: int) -> Recipe:
    """The recipe of one trial, validated; a policy goes to method `policy` alone.

    Raises `UserError` naming the point.
    """
    settings = {**point, "search.method": method, "run.seed": seed}
    where = ", ".join(f"{key} = {value!r}" for key, value in settings.items())
    if method != "policy":
        settings["search.policy"] = None
    overrides = [f"{key}={json.dumps(value)}" for key, value in settings.items()]
    return parse_recipe(base.to_dict(), f"{space.origin}, point ({where})", overrides)


def _dotted(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """`[axes.search] lambda = [...]` and `"search.lambda" = [...]` mean the same."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        is_section = isinstance(value, dict) and not set(value) & set(Distribution.model_fields)
        flat |= _dotted(value, f"{prefix}{key}.") if is_section else {f"{prefix}{key}": value}
    return flat


def _text(name_or_path: str) -> tuple[str, str]:
    if name_or_path.endswith(".toml") or "/" in name_or_path:
        remedy = f"Give a TOML file or one of the named spaces: {', '.join(space_names())}."
        return require_file(Path(name_or_path), "space", remedy).read_text(encoding="utf-8"), name_or_path
    if name_or_path not in space_names():
        raise UserError(f"no space is named {name_or_path!r}: {nearest(name_or_path, space_names())}")
    return (resources.files("sweeps") / "spaces" / f"{name_or_path}.toml").read_text(encoding="utf-8"), name_or_path
