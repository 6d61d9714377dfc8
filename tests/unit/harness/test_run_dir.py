import errno
import fcntl
import json
import multiprocessing
import multiprocessing.synchronize
import os
import subprocess
import sys
from pathlib import Path

import pytest

from harness.errors import UserError
from harness.run_dir import MetricsLog, RunDir, read_json, write_bytes, write_json


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    return RunDir(tmp_path / "trial").create()


def test_records_carry_ascending_sequence_numbers_over_restarts(run: RunDir):
    log = MetricsLog(run)
    assert log.append("metrics", "search", 1, 20, {"search/loss": 0.5}) == 1
    assert MetricsLog(run).append("checkpoint", "search", 1, 20, {}, covers=1) == 2
    first, second = run.metrics()
    assert first["metrics"] == {"search/loss": 0.5}
    assert (first["kind"], first["stage"], first["epoch"], first["step"]) == ("metrics", "search", 1, 20)
    assert second["covers"] == 1


def test_a_torn_last_line_is_left_out_and_healed(run: RunDir):
    log = MetricsLog(run)
    log.append("metrics", "search", 1, 1, {"a": 1})
    with run.metrics_path.open("a") as file:
        file.write('{"seq": 2, "ti')
    assert [record["seq"] for record in run.metrics()] == [1]
    MetricsLog(run).append("metrics", "search", 1, 2, {"a": 2})
    assert [record["seq"] for record in run.metrics()] == [1, 2]


@pytest.mark.parametrize("junk", [b"\0" * 40, b"\0\0\n", b'{"seq": 2}}\n{"seq": 3}\n', b"\xff\xfe\n", b"7\n"])
def test_what_a_power_cut_left_at_the_end_is_cut_off(run: RunDir, junk: bytes):
    MetricsLog(run).append("metrics", "search", 1, 1, {"a": 1})
    good = run.metrics_path.read_bytes()
    run.metrics_path.write_bytes(good + junk)
    assert [record["seq"] for record in run.metrics()] == [1]
    log = MetricsLog(run)
    assert run.metrics_path.read_bytes() == good
    assert log.append("metrics", "search", 1, 2, {"a": 2}) == 2
    assert [record["seq"] for record in run.metrics()] == [1, 2]


def test_truncate_drops_what_the_checkpoint_does_not_know(run: RunDir):
    log = MetricsLog(run)
    for step in range(5):
        log.append("metrics", "search", 0, step, {"x": step})
    log.truncate(3)
    assert [record["seq"] for record in run.metrics()] == [1, 2, 3]
    assert log.append("metrics", "search", 0, 3, {"x": 3}) == 4


def test_reading_what_is_not_there(run: RunDir):
    assert run.metrics() == []
    assert run.result() is None
    assert run.error() is None


def test_stop_requests_cross_processes(run: RunDir):
    assert not run.stop_requested()
    RunDir(run.path).request_stop()
    assert run.stop_requested()
    run.clear_stop()
    run.clear_stop()
    assert not run.stop_requested()


WRITE_MANY = """
import sys
from pathlib import Path
from harness.run_dir import write_json
for i in range(150):
    write_json(Path(sys.argv[1]), {"value": i, "pad": ["x" * 1000] * 50})
"""


def test_a_reader_never_sees_half_a_file(tmp_path: Path):
    path = tmp_path / "big.json"
    write_json(path, {"value": 0})
    writer = subprocess.Popen(
        [
            sys.executable,
            "-c",
            WRITE_MANY,
            str(path),
        ]
    )
    seen = 0
    while writer.poll() is None:
        content = read_json(path)
        assert content is not None
        seen = max(seen, content["value"])
    assert writer.returncode == 0
    assert seen > 0
    assert [entry.name for entry in tmp_path.iterdir()] == ["big.json"]


def test_failed_write_leaves_the_old_content(tmp_path: Path):
    path = tmp_path / "file"
    write_bytes(path, b"old")
    with pytest.raises(TypeError):
        write_bytes(path, "not bytes")  # type: ignore[arg-type]
    assert path.read_bytes() == b"old"


def _hold(path: str, ready: "multiprocessing.synchronize.Event", leave: "multiprocessing.synchronize.Event") -> None:
    with RunDir(path).lock():
        ready.set()
        leave.wait(30)


def test_lock_names_its_holder_and_ends_with_it(run: RunDir):
    context = multiprocessing.get_context("spawn")
    ready, leave = context.Event(), context.Event()
    holder = context.Process(target=_hold, args=(str(run.path), ready, leave))
    holder.start()
    assert ready.wait(30)
    with pytest.raises(UserError, match=rf"in use by process {holder.pid} on "), run.lock(patience_s=0):
        pass
    holder.kill()
    holder.join()
    with run.lock(patience_s=10):
        pass


def test_records_hold_values_that_are_not_finite(run: RunDir):
    MetricsLog(run).append("metrics", "search", 0, 0, {"loss": float("nan")})
    assert json.dumps(run.metrics()[0]["metrics"]) == '{"loss": NaN}'


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK])
def test_a_file_system_without_locks_is_told_of_and_used(
    run: RunDir, number: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    def no_locks(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", no_locks)
    with run.lock(patience_s=0):
        assert f"process {os.getpid()} on" in (run.path / "lock").read_text()
    assert "lock: this file system has no locks" in caplog.text
