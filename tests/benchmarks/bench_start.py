"""How long one waits before anything happens: a set-up that is done already, command lines that start."""

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from tests.benchmarks.measure import Row, repeated

ROOT = Path(__file__).resolve().parents[2]


def command(*argv: str) -> Callable[[], object]:
    """A call that runs the command and insists on its success."""
    return lambda: subprocess.run(argv, cwd=ROOT, stdout=subprocess.DEVNULL, check=True)


def rows() -> Iterator[Row]:
    """Wall seconds, interpreter start included."""
    yield Row("second `make setup`", repeated(command("make", "setup")), must=5.0, unit="s")
    yield Row(
        "`python -m slurm --help`", repeated(command(sys.executable, "-m", "slurm", "--help")), must=1.0, unit="s"
    )
    yield Row(
        "`python -m harness doctor`",
        repeated(command(sys.executable, "-m", "harness", "doctor"), 3, 0),
        must=60.0,
        unit="s",
    )
