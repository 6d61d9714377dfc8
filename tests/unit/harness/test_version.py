import re
from importlib import metadata
from pathlib import Path
from typing import NoReturn

import pytest

from harness import version


def test_a_tree_that_nobody_installed_knows_its_version(monkeypatch: pytest.MonkeyPatch):
    """As on a machine to which the bare tree was copied: its data sets and runs are to say what made them."""

    def not_installed(name: str) -> NoReturn:
        raise metadata.PackageNotFoundError(name)

    project = (Path(__file__).resolve().parents[3] / "pyproject.toml").read_text(encoding="utf-8")
    written = re.search(r'^version = "([\d.]+)"$', project, re.MULTILINE)
    assert written is not None
    monkeypatch.setattr(metadata, "version", not_installed)
    version.own_version.cache_clear()
    try:
        assert version.own_version() == written[1]
        monkeypatch.setattr(version, "_PROJECT", Path("nowhere"))
        version.own_version.cache_clear()
        assert version.own_version() == "unknown"
    finally:
        version.own_version.cache_clear()
