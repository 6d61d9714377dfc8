"""A sweep's own folder: what it was started with (sweep.json), so that the same name always means the same thing."""

import fcntl
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from harness.config import Recipe, TrialSpec, parse_recipe
from harness.errors import UserError
from harness.run_dir import read_json, write_json
from sweeps.space import Space

SCHEMA = 1
_NEUTRAL = {("data", "dir"), ("data", "workers"), ("run", "cpus_per_worker"), ("run", "seed")}
"""Recipe keys that may change from one start to the next: where a sweep runs does not change its results."""


def claim(folder: Path, space: Space, base: Recipe, checksum: str, trials: Sequence[TrialSpec]) -> None:
    """Note what this sweep is, or check that it still is what it was; more points are welcome, another base is not.

    Raises `UserError` that lists what changed.
    """
    path = folder / "sweep.json"
    before = read_json(path)
    if before is not None:
        varied = {*space.axes, *before["axes"]}
        then = {"data": before["data"], **flat(_recipe(before, path).to_dict(), without=varied)}
        now = {"data": checksum, **flat(base.to_dict(), without=varied)}
        changed = [
            f"{key}: {then.get(key)!r} before, {now.get(key)!r} now"
            for key in sorted(then.keys() | now.keys())
            if then.get(key) != now.get(key)
        ]
        if changed:
            listed = "\n  ".join(changed[:10])
            raise UserError(
                f"sweep {space.name!r} in {folder} was started with another configuration:\n  {listed}\n"
                f"Only points may be added to a sweep. Give this one another name (--name), or delete {folder}."
            )
    known = [] if before is None else before["trials"]
    keys = list(dict.fromkeys([*known, *(spec.key for spec in trials)]))
    folder.mkdir(parents=True, exist_ok=True)
    document: dict[str, Any] = {"schema": SCHEMA, "name": space.name, "data": checksum, "axes": sorted(space.axes)}
    document |= {"base": base.to_dict(), "space": space.model_dump(mode="json"), "trials": keys}
    write_json(path, document)


def _recipe(before: Mapping[str, Any], path: Path) -> Recipe:
    """The base of an earlier start; keys that recipes did not have then take their defaults."""
    return parse_recipe(before["base"], str(path))


def flat(tree: Mapping[str, Any], *, without: set[str], prefix: str = "") -> dict[str, Any]:
    """Nested plain data as `section.key` -> value, without neutral keys and the given ones."""
    found: dict[str, Any] = {}
    for key, value in tree.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            found |= flat(value, without=without, prefix=f"{name}.")
        elif name not in without and tuple(name.split(".", 1)) not in _NEUTRAL:
            found[name] = value
    varied = {"search.method", "search.lambda"}
    return {key: value for key, value in found.items() if key not in varied}


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Keep other drivers out of a sweep's folder. Raises `UserError` if one is at work there."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"another `sweeps run` works in {folder}. Wait for it, or give this one another name (--name)."
            ) from None
        yield
