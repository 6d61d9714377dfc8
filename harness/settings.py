"""Constants, and how TOML becomes validated settings, shared by rooms that must start without torch."""

import signal
import tomllib
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from harness.errors import EXIT_PREEMPTED, EXIT_USER_ERROR, UserError, nearest

__all__ = [
    "CHECKPOINT_FORMAT", "DEFAULT_RUNS_DIR", "EXIT_PREEMPTED", "EXIT_USER_ERROR", "LEAVE_SIGNALS",
    "LONE_EXPERIMENT", "RAY_SUBMISSION_VARIABLE", "RESULT_SCHEMA", "STAGE_FORMAT", "apply_override", "explain",
]  # fmt: skip

# SIGTERM comes from schedulers and `kill`, SIGUSR2 from `sbatch --signal` before the time limit.
LEAVE_SIGNALS = (signal.SIGTERM, signal.SIGUSR2)

RESULT_SCHEMA = 1
# Part of every trial's identity: raise it when a change of the stages changes their results.
STAGE_FORMAT = 2
# Raise it when old checkpoints can no longer be read.
CHECKPOINT_FORMAT = 2

DEFAULT_RUNS_DIR = "runs"
# Where a tracking store keeps runs that belong to no sweep.
LONE_EXPERIMENT = "harness"
# Under this name every process of a `ray job submit` is told which submission it belongs to.
RAY_SUBMISSION_VARIABLE = "RAY_SUBMISSION_ID"


def apply_override(tree: dict[str, Any], override: str) -> None:
    """Write one `section.key=value` into plain data; the value is TOML, or a bare string, or `null`."""
    path, equals, text = override.partition("=")
    keys = path.strip().split(".")
    if not equals or len(keys) < 2 or not all(keys):
        raise UserError(f"override {override!r} is not of the form section.key=value, e.g. search.lambda=0.3")
    value: Any
    try:
        value = None if text.strip() == "null" else tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text.strip()
    for key in keys[:-1]:
        tree = tree.setdefault(key, {})
        if not isinstance(tree, dict):
            raise UserError(f"override {override!r}: {key!r} is a value, not a section")
    tree[keys[-1]] = value


def explain(error: ValidationError, root: type[BaseModel], origin: str) -> str:
    """One readable message for a validation error of `root`: a line per problem, unknown keys with the nearest name."""
    lines = []
    for problem in error.errors(include_url=False):
        place = ".".join(str(part) for part in problem["loc"])
        if problem["type"] == "extra_forbidden":
            allowed = sorted(_fields(root, problem["loc"][:-1]))
            lines.append(f"unknown key `{place}`: {nearest(str(problem['loc'][-1]), allowed)}")
        elif problem["type"] == "missing":
            lines.append(f"`{place}` is missing")
        else:
            value = "" if isinstance(problem["input"], (Mapping, BaseModel)) else f" = {problem['input']!r}"
            message = problem["msg"].removeprefix("Value error, ").removeprefix("Input ")
            lines.append(f"`{place}`{value}: {message}" if place else message)
    return f"{origin}: " + "\n  ".join(dict.fromkeys(lines))


def _fields(model: type[BaseModel], path: Sequence[int | str]) -> dict[str, FieldInfo]:
    for part in path:
        field = next((f for name, f in model.model_fields.items() if part in (name, f.alias)), None)
        if field is None or not (isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)):
            return {}
        model = field.annotation
    return {field.alias or name: field for name, field in model.model_fields.items()}
