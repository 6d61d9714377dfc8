"""From a space to its trials: every point as a validated recipe with an identity, a folder and a place in the order."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness.config import DRIVES, Recipe, TrialSpec, searches
from harness.identity import trial_key, trial_label
from harness.plan import chosen_budget
from harness.run_dir import RunDir, read_json
from harness.tracking.record import trial_dirs
from sweeps.space import Point, Space, recipe_at

PRUNED = "pruned.json"
"""The scheduler stopped the trial: it will not go on unless this file is deleted or the scheduler becomes fifo."""


NO_DRIVE: dict[str, Any] = {"lambda_": None, "budget": None, "gbops": None, "snapshots": ()}
"""What a method without a search has none of."""


@dataclass(frozen=True)
class Plan:
    """The trials of a sweep in waves: full-precision networks, what starts from their weights, then snapshots.

    `last`: the trials about the snapshots of a search but its last one, whose trial is in `rest` and runs the search.
    """

    first: tuple[TrialSpec, ...]
    rest: tuple[TrialSpec, ...]
    last: tuple[TrialSpec, ...] = ()

    @property
    def trials(self) -> tuple[TrialSpec, ...]:
        """All waves."""
        return self.first + self.rest + self.last

    def search_of(self, spec: TrialSpec) -> TrialSpec | None:
        """The trial of `rest` that runs the search whose snapshot `spec` is about; None if `spec` has to search itself.

        That happens where a space names budgets one by one and leaves out the last of the snapshots.
        """
        wanted = _for_all_snapshots(spec.recipe)
        return next((other for other in self.rest if _for_all_snapshots(other.recipe) == wanted), None)


@dataclass(frozen=True)
class Planner:
    """Makes trials for recipes of one sweep: same recipe, same data, same trial."""

    space: Space
    base: Recipe
    folder: Path
    checksum: str

    def plan(self) -> Plan:
        """All trials that are known beforehand. Raises `UserError` for a point that is not a valid recipe.

        Optuna asks as it goes: then these are the full-precision network and the points that the folder holds already.
        """
        if self.space.search.algorithm != "optuna":
            return self.of_points(self.space.points())
        known = self.known_points()
        if known:
            return self.of_points(known)
        return Plan((self.full_precision(self.ends()[0]),), ())

    def ends(self) -> list[Recipe]:
        """Recipes at both ends of all that Optuna may ask for; none where all points are known."""
        if self.space.search.algorithm != "optuna":
            return []
        method, seed = self.space.methods[0], self.space.seeds[0]
        values = {k: axis if isinstance(axis, tuple) else axis.values() for k, axis in self.space.axes.items()}
        points = [{key: each[end] for key, each in values.items()} for end in (0, -1)]
        return [recipe_at(self.base, self.space, point, method=method, seed=seed) for point in points]

    def at(self, point: Point) -> TrialSpec:
        """The one trial at a point that Optuna suggests."""
        (spec,) = self.of_points([point]).rest
        return spec

    def known_points(self) -> list[Point]:
        """Points whose trials have begun in this folder, by their config.json."""
        configs = [read_json(run.config_path) or {} for run in trial_dirs(self.folder)]
        searched = [flat(config) for config in configs if config["search"]["method"] == self.space.methods[0]]
        return [{key: config[key] for key in self.space.axes} for config in searched]

    def of_points(self, points: Iterable[Point]) -> Plan:
        """Trials for these points, with every method and seed, each identity once."""
        first: dict[str, TrialSpec] = {}
        rest: dict[str, TrialSpec] = {}
        last: dict[str, TrialSpec] = {}
        for recipe, point in self._recipes(points):
            full = self.full_precision(recipe)
            first.setdefault(full.key, full)
            if recipe.search.method != "full_precision":
                spec = self._spec(recipe, point, init=str(RunDir(full.run_dir).weights_path))
                wave = rest if chosen_budget(recipe.search) is None else last
                wave.setdefault(spec.key, spec)
        return Plan(tuple(first.values()), tuple(rest.values()), tuple(last.values()))

    def full_precision(self, recipe: Recipe) -> TrialSpec:
        """The trial whose weights a trial of `recipe` starts from."""
        search = recipe.search.model_copy(update={"method": "full_precision", "policy": None} | NO_DRIVE)
        return self._spec(recipe.model_copy(update={"search": search}), {}, init=None)

    def _recipes(self, points: Iterable[Point]) -> Iterator[tuple[Recipe, Point]]:
        for point in points:
            for method in self.space.methods:
                for seed in self.space.seeds:
                    recipe = recipe_at(self.base, self.space, point, method=method, seed=seed)
                    if not searches(method):
                        search = recipe.search.model_copy(update=NO_DRIVE)
                        recipe = recipe.model_copy(update={"search": search})
                    for budget in (recipe.search.snapshots if recipe.search.budget is None else ()) or (None,):
                        change = {} if budget is None else {"budget": budget}
                        yield recipe.model_copy(update={"search": recipe.search.model_copy(update=change)}), point

    def _spec(self, recipe: Recipe, point: Point, *, init: str | None) -> TrialSpec:
        recipe = with_absolute_paths(recipe)
        key = trial_key(recipe, self.checksum)
        label = trial_label(recipe) + _suffix(point)
        run_dir = self._run_dir(key, label)
        shared = str(self.folder / "stages") if recipe.search.snapshots else None
        return TrialSpec(recipe=recipe, key=key, label=label, run_dir=str(run_dir), init=init, stage_cache=shared)

    def _run_dir(self, key: str, label: str) -> Path:
        """The trial's folder: the one it had before, whatever its label was then, or a new one."""
        before = sorted((self.folder / "trials").glob(f"*-{key[:8]}"))
        return before[0] if before else (self.folder / "trials" / f"{label}-{key[:8]}").resolve()


