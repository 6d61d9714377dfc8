import json
import threading
from pathlib import Path

import pytest
import torch

from harness.run_dir import RunDir
from harness.watch import Heartbeat, StepProfiler, Watchdog, verdict


def beat(rank: int, beats: int, place: str, *, told_at: float = 100.0) -> Heartbeat:
    return Heartbeat(rank, 1000 + rank, f"node{rank}", beats, place, 60.0, told_at)


@pytest.mark.parametrize(
    ("beats", "words"),
    [
        (
            [beat(0, 9, "at step 4"), beat(1, 8, "waiting for data")],
            ["rank 1 (process 1001 on node1", "waiting for data", "behind"],
        ),
        ([beat(0, 9, "at step 4"), beat(1, 9, "at step 4", told_at=50)], ["rank 1", "tells nothing any more"]),
        ([beat(0, 9, "at step 4"), beat(1, 9, "at step 4")], ["all ranks stand at the same place: at step 4"]),
        ([beat(0, 7, "a"), beat(1, 9, "b"), beat(2, 8, "c")], ["rank 0 (", "rank 2 ("]),
    ],
)
def test_the_verdict_names_who_holds_up_the_run(beats: list[Heartbeat], words: list[str]):
    message = verdict(beats, now=100.0, limit_s=60, silence_s=30)
    for word in [*words, "no progress for 60 s (run.stall_limit_s)"]:
        assert word in message


def test_a_rank_that_stops_beating_is_noticed_and_one_that_beats_is_not(tmp_path: Path):
    run = RunDir(tmp_path).create()
    told: list[str] = []
    noticed = threading.Event()

    def on_stall(message: str) -> None:
        told.append(message)
        noticed.set()

    other = Watchdog(run, 1, 2, 1.0, on_stall)
    watchdog = Watchdog(run, 0, 2, 1.0, on_stall)
    watchdog.beat("search waiting for data")
    for _ in range(1000):
        other.beat("search at step 7")
        if noticed.wait(0.05):
            break
    assert "rank 0 (process" in told[0]
    assert "last seen search waiting for data) is behind" in told[0]
    watchdog.close()
    other.close()
    assert len(told) == 1
    assert json.loads((tmp_path / "heartbeats" / "rank-1.json").read_text())["place"] == "search at step 7"


def test_the_profiler_writes_one_trace_of_the_steps_after_the_warm_up(tmp_path: Path):
    profiler = StepProfiler(tmp_path / "trace.json", steps=2)
    for step in range(8):
        with torch.profiler.record_function(f"step-{step}"):
            torch.ones(3).sum()
        profiler.step()
    seen = {event["name"] for event in json.loads((tmp_path / "trace.json").read_text())["traceEvents"]}
    assert {name for name in seen if name.startswith("step-")} == {"step-3", "step-4"}


def test_a_stage_that_ends_early_still_leaves_its_trace(tmp_path: Path):
    profiler = StepProfiler(tmp_path / "trace.json", steps=100)
    for _ in range(5):
        torch.ones(3).sum()
        profiler.step()
    profiler.close()
    profiler.close()
    assert any(
        event["name"] == "aten::sum" for event in json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    )


def test_no_trace_unless_asked_for(tmp_path: Path):
    profiler = StepProfiler(tmp_path / "trace.json", steps=0)
    for _ in range(8):
        profiler.step()
    assert list(tmp_path.iterdir()) == []
