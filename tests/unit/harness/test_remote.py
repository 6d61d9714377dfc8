"""The remote copy: complete or none when fetched, never in the way of training, and never behind for good."""

import threading
from pathlib import Path
from typing import Any

import pytest

from harness.errors import UserError
from harness.remote import RemoteCopy
from harness.run_dir import RunDir

LIMIT_S = 30.0


class NoRouteError(Exception):
    """What some stores raise when the network is away: nothing that Python knows as an OSError."""


def run_at(folder: Path) -> RunDir:
    run = RunDir(folder / "trial").create()
    for name in ("config.json", "metrics.jsonl", "checkpoints/search-00000004.pt", "stages/pretrain.pt", "lock"):
        (run.path / name).write_text(name)
    return run


def copy_of(run: RunDir, tmp_path: Path) -> RemoteCopy:
    return RemoteCopy(run, f"file://{tmp_path}/bucket")


def sent(run: RunDir, tmp_path: Path) -> set[str]:
    """Names in the bucket after one round of sending."""
    copy = copy_of(run, tmp_path)
    copy.send()
    copy.close(LIMIT_S)
    return names(tmp_path / "bucket" / "trial")


def names(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def break_after(calls: int, monkeypatch: pytest.MonkeyPatch, copy: RemoteCopy, method: str) -> None:
    original, left = getattr(copy._fs, method), [calls]

    def broken(*arguments: Any, **options: Any) -> Any:
        left[0] -= 1
        if left[0] < 0:
            raise NoRouteError("gone")
        return original(*arguments, **options)

    monkeypatch.setattr(copy._fs, method, broken)


def test_a_fetch_that_broke_off_is_made_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    everything = sent(run_at(tmp_path / "here"), tmp_path)
    assert everything == {
        "config.json", "metrics.jsonl", "checkpoints/search-00000004.pt", "stages/pretrain.pt"
    }  # fmt: skip
    there = RunDir(tmp_path / "there" / "trial").create()
    for whole in range(len(everything)):
        copy = copy_of(there, tmp_path)
        with monkeypatch.context() as patch:
            break_after(whole, patch, copy, "get_file")
            with pytest.raises(UserError, match=r"cannot be read: NoRouteError: gone"):
                copy.fetch()
        assert len(names(there.path)) == whole
        assert not there.config_path.exists()
    assert copy_of(there, tmp_path).fetch()
    assert names(there.path) == everything
    assert not copy_of(there, tmp_path).fetch()  # what is here counts


def test_a_store_that_is_away_delays_nothing_but_the_copy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    run = run_at(tmp_path)
    copy, held, release = copy_of(run, tmp_path), threading.Event(), threading.Event()
    original = copy._fs.put_file

    def slow(*arguments: Any, **options: Any) -> None:
        held.set()
        if not release.wait(LIMIT_S):
            raise NoRouteError("gone")
        original(*arguments, **options)

    monkeypatch.setattr(copy._fs, "put_file", slow)
    for _ in range(5):
        copy.send()
    assert held.wait(LIMIT_S)
    copy.close(0.0)
    assert "is behind: not complete after 0 s" in caplog.text
    assert names(tmp_path / "bucket" / "trial") == set()
    release.set()
    copy.close(LIMIT_S)
    assert len(names(tmp_path / "bucket" / "trial")) == 4


def test_trouble_of_any_kind_is_told_and_the_next_time_mends_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    run = run_at(tmp_path)
    with monkeypatch.context() as patch:
        copy = copy_of(run, tmp_path)
        break_after(2, patch, copy, "put_file")
        copy.send()
        copy.close(LIMIT_S)
    assert "is behind: NoRouteError: gone" in caplog.text
    assert len(sent(run, tmp_path)) == 4


def test_what_is_gone_here_goes_there_also_after_a_restart(tmp_path: Path):
    run = run_at(tmp_path)
    sent(run, tmp_path)
    (run.checkpoints / "search-00000004.pt").unlink()
    assert sent(run, tmp_path) == {"config.json", "metrics.jsonl", "stages/pretrain.pt"}


def test_how_an_attempt_failed_is_for_who_waits_not_for_who_goes_on(tmp_path: Path):
    run = run_at(tmp_path / "here")
    run.error_path.write_text('{"message": "no", "stage": "search"}')
    sent(run, tmp_path)
    waiting = RunDir(tmp_path / "driver" / "trial").create()
    assert copy_of(waiting, tmp_path).fetch_outcome()
    assert waiting.error() == {"message": "no", "stage": "search"}
    going_on = RunDir(tmp_path / "there" / "trial").create()
    copy = copy_of(going_on, tmp_path)
    copy.fetch()
    assert going_on.error() is None
    copy.send()
    copy.close(LIMIT_S)
    assert "error.json" not in names(tmp_path / "bucket" / "trial")