def _for_all_snapshots(recipe: Recipe) -> Recipe:
    return recipe.model_copy(update={"search": recipe.search.model_copy(update={"budget": None})})


def with_absolute_paths(recipe: Recipe) -> Recipe:
    """The same recipe for processes that start in other folders."""
    data = recipe.data.model_copy(update={"dir": str(Path(recipe.data.dir).resolve())})
    model, search = recipe.model, recipe.search
    if model.weights is not None:
        model = model.model_copy(update={"weights": str(Path(model.weights).resolve())})
    if search.policy is not None:
        search = search.model_copy(update={"policy": str(Path(search.policy).resolve())})
    return recipe.model_copy(update={"data": data, "model": model, "search": search})


def finished(specs: Iterable[TrialSpec]) -> list[TrialSpec]:
    """Those that have a result."""
    return [spec for spec in specs if RunDir(spec.run_dir).result_path.is_file()]


def unfinished(specs: Iterable[TrialSpec], space: Space) -> list[TrialSpec]:
    """Those that have none yet and were not stopped for good by the space's scheduler."""
    ends = ["result.json"] if space.scheduler.name == "fifo" else ["result.json", PRUNED]
    return [spec for spec in specs if not any((Path(spec.run_dir) / end).is_file() for end in ends)]


def flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested plain data as `section.key` -> value."""
    found: dict[str, Any] = {}
    for key, value in tree.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return found


def _suffix(point: Mapping[str, Any]) -> str:
    """What a label adds so that people can tell points apart: axes other than those that every label names."""
    named = {"search.policy", "model.name", "model.num_classes"}.union(*DRIVES)
    parts = [f"{key.rpartition('.')[2]}{_compact(value)}" for key, value in point.items() if key not in named]
    return "".join(f"-{part}" for part in parts)


def _compact(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, (list, tuple)):
        return "_".join(_compact(part) for part in value)
    return "".join(letter if letter.isalnum() or letter in "._+-" else "_" for letter in str(value))
