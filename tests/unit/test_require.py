"""REQUIRE turns the skips of the named services, and of those alone, into failures."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

CONFTEST = Path(__file__).resolve().parents[1] / "conftest.py"
MARKED = """
import pytest

@pytest.mark.chromium
def test_by_the_missing_program(): pass

@pytest.mark.chromium
def test_by_its_own_skip(): pytest.skip("no display")

@pytest.mark.chromium
@pytest.mark.xfail(reason="known", strict=True)
def test_expected_to_fail(): assert False

def test_of_nothing_required(): pytest.skip("another reason")
"""


def run(folder: Path, source: str, require: str) -> tuple[int, dict[str, int], str]:
    """Exit status, the counts of the closing line, all output; with the programs that lie in `folder`/bin alone."""
    (folder / "conftest.py").write_text(CONFTEST.read_text().replace('"/usr/sbin"', '"/nowhere"'))
    (folder / "test_it.py").write_text(source)
    argv = [sys.executable, "-m", "pytest", "-q", "-c", os.devnull, "--rootdir", str(folder), str(folder)]
    environment = {**os.environ, "PATH": str(folder / "bin"), "REQUIRE": require}
    outcome = subprocess.run(
        argv, cwd=folder, env=environment, capture_output=True, text=True, timeout=100, check=False
    )
    counts = {
        word: int(number) for number, word in re.findall(r"(\d+) (passed|failed|skipped|error|xfailed)", outcome.stdout)
    }
    return outcome.returncode, counts, outcome.stdout + outcome.stderr


@pytest.mark.parametrize(
    ("require", "installed", "status", "expected"),
    [
        ("", False, 0, {"skipped": 4}),
        ("slurm,postgres", False, 0, {"skipped": 4}),
        ("ffcv,chromium", False, 1, {"error": 3, "skipped": 1}),
        ("ffcv,chromium", True, 1, {"passed": 1, "failed": 1, "skipped": 1, "xfailed": 1}),
    ],
)
def test_marked_tests(tmp_path: Path, require: str, installed: bool, status: int, expected: dict[str, int]) -> None:
    (tmp_path / "bin").mkdir()
    if installed:
        (tmp_path / "bin" / "chromium").touch(mode=0o755)
    returned, counts, output = run(tmp_path, MARKED, require)
    assert (returned, counts) == (status, expected), output


@pytest.mark.parametrize(("require", "status"), [("", 5), ("ffcv", 2), ("chromium", 5)])
def test_a_whole_module(tmp_path: Path, require: str, status: int) -> None:
    source = 'import pytest\npytest.importorskip("ffcv_of_nowhere")\n'
    returned, _, output = run(tmp_path, source, require)
    assert returned == status, output


def test_an_unknown_service(tmp_path: Path) -> None:
    returned, _, output = run(tmp_path, "", "slrum")
    assert returned == 4
    assert "REQUIRE names slrum" in output
