import gc
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from harness.ray_cluster import _leave, scratch

HOLD = """
import sys
from pathlib import Path
from harness.ray_cluster import scratch
with scratch(Path(sys.argv[1])) as folder:
    (folder / "session").mkdir()
    (folder / "session" / "log").write_text("words")
    print(folder, flush=True)
    sys.stdin.read()
"""


@contextmanager
def owner(base: Path) -> Iterator[tuple[subprocess.Popen[str], Path]]:
    """Another process that is at work in a scratch folder of its own."""
    command = [sys.executable, "-c", HOLD, str(base)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        yield process, Path(process.stdout.readline().strip())
    finally:
        process.kill()
        process.communicate()


def test_the_next_start_clears_what_a_killed_one_left_and_nothing_else(tmp_path: Path):
    others = [tmp_path / "sbs-of-something-else", tmp_path / "unrelated"]
    for path in others:
        path.mkdir()
    with owner(tmp_path) as (dead, left), owner(tmp_path) as (living, used):
        assert left.is_dir()
        dead.kill()
        dead.wait()
        with scratch(tmp_path) as mine:
            assert not left.exists()
            assert (used / "session" / "log").is_file(), "a living process lost its folder"
            assert mine.stat().st_mode & 0o777 == 0o700
        assert not mine.exists()
        living.communicate("")  # it ends in order
        assert not used.exists()
    assert sorted(tmp_path.iterdir()) == others


def test_a_folder_that_only_points_elsewhere_is_left_alone(tmp_path: Path):
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "owner").write_text("1")
    (tmp_path / "sbs-link").symlink_to(precious)
    with scratch(tmp_path):
        assert (precious / "owner").exists()


def test_no_garbage_is_collected_while_ray_shuts_down(monkeypatch: pytest.MonkeyPatch):
    """It could hold references that another thread would then give back to a worker that is no more."""
    import ray

    seen: list[bool] = []
    monkeypatch.setattr(ray, "shutdown", lambda: seen.append(gc.isenabled()))
    _leave()
    assert (seen, gc.isenabled()) == ([False], True)
