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


def test_a_defect_keeps_its_traceback():
    with pytest.raises(ZeroDivisionError):
        run_cli(lambda: 1 / 0)


def test_errors_and_settings_import_nothing_heavy():
    code = "import sys, harness.errors, harness.settings; print(sorted({m.split('.')[0] for m in sys.modules}))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60).stdout
    for module in ["torch", "ray", "mlflow", "numpy", "ffcv"]:
        assert f"'{module}'" not in out
