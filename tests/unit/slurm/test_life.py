import os
import sys
from pathlib import Path

import pytest

from slurm.life import Life
from slurm.processes import Scratch
from tests.unit.slurm.conftest import Planner


@pytest.mark.parametrize(
    ("python", "first"),
    [(None, str(Path(sys.executable).parent)), ("/opt/py/bin/python3", "/opt/py/bin"), ("python3", "/usr/bin")],
)
def test_the_interpreters_folder_comes_first_and_the_working_directory_never(
    planner: Planner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, python: str | None, first: str
):
    monkeypatch.setenv("PATH", f"/usr/bin{os.pathsep}/bin")
    submission = planner(*([f"node.python={python}"] if python else []))
    with Scratch(tmp_path) as scratch:
        folders = Life(submission, 0).environ(scratch)["PATH"].split(os.pathsep)
    assert folders[0] == first
    assert "." not in folders
