"""A sweep's own folder: what it was started with (sweep.json), so that the same name always means the same thing."""

import fcntl
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from harness.config import DRIVES, Recipe, TrialSpec, parse_recipe
from harness.errors import UserError
from harness.run_dir import read_json, write_json
from sweeps.plan import flat
from sweeps.space import Space

SCHEMA = 1
LOCK = "lock"
_NEUTRAL = {"data.dir", "data.workers", "data.memory", "run.cpus_per_worker", "run.seed"}
"""Recipe keys that may change from one start to the next: where a sweep runs does not change its results."""


def claim(folder: Path, space: Space, base: Recipe, checksum: str, trials: Sequence[TrialSpec]) -> None:
    """Note what this sweep is, or check that it still is what it was; more points are welcome, another base is not.

    Raises `UserError` that lists what changed.
    """
    path = folder / "sweep.json"
    before = read_json(path)
    if before is not None:
        varied = {*space.axes, *before["axes"]}
        then = {"data": before["data"], **lasting(_recipe(before, path), varied)}
        now = {"data": checksum, **lasting(base, varied)}
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


def lasting(base: Recipe, varied: Iterable[str]) -> dict[str, Any]:
    """`section.key` -> value of all that trials share: not axes, methods, seeds, lambda, budgets nor where they run."""
    left_out = {*varied, "search.method", *_NEUTRAL}.union(*DRIVES)
    return {key: value for key, value in flat(base.to_dict()).items() if key not in left_out}


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Keep other drivers out of a sweep's folder. Raises `UserError` if one is at work there.

    A start that fails before it leaves anything in the folder takes back the folders that it made.
    """
    made = [each for each in (folder, *folder.parents) if not each.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / LOCK).open("w", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"another `sweeps run` works in {folder}. Wait for it, or give this one another name (--name)."
            ) from None
        try:
            yield
        except BaseException:
            _take_back(folder, made)
            raise


def _take_back(folder: Path, made: Sequence[Path]) -> None:
    """Remove the lock and the folders that were `made` for it, innermost first, unless something lies in them."""
    if folder not in made or [path.name for path in folder.iterdir()] != [LOCK]:
        return
    (folder / LOCK).unlink()
    with suppress(OSError):  # no longer empty: somebody else has begun to work there
        for each in made:
            each.rmdir()
