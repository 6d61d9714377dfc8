"""The user's command: started once, asked to leave once, and never left behind."""

import signal
import subprocess
import time
from collections.abc import Mapping

from slurm.processes import exit_status, kill_group, spawn
from slurm.records import Submission

EXIT_NOT_FOUND = 127
EXIT_NOT_EXECUTABLE = 126


def arguments(submission: Submission, index: int) -> list[str]:
    """The command of one task: `{index}` in an array's arguments is the task's number."""
    if submission.array is None:
        return list(submission.command)
    return [part.replace("{index}", str(index)) for part in submission.command]


class Command:
    """One run of the command; times are of the monotonic clock."""

    def __init__(self, submission: Submission, index: int, environ: Mapping[str, str]) -> None:
        self.arguments = [*submission.profile.node.container, *arguments(submission, index)]
        self.workdir = submission.workdir
        self.environ = dict(environ)
        self.kill_at: float | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._failed: int | None = None

    def start(self) -> str | None:
        """Start it; returns what stands in the way if it cannot be started."""
        try:  # Popen looks the name up in the PATH of `environ`, not in the launcher's
            self._process = spawn(self.arguments, self.environ, cwd=self.workdir)
        except FileNotFoundError:
            self._failed = EXIT_NOT_FOUND
            return f"there is no {self.arguments[0]!r} in {self.workdir} with PATH {self.environ.get('PATH')}"
        except OSError as error:
            self._failed = EXIT_NOT_EXECUTABLE
            return f"cannot start {self.arguments[0]!r}: {error}"
        return None

    def running(self) -> bool:
        """Whether it has not ended yet; kills it when its time to leave is over."""
        if self._process is None or self._process.poll() is not None:
            return False
        if self.kill_at is not None and time.monotonic() >= self.kill_at:
            kill_group(self._process, signal.SIGKILL)
        return True

    def ask_to_leave(self, grace_s: float) -> None:
        """Send SIGTERM to the command's own process, not to its children, which it needs for its checkpoint."""
        assert self._process is not None
        self._process.send_signal(signal.SIGTERM)
        self.kill_at = time.monotonic() + grace_s

    @property
    def exit_status(self) -> int:
        """Its status once it has ended, 128 + N for signal N."""
        if self._process is None:
            assert self._failed is not None
            return self._failed
        kill_group(self._process, signal.SIGKILL)  # what it left in the background goes with it
        return exit_status(self._process)
