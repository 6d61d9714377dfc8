from pathlib import Path

import pytest

from harness.data import memory

GIB = 2**30


@pytest.fixture
def machine(tmp_path: Path):
    """A machine of 64 GiB whose control groups the test writes."""
    proc, groups = tmp_path / "proc", tmp_path / "cgroup"
    (proc / "self").mkdir(parents=True)
    (proc / "meminfo").write_text(f"MemTotal: {64 * GIB // 1024} kB\nMemFree: 17 kB\n")

    def limits(cgroup: str, files: dict[str, str]) -> int:
        (proc / "self" / "cgroup").write_text(cgroup)
        for name, text in files.items():
            (groups / name).parent.mkdir(parents=True, exist_ok=True)
            (groups / name).write_text(text)
        return memory.memory_bytes(proc, groups)

    return limits


def test_without_limits_it_is_the_machine(machine):
    assert machine("0::/\n", {}) == 64 * GIB
    assert machine("0::/job/step\n", {"job/memory.max": "max\n"}) == 64 * GIB


def test_the_tightest_group_above_counts(machine):
    files = {"job/memory.max": f"{8 * GIB}\n", "job/step/memory.max": f"{16 * GIB}\n"}
    assert machine("0::/job/step\n", files) == 8 * GIB


def test_groups_of_version_one(machine):
    files = {
        "memory/slurm/job_7/memory.limit_in_bytes": f"{4 * GIB}\n",
        "memory/memory.limit_in_bytes": f"{2**63 - 4096}\n",
    }
    assert machine("9:cpuset:/slurm\n5:memory:/slurm/job_7\n", files) == 4 * GIB


@pytest.mark.parametrize(
    ("gib", "asked", "chosen"),
    [
        (6, ("auto", "auto"), ("cache", "random")),
        (8, ("auto", "auto"), ("stream", "quasi_random")),
        (8, ("cache", "auto"), ("cache", "random")),
        (6, ("auto", "quasi_random"), ("cache", "quasi_random")),
        (6, ("stream", "auto"), ("stream", "quasi_random")),
    ],
)
def test_files_that_fit_are_cached_and_larger_ones_stream(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gib: int, asked: tuple[str, str], chosen: tuple[str, str]
):
    monkeypatch.setattr(memory, "memory_bytes", lambda: 10 * GIB)
    with (tmp_path / "file").open("wb") as file:
        file.truncate(gib * GIB)
    assert memory.choose(tmp_path / "file", *asked) == chosen
