"""Leaves nothing behind: ends a job's processes on this node and removes its folder, even if its launcher was killed.

The launcher starts this file as a program of its own and keeps the other end of its standard input. When that end
closes, in order or because the launcher died, the keeper kills every process that carries the job's mark in its
environment (orphans included, other jobs' excluded), removes shared-memory files that only they used, and the folder.
It needs the standard library only and starts in milliseconds.
"""

import os
import select
import shutil
import signal
import sys
import time
from pathlib import Path

MARK = "SBS_SLURM_MARK"
OWNER_FILE = ".launcher"
_SHARED_MEMORY = "/dev/shm/"
_KILL_ROUNDS = 50
_LOOK_EVERY_S = 10.0


def marked(mark: str) -> list[int]:
    """The processes of this user that carry the mark, this one left out."""
    wanted = f"{MARK}={mark}".encode()
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        try:
            if wanted in (entry / "environ").read_bytes().split(b"\0"):
                found.append(int(entry.name))
        except OSError:
            continue
    return found


def shared_memory(pids: list[int]) -> set[str]:
    """Files in /dev/shm, still with a name, that these processes have mapped."""
    found = set()
    for pid in pids:
        try:
            lines = Path(f"/proc/{pid}/maps").read_text(encoding="utf-8", errors="replace").splitlines()
        except OSError:
            continue
        for line in lines:
            path = line.split(maxsplit=5)[-1]
            if path.startswith(_SHARED_MEMORY) and not path.endswith(" (deleted)"):
                found.add(path)
    return found


def kill_marked(mark: str, files: set[str]) -> None:
    """Kill all processes with the mark until none is left, then unlink the shared memory that they alone used.

    `files` is what they were seen to use before: some may have died already.
    """
    for _ in range(_KILL_ROUNDS):
        pids = marked(mark)
        if not pids:
            break
        files |= shared_memory(pids)
        for pid in pids:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        time.sleep(0.05)
    if files:
        others = [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit()]
        for path in files - shared_memory(others):
            Path(path).unlink(missing_ok=True)


def remove_folder(folder: Path) -> None:
    """Remove a folder; files that appear meanwhile get a second chance to go."""
    for _ in range(3):
        shutil.rmtree(folder, ignore_errors=True)
        if not folder.exists():
            return
        time.sleep(0.1)


def remove_stale(scratch: Path, prefix: str) -> list[Path]:
    """Remove folders of this user's jobs whose launcher is gone (a node that lost power kept them).

    Folders of other machines are left alone: scratch that nodes share holds those of jobs that run there.
    """
    removed = []
    for folder in scratch.glob(f"{prefix}*"):
        try:
            owner = (folder / OWNER_FILE).read_text(encoding="utf-8").split()
            mine = folder.stat().st_uid == os.getuid()
        except OSError:
            continue
        if mine and len(owner) == 3 and owner[2] == os.uname().nodename and start_time(int(owner[0])) != owner[1]:
            remove_folder(folder)
            removed.append(folder)
    return removed


def owner_note(pid: int) -> str:
    """What stands in a folder's `OWNER_FILE`: its launcher's pid, start time and machine."""
    return f"{pid} {start_time(pid)} {os.uname().nodename}"


def start_time(pid: int) -> str:
    """A process's start time with the machine's boot: together with the pid it names one process for ever."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip()
        ticks = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[19]
    except OSError:
        return "gone"
    return f"{boot}:{ticks}"


def main() -> None:
    """Wait for standard input to close, then clean: arguments are the mark and the folder."""
    for name in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(name, signal.SIG_IGN)
    mark, folder = sys.argv[1], Path(sys.argv[2])
    if os.fork():  # no longer a child of the launcher: what ends the launcher's children spares this process
        os._exit(0)
    os.setsid()
    files: set[str] = set()
    while not select.select([0], [], [], _LOOK_EVERY_S)[0]:
        files |= shared_memory(marked(mark))
    kill_marked(mark, files)
    remove_folder(folder)


if __name__ == "__main__":
    main()
