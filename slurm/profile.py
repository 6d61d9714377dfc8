"""Profiles: what a site's cluster is like and what a job asks of it, as validated and frozen data read from TOML."""

import re
import tomllib
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from harness.errors import UserError, nearest, require_file
from harness.settings import DEFAULT_RUNS_DIR, apply_override, explain

Count = Annotated[int, Field(ge=1)]
Word = Annotated[str, Field(min_length=1, pattern=r"^[^\s'\"\\]+$")]
Line = Annotated[str, Field(min_length=1, pattern=r"^[^\n\r]+$")]
_TIME = re.compile(r"^(?:(?P<days>\d+)-)?(?P<parts>\d+(?::\d{1,2}){0,2})$")


class Section(BaseModel):
    """A frozen part of a profile that refuses unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class JobSection(Section):
    """What the job asks of the queue; `time` as SLURM writes it (`04:00:00`, `2-12`, minutes), `extra` the rest."""

    partition: Word | None = None
    account: Word | None = None
    qos: Word | None = None
    constraint: Word | None = None
    nodes: Count = 1
    time: str = "01:00:00"
    exclusive: bool = False
    extra: dict[Word, str | int | bool] = {}

    @field_validator("time", mode="before")
    @classmethod
    def _time_is_readable(cls, value: object) -> str:
        minutes(str(value))
        return str(value)


class NodeSection(Section):
    """What the job uses of each node. `scratch` is local to it and short; `container` goes before each command."""

    cpus: Count | None = None
    gpus: Annotated[int, Field(ge=0)] = 0
    memory_gb: Annotated[float, Field(gt=0)] | None = None
    interface: Word | None = None
    scratch: str = "/tmp"
    setup: tuple[Line, ...] = ()
    container: tuple[Line, ...] = ()
    python: str | None = None

    @field_validator("scratch")
    @classmethod
    def _scratch_is_short(cls, value: str) -> str:
        if not value.startswith("/") or len(value) > 25:
            raise ValueError(
                "must be an absolute path of at most 25 characters: Ray puts sockets into it, and a socket's path is "
                "limited to 107 bytes"
            )
        return value

    @model_validator(mode="after")
    def _container_has_a_python(self) -> Self:
        if self.container and not self.python:
            raise ValueError("with `container`, `python` must name the interpreter inside it, e.g. 'python3'")
        return self


class RequeueSection(Section):
    """How a job survives the queue: how often it may start again, how early it is warned, what a lost node means."""

    max: Annotated[int, Field(ge=0)] = 10
    warn_s: Annotated[int, Field(ge=5)] = 120
    on_node_loss: Literal["requeue", "fail", "ignore"] = "requeue"
    node_lost_after_s: Annotated[float, Field(ge=5)] = 60.0


class RaySection(Section):
    """The job's own Ray cluster; the object store's size is Ray's choice unless given."""

    object_store_gb: Annotated[float, Field(gt=0)] | None = None
    start_limit_s: Annotated[float, Field(gt=0)] = 300.0
    keep_logs: Literal["always", "on_failure", "never"] = "on_failure"


class StorageSection(Section):
    """Folders that every node sees. `runs` keeps one folder per submission; `snapshot` copies the code there."""

    runs: str = f"{DEFAULT_RUNS_DIR}/slurm"
    snapshot: bool = True


class Profile(Section):
    """One site, one kind of job."""

    job: JobSection = JobSection()
    node: NodeSection = NodeSection()
    requeue: RequeueSection = RequeueSection()
    ray: RaySection = RaySection()
    storage: StorageSection = StorageSection()

    @model_validator(mode="after")
    def _warning_fits(self) -> Self:
        if self.requeue.warn_s >= 60 * minutes(self.job.time):
            raise ValueError(
                f"requeue.warn_s = {self.requeue.warn_s} is not less than job.time = {self.job.time}: the command "
                "would be told to leave as soon as it starts"
            )
        return self


def minutes(text: str) -> int:
    """Minutes of a SLURM time (`90`, `90:00`, `1:30:00`, `2-12`, `2-12:30`, `2-12:30:00`), rounded up."""
    match = _TIME.match(text.strip())
    if match is None:
        raise ValueError("is not a time SLURM knows: write minutes, 'HH:MM:SS', 'D-HH' or 'D-HH:MM:SS'")
    parts = [int(part) for part in match["parts"].split(":")]
    if match["days"] is not None:
        hours, mins, secs = [*parts, 0, 0][:3]
        hours += 24 * int(match["days"])
    else:
        hours, mins, secs = ([0, *parts, 0] if len(parts) == 1 else [0, *parts])[-3:]
    total_s = 3600 * hours + 60 * mins + secs
    if total_s == 0:
        raise ValueError("must be longer than nothing")
    return -(-total_s // 60)


def profile_names() -> list[str]:
    """Names of the profiles that come with the package."""
    folder = resources.files("slurm") / "profiles"
    return sorted(Path(entry.name).stem for entry in folder.iterdir() if entry.name.endswith(".toml"))


def load_profile(name_or_path: str | None, overrides: Sequence[str] = ()) -> Profile:
    """Read a profile from a file or by its name, apply overrides such as `job.qos=high`, and validate it.

    Raises `UserError` naming file, key, value and what is allowed.
    """
    text, origin = _profile_text(name_or_path)
    try:
        tree: dict[str, Any] = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise UserError(f"{origin} is not valid TOML: {error}") from None
    for override in overrides:
        apply_override(tree, override)
    return parse_profile(tree, origin)


def parse_profile(tree: Mapping[str, Any], origin: str) -> Profile:
    """Validate plain data as a profile; `origin` is what messages call its source."""
    try:
        return Profile.model_validate(tree)
    except ValidationError as error:
        raise UserError(explain(error, Profile, origin)) from None


def _profile_text(name_or_path: str | None) -> tuple[str, str]:
    if name_or_path is None:
        return "", "the default profile"
    names = profile_names()
    if name_or_path.endswith(".toml") or "/" in name_or_path:
        remedy = f"Give a TOML file or one of the named profiles: {', '.join(names)}."
        return require_file(Path(name_or_path), "profile", remedy).read_text(encoding="utf-8"), name_or_path
    if name_or_path not in names:
        raise UserError(f"no profile is named {name_or_path!r}: {nearest(name_or_path, names)}")
    return (resources.files("slurm") / "profiles" / f"{name_or_path}.toml").read_text(encoding="utf-8"), name_or_path
