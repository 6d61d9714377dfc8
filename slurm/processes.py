"""Child processes that cannot outlive their launcher, and the node-local folder they may use."""

import contextlib
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Self

from harness.errors import UserError
from slurm import keeper

SCRATCH_PREFIX = "sbs-"
_KEEPER_LIMIT_S = 10.0


def spawn(
    command: Sequence[str], env: Mapping[str, str], *, output: IO[bytes] | None = None, cwd: Path | None = None
) -> subprocess.Popen[bytes]:
    """Start `command` in a session of its own.

    SIGUSR2 is ignored unless the command asks for it: some sites' SLURM sends it to every process of a job, and what
    does not expect it would die of it, Ray's daemons first.
    """
    return subprocess.Popen(
        list(command),
        env=dict(env),
        cwd=cwd,
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=None if output is None else subprocess.STDOUT,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGUSR2, signal.SIG_IGN),  # noqa: PLW1509 - the launcher has one thread
    )


def exit_status(process: subprocess.Popen[bytes]) -> int:
    """The status a shell would show for an ended process: 128 + N for signal N."""
    code = process.returncode
    return 128 - code if code < 0 else code


def kill_group(process: subprocess.Popen[bytes], number: signal.Signals) -> None:
    """Send a signal to a child's whole process group, if it still exists."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, number)


def stop(process: subprocess.Popen[bytes], limit_s: float) -> None:
    """End a child: SIGTERM if it may have some time, and SIGKILL to its group after `limit_s`."""
    if limit_s > 0 and process.poll() is None:
        process.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(limit_s)
    kill_group(process, signal.SIGKILL)
    process.wait()


def wait_until(condition: Callable[[], bool], limit_s: float, *, every_s: float = 0.1) -> bool:
    """Look at `condition` until it holds or `limit_s` is over; says whether it held."""
    end = time.monotonic() + limit_s
    while not condition():
        if time.monotonic() >= end:
            return False
        time.sleep(every_s)
    return True


class Scratch:
    """A private folder on this node and a mark for all processes; both are gone when this closes, however it ends.

    Raises `UserError` where there can be no such folder.
    """

    def __init__(self, base: Path) -> None:
        self.mark = uuid.uuid4().hex
        try:
            keeper.remove_stale(base, SCRATCH_PREFIX)
            self.folder = Path(tempfile.mkdtemp(prefix=SCRATCH_PREFIX, dir=base))
            (self.folder / keeper.OWNER_FILE).write_text(keeper.owner_note(os.getpid()), encoding="utf-8")
            (self.folder / "tmp").mkdir()
        except OSError as error:
            raise UserError(
                f"node.scratch = {str(base)!r} cannot be used on {os.uname().nodename}: {error.strerror or error}; it "
                "must be a folder of the node itself in which jobs may write"
            ) from None
        self._keeper = subprocess.Popen(
            [sys.executable, "-I", "-S", keeper.__file__, self.mark, str(self.folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={name: value for name, value in os.environ.items() if name != keeper.MARK},
            cwd="/",
        )

    def environ(self) -> dict[str, str]:
        """What the processes of this job get to see of it."""
        return {keeper.MARK: self.mark, "TMPDIR": str(self.folder / "tmp")}

    def close(self) -> None:
        """Kill what is left of the job on this node and remove the folder; waits until that is done."""
        assert self._keeper.stdin is not None
        assert self._keeper.stdout is not None
        self._keeper.stdin.close()
        select.select([self._keeper.stdout], [], [], _KEEPER_LIMIT_S)  # the keeper closes its end by leaving
        self._keeper.stdout.close()
        self._keeper.wait()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
