"""A server and its children end with the command that started them, whatever ends that."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.integration.waiting import wait_for

# What `harness ui` starts, in small: a server with a child of its own, which tell their numbers.
SERVER = """
import os, signal, subprocess, sys, time
from pathlib import Path
if {stubborn}:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # which the child inherits
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(100)"])
told = Path({told!r})
told.with_suffix(".tmp").write_text(f"{{os.getpid()}} {{child.pid}}")
told.with_suffix(".tmp").rename(told)
while not told.with_name("enough").exists():
    time.sleep(0.02)
sys.exit(3)
"""
COMMAND = """
import sys
from harness.tracking.serving import serve
print(serve([sys.executable, "-c", sys.argv[1]], grace_s=float(sys.argv[2])))
"""


class Case:
    """A process that serves, in a folder of its own."""

    def __init__(self, folder: Path) -> None:
        self.told = folder / "pids"
        self.process: subprocess.Popen[str] | None = None

    def start(self, *, stubborn: bool = False, grace_s: float = 60.0, nohup: bool = False) -> None:
        server = SERVER.format(stubborn=stubborn, told=str(self.told))
        command = [*(["nohup"] if nohup else []), sys.executable, "-c", COMMAND, server, str(grace_s)]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        wait_for(self.told.exists, 30, "the server")

    def end_server(self) -> None:
        (self.told.parent / "enough").touch()

    def pids(self) -> list[int]:
        return [int(word) for word in self.told.read_text().split()]

    def output(self) -> str:
        assert self.process is not None
        return self.process.communicate(timeout=30)[0]


def running(pid: int) -> bool:
    """Whether a process is there and no mere entry that its parent has not taken note of."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.fixture
def case(tmp_path: Path) -> Iterator[Case]:
    made = Case(tmp_path)
    yield made
    for pid in made.pids() if made.told.exists() else []:
        if running(pid):
            os.kill(pid, signal.SIGKILL)
    if made.process is not None:
        made.process.kill()
        made.process.communicate(timeout=10)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGQUIT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_the_server_and_its_children(case: Case, number: signal.Signals):
    case.start()
    assert case.process is not None
    case.process.send_signal(number)
    assert case.output() == "None\n"
    assert case.process.returncode == 0
    assert not [pid for pid in case.pids() if running(pid)]


def test_who_does_not_end_when_asked_is_killed(case: Case):
    case.start(stubborn=True, grace_s=0.3)
    assert case.process is not None
    case.process.terminate()
    assert case.output() == "None\n"
    assert not [pid for pid in case.pids() if running(pid)]


def test_a_server_that_ends_by_itself_leaves_no_child(case: Case):
    case.start()
    case.end_server()
    assert case.output() == "3\n"
    assert not [pid for pid in case.pids() if running(pid)]


def test_under_nohup_a_closed_terminal_ends_nothing(case: Case):
    case.start(nohup=True)
    assert case.process is not None
    case.process.send_signal(signal.SIGHUP)
    case.end_server()
    assert case.output() == "3\n"


def test_a_command_that_is_not_there_leaves_the_signals_as_they_were():
    from harness.tracking.serving import END_SIGNALS, serve

    before = [signal.getsignal(number) for number in END_SIGNALS]
    with pytest.raises(FileNotFoundError):
        serve(["./there-is-no-such-program"])
    assert [signal.getsignal(number) for number in END_SIGNALS] == before


def test_nobody_waits_for_what_is_over_and_was_not_taken_note_of():
    """As in a container whose first process never does."""
    from harness.tracking import serving

    leader = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, process_group=0)
    other = subprocess.Popen([sys.executable, "-c", ""], process_group=leader.pid)
    try:
        wait_for(lambda: not running(other.pid), 30, "its end")
        assert serving._alive(leader)
        leader.communicate(b"\n", timeout=10)
        os.killpg(leader.pid, 0)  # there is a group
        assert not serving._alive(leader)
    finally:
        leader.kill()
        other.wait(10)
