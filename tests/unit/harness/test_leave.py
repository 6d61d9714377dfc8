import os
import signal
from pathlib import Path

from harness.context import LeaveRequest
from harness.run_dir import RunDir


class _SlowDisk(RunDir):
    """A folder that is looked at while the signal comes."""

    def stop_requested(self) -> bool:
        os.kill(os.getpid(), signal.SIGTERM)
        return super().stop_requested()


def test_a_signal_during_the_look_at_the_stop_file_is_not_lost(tmp_path: Path):
    leave = LeaveRequest(_SlowDisk(tmp_path), watch_file=True)
    with leave.signals():
        assert leave.asked()
        assert leave.asked()
