"""The GPU tests, in several processes."""

import os
import sys
import xml.etree.ElementTree as ET
from collections.abc import Iterator

import pytest

from scripts.gpu.part import Options, main
from tests.benchmarks.measure import Row

PROCESSES = 6
SESSION_S = 140
"""No test is begun after so long, so that those before are counted within the part's limit."""
# Each process compiles; together they should not be more than the cores.
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "2")


def rows(options: Options) -> Iterator[Row]:
    """How many tests passed, failed and were skipped; on a GPU none may be."""
    report = options.work / "tests.xml"
    processes = 2 if options.tiny else PROCESSES
    how = ["-q", "-n", str(processes), "-p", "no:cacheprovider", "--durations=8"]
    how += [f"--session-timeout={SESSION_S}", f"--junitxml={report}"]
    status = pytest.main(["tests/gpu", *how, *options.rest])
    if not report.is_file():
        sys.exit("pytest did not come to an end")
    counts = ET.parse(report).getroot().find("testsuite")
    assert counts is not None
    ran, skipped = int(counts.get("tests", 0)), int(counts.get("skipped", 0))
    bad = int(counts.get("failures", 0)) + int(counts.get("errors", 0))
    yield Row("tests/gpu: passed", ran - skipped - bad, 1, at_least=True)
    yield Row("tests/gpu: failed", bad, 0)
    whole = status in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED)
    yield Row("tests/gpu: all came to their turn", whole, 1, at_least=True)
    yield Row("tests/gpu: skipped", skipped, None if options.tiny else 0)


if __name__ == "__main__":
    main(rows)
