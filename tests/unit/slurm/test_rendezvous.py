"""Signs of life on shared storage, which may be slow, stale or full."""

import errno
import os
from pathlib import Path

import pytest

from slurm import files, rendezvous
from slurm.rendezvous import Rendezvous


class Clock:
    """Stands in for the module `time`."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(rendezvous, "time", clock)
    return clock


def look(leader: Rendezvous, clock: Clock, seconds: float, *beating: Rendezvous) -> list[int]:
    """Live for some seconds, looking every one, as the launchers do; who is silent at the end."""
    silent: list[int] = []
    for _ in range(round(seconds)):
        clock.now += 1.0
        for other in beating:
            other.beat()
        silent = leader.silent_ranks(60.0)
    return silent


def test_a_rank_is_silent_once_its_sign_has_not_changed_for_long(tmp_path: Path, clock: Clock):
    leader, one, two = (Rendezvous(tmp_path / "life", rank, 3) for rank in range(3))
    assert look(leader, clock, 30, one, two) == []
    assert look(leader, clock, 55, one) == []
    assert look(leader, clock, 20, one) == [2]
    assert look(leader, clock, 10, one, two) == []


def test_who_stood_still_itself_does_not_judge_the_others_by_that_time(tmp_path: Path, clock: Clock):
    leader, other = (Rendezvous(tmp_path / "life", rank, 2) for rank in range(2))
    assert look(leader, clock, 30, other) == []
    clock.now += 300.0  # the whole job is suspended, or the storage hangs for all
    assert look(leader, clock, 50) == []
    assert look(leader, clock, 20) == [1], "but not for ever"


def test_a_sign_that_is_replaced_while_it_is_read_is_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    files.write_json(tmp_path / "beat.json", {"count": 1})
    answers = [OSError(errno.ESTALE, os.strerror(errno.ESTALE)), '{"count": 2}']

    def read_text(_path: Path, **_: object) -> str:
        answer = answers.pop(0)
        if isinstance(answer, OSError):
            raise answer
        return answer

    monkeypatch.setattr(Path, "read_text", read_text)
    assert files.read_json(tmp_path / "beat.json") == {"count": 2}


def test_a_full_disk_costs_a_beat_and_not_the_job(tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch):
    leader, other = (Rendezvous(tmp_path / "life", rank, 2) for rank in range(2))
    with monkeypatch.context() as full:

        def fsync(_descriptor: int) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        full.setattr(files.os, "fsync", fsync)
        assert look(leader, clock, 20, leader, other) == []
        assert other.get("beat-1") is None
    look(leader, clock, 10, leader, other)
    assert other.get("beat-1") is not None
