"""What a bare GPU machine lacks, as archives of import folders: a table, and how each is made.

Such a machine has torch, triton, numpy, numba, OpenCV and the like for its Python, and no network. An archive is a
`.tar.xz` that is unpacked into a folder of PYTHONPATH; nothing is installed there.
"""

import shutil
import tarfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from scripts.bootstrap import CONSTRAINTS
from scripts.console import run
from scripts.gpu import native

PYTHON = "3.12"
"""The interpreter of the GPU machine; compiled packages fit no other."""
# pip matches a wheel's platform exactly, so that older ones are to be named as well.
_PLATFORMS = (28, 27, 24, 17)
# In Ray's wheel for other languages, for a browser, and for what the harness does not use.
_RAY_UNUSED = ("jars", "rllib", "llm", "dashboard/client", "core/libjemalloc.so")


@dataclass(frozen=True)
class Archive:
    """One archive of `.gpu`: `fill(python, folder, log)` puts the import folders into `folder`.

    `needed`: without it nothing runs on the machine; the others are left out where they cannot be made.
    `inputs`: what it is made from; made anew when that changes.
    """

    name: str
    what: str
    inputs: tuple[str, ...]
    needed: bool
    fill: Callable[[Path, Path, Path], None]


def pinned(*names: str) -> tuple[str, ...]:
    """Requirements at the versions of constraints.txt."""
    lines = [line.strip() for line in CONSTRAINTS.read_text().splitlines() if "==" in line]
    versions = {line.partition("==")[0].lower().replace("_", "-"): line for line in lines}
    return tuple(versions[name] for name in names)


def install(python: Path, folder: Path, requirements: tuple[str, ...], log: Path) -> None:
    """Ready wheels for the GPU machine's Python into a folder, without what they depend on."""
    platforms = [word for minor in _PLATFORMS for word in ("--platform", f"manylinux_2_{minor}_x86_64")]
    target = ["--python-version", PYTHON, "--implementation", "cp", *platforms, "--platform", "manylinux2014_x86_64"]
    options = ["--no-deps", "--only-binary=:all:", "--no-compile", "--disable-pip-version-check", "--no-input"]
    run([str(python), "-m", "pip", "install", *options, *target, "--target", str(folder), *requirements], log)


def _base(python: Path, folder: Path, log: Path) -> None:
    install(python, folder, BASE, log)


def _ray(python: Path, folder: Path, log: Path) -> None:
    install(python, folder, RAY, log)
    for name in _RAY_UNUSED:
        path = folder / "ray" / name
        path.unlink() if path.is_file() else shutil.rmtree(path, ignore_errors=True)


BASE = pinned("pydantic", "pydantic-core", "annotated-types", "typing-inspection", "typing-extensions")
RAY = pinned("ray", "jsonschema", "jsonschema-specifications", "referencing", "rpds-py")
FFCV = pinned("ffcv")

ARCHIVES = (
    Archive("base", "pydantic", BASE, needed=True, fill=_base),
    Archive("ffcv", "FFCV with its libraries", (*FFCV, *native.SKIPPED), needed=False, fill=native.fill),
    Archive("ray", "Ray without what a run does not use", (*RAY, *_RAY_UNUSED), needed=False, fill=_ray),
)


def pack(folder: Path, archive: Path) -> None:
    """The folder's content as a `.tar.xz`, complete or not there."""
    unfinished = archive.with_suffix(".part")
    with tarfile.open(unfinished, "w:xz", preset=3) as tar:
        for path in sorted(folder.iterdir()):
            tar.add(path, path.name, filter=lambda info: None if "__pycache__" in info.name else info)
    unfinished.replace(archive)
