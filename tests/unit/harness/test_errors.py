import errno
import os
import subprocess
import sys

import pytest

from harness.errors import Preempted, UserError, run_cli


@pytest.mark.parametrize(
    ("error", "status", "text"), [(UserError("bad key"), 2, "error: bad key\n"), (Preempted("left"), 85, "left\n")]
)
def test_status_and_message(error: Exception, status: int, text: str, capsys: pytest.CaptureFixture[str]):
    def app() -> None:
        raise error

    with pytest.raises(SystemExit) as caught:
        run_cli(app)
    assert caught.value.code == status
    assert capsys.readouterr().err == text


@pytest.mark.parametrize(
    ("code", "name", "text"),
    [
        (errno.EACCES, "runs/x.toml", "error: runs/x.toml: Permission denied. Give this user the right to it, or name"),
        (errno.ENOSPC, None, "error: a file: No space left on device. Make room, or name another place.\n"),
        (errno.ENOTDIR, "a/b", "error: a/b: Not a directory. Name a folder where a folder is meant, and a file where"),
    ],
)
def test_files_out_of_reach_are_no_defects(code: int, name: str | None, text: str, capsys: pytest.CaptureFixture[str]):
    def app() -> None:
        raise OSError(code, os.strerror(code), *([name] if name else []))

    with pytest.raises(SystemExit) as caught:
        run_cli(app)
    assert caught.value.code == 2
    assert capsys.readouterr().err.startswith(text)


def test_a_defect_keeps_its_traceback():
    with pytest.raises(ZeroDivisionError):
        run_cli(lambda: 1 / 0)


def test_errors_and_settings_import_nothing_heavy():
    code = "import sys, harness.errors, harness.settings; print(sorted({m.split('.')[0] for m in sys.modules}))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60).stdout
    for module in ["torch", "ray", "mlflow", "numpy", "ffcv"]:
        assert f"'{module}'" not in out
