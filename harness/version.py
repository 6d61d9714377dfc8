"""The version of this project, installed or not."""

import functools
import tomllib
from importlib import metadata
from pathlib import Path

DISTRIBUTION = "sbs-harness"
_PROJECT = Path(__file__).resolve().parent.parent / "pyproject.toml"


@functools.cache
def own_version() -> str:
    """Of the installed distribution; of pyproject.toml where the packages lie in a tree that nobody installed."""
    try:
        return metadata.version(DISTRIBUTION)
    except metadata.PackageNotFoundError:
        if not _PROJECT.is_file():
            return "unknown"
        return str(tomllib.loads(_PROJECT.read_text(encoding="utf-8"))["project"]["version"])
