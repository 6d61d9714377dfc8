import io
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from harness.progress import Board, Snapshot
from harness.run_dir import RunDir, write_json


def tell(run: RunDir, **changes: object) -> None:
    values = {"time": time.time(), "stage": "search", "epoch": 1, "epochs": 4, "step": 25, "total_steps": 100}
    write_json(run.path / "progress.json", values | {"samples_per_s": 1234.4} | changes)


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.02)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    return RunDir(tmp_path / "trial").create()


def test_a_snapshot_reads_the_run_directory(run: RunDir):
    assert Snapshot.of(run) is None
    tell(run)
    record = '{"seq": 1, "time": 1, "kind": "metrics", "stage": "search", "epoch": 1, "step": 25, "metrics": {%s}}\n'
    run.metrics_path.write_text(record % '"search/top1": 91.5')
    found = Snapshot.of(run)
    assert found is not None
    assert found.share == 0.25
    assert found.words() == "search 1/4  1,234 images/s  top-1 91.50%"


def test_a_log_gets_a_line_per_epoch_with_rate_and_time_left(run: RunDir):
    stream = io.StringIO()
    with Board(2, stream=stream, period_s=0.02) as board:
        board.began([(run, "trial-a")])
        tell(run)
        wait_for(lambda: "search 1/4" in stream.getvalue())
        tell(run, epoch=2, step=50, time=time.time() + 10)  # a quarter more in ten seconds: half left, twenty seconds
        wait_for(lambda: "search 2/4" in stream.getvalue())
        board.ended(run, "trial-a: top-1 90.00%")
    lines = stream.getvalue().splitlines()
    assert len(lines) == 3, "one line an epoch, not one a period"
    assert "1/2 trial-a: search 1/4  1,234 images/s" in lines[0]
    assert "0:19 left" in lines[1] or "0:20 left" in lines[1]
    assert "1/2 trial-a: top-1 90.00%" in lines[2]
    assert "(sweep: " in lines[1]
    assert "\x1b" not in stream.getvalue()


@pytest.mark.parametrize("terminal", [False, True])
def test_of_a_lone_trial_no_sweep_is_told(run: RunDir, terminal: bool, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("COLUMNS", "200")
    stream = Terminal() if terminal else io.StringIO()
    with Board(1, lone=True, stream=stream, period_s=0.02) as board:
        board.began([(run, "trial-a")])
        tell(run)
        wait_for(lambda: "search 1/4" in stream.getvalue())
        tell(run, epoch=2, step=50, time=time.time() + 10)
        wait_for(lambda: "search 2/4  1,234 images/s  0:" in stream.getvalue())
    assert "trial-a" in stream.getvalue()
    assert "sweep" not in stream.getvalue()
    assert "1/1" not in stream.getvalue()


def test_progress_of_an_earlier_life_is_not_shown(run: RunDir):
    stream = io.StringIO()
    tell(run, time=time.time() - 1000)
    ticks: list[int] = []
    with Board(1, stream=stream, period_s=0.02) as board:
        board.every_tick(lambda: ticks.append(1))
        board.began([(run, "trial-a")])
        wait_for(lambda: len(ticks) > 3)
    assert stream.getvalue() == ""
