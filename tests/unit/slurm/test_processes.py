"""Nothing stays: however a launcher ends, its processes, folder and shared memory go, and nobody else's."""

import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from harness.errors import UserError
from slurm import keeper
from slurm.processes import SCRATCH_PREFIX, Scratch, exit_status, spawn, stop

LAUNCHER = """
import os, subprocess, sys, time
from pathlib import Path
from slurm.processes import Scratch, spawn
scratch = Scratch(Path(sys.argv[1]))
env = os.environ | scratch.environ()
child = spawn([sys.executable, "-c", '''
import mmap, os, subprocess, sys, time
file = open("/dev/shm/sbs-test-" + os.environ["SBS_SLURM_MARK"], "w+b"); file.truncate(4096)
held = mmap.mmap(file.fileno(), 4096)
subprocess.Popen(["setsid", "sh", "-c", "sleep 300 & sleep 300"], start_new_session=True)
print("ready", flush=True); time.sleep(300)
'''], env, output=open(sys.argv[2], "wb"))
(scratch.folder / "tmp" / "file").write_text("x")
print(scratch.mark, scratch.folder, flush=True)
time.sleep(300)
"""


def until(condition: Callable[[], bool], limit_s: float = 10.0) -> None:
    end = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_killed_launcher_leaves_nothing(tmp_path: Path):
    said = tmp_path / "said"
    bystander = subprocess.Popen(["sleep", "300"], env=os.environ | {keeper.MARK: "somebody else's"})
    command = [sys.executable, "-c", textwrap.dedent(LAUNCHER), str(tmp_path), str(said)]
    launcher = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert launcher.stdout is not None
        mark, folder = launcher.stdout.readline().split()
        until(lambda: said.exists() and "ready" in said.read_text())
        until(lambda: len(keeper.marked(mark)) >= 4)  # the child, setsid's shell, its two sleeps
        memory = Path("/dev/shm") / f"sbs-test-{mark}"
        assert memory.exists()
        launcher.kill()
        until(lambda: not keeper.marked(mark) and not Path(folder).exists())
        until(lambda: not memory.exists())
        assert alive(bystander.pid)
    finally:
        launcher.kill()
        launcher.wait()
        bystander.kill()
        bystander.wait()


def test_closing_waits_until_all_is_gone(tmp_path: Path):
    with Scratch(tmp_path) as scratch:
        orphan = "import subprocess; subprocess.Popen(['sleep', '300'], start_new_session=True)"
        spawn([sys.executable, "-c", orphan], os.environ | scratch.environ()).wait(10)
        until(lambda: len(keeper.marked(scratch.mark)) == 1)
        assert Path(scratch.environ()["TMPDIR"]).is_dir()
        assert oct(scratch.folder.stat().st_mode & 0o777) == "0o700"
    assert keeper.marked(scratch.mark) == []
    assert not scratch.folder.exists()


def test_shared_memory_that_others_use_stays(tmp_path: Path):
    memory = Path("/dev/shm") / f"sbs-test-{os.getpid()}"
    memory.write_bytes(b"x" * 4096)
    hold = f"import mmap, time; f = open({str(memory)!r}, 'r+b'); m = mmap.mmap(f.fileno(), 4096)"
    hold += "; print(1, flush=True); time.sleep(300)"
    other = subprocess.Popen([sys.executable, "-c", hold], stdout=subprocess.PIPE)
    try:
        assert other.stdout is not None
        other.stdout.readline()
        with Scratch(tmp_path) as scratch, (tmp_path / "said").open("wb") as said:
            spawn([sys.executable, "-c", hold], os.environ | scratch.environ(), output=said)
            until(lambda: "1" in (tmp_path / "said").read_text())
        assert memory.exists()
        assert alive(other.pid)
    finally:
        other.kill()
        other.wait()
        memory.unlink()


def test_scratch_that_cannot_be_used_is_one_message(tmp_path: Path):
    with pytest.raises(UserError, match=rf"node\.scratch = '{tmp_path}/none' cannot be used on .*: No such file"):
        Scratch(tmp_path / "none")


def test_folders_of_dead_launchers_are_removed_at_the_next_start(tmp_path: Path):
    names = ("living", "dead", "foreign", "elsewhere")
    living, dead, foreign, elsewhere = (tmp_path / f"{SCRATCH_PREFIX}{name}" for name in names)
    for folder in (living, dead, foreign, elsewhere):
        folder.mkdir()
    (living / keeper.OWNER_FILE).write_text(keeper.owner_note(os.getpid()))
    (dead / keeper.OWNER_FILE).write_text(f"{os.getpid()} another-boot:17 {os.uname().nodename}")
    (elsewhere / keeper.OWNER_FILE).write_text(f"{os.getpid()} another-boot:17 another-node")
    assert keeper.remove_stale(tmp_path, SCRATCH_PREFIX) == [dead]
    assert living.exists()
    assert elsewhere.exists(), "on scratch that nodes share it belongs to a job of another node"
    assert foreign.exists(), "a folder without an owner's note is not ours to remove"


@pytest.mark.parametrize(
    ("code", "expected"), [("raise SystemExit(7)", 7), ("import os; os.kill(os.getpid(), 15)", 143)]
)
def test_exit_status_is_the_shell_s(code: str, expected: int):
    process = spawn([sys.executable, "-c", code], os.environ)
    process.wait(10)
    assert exit_status(process) == expected


def test_command_survives_usr2_and_a_stubborn_one_is_killed(tmp_path: Path):
    code = (
        "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up', flush=True); time.sleep(300)"
    )
    with (tmp_path / "said").open("wb") as said:
        process = spawn([sys.executable, "-c", code], os.environ, output=said)
    until(lambda: "up" in (tmp_path / "said").read_text())
    process.send_signal(signal.SIGUSR2)
    stop(process, 0.3)
    assert process.returncode == -signal.SIGKILL
