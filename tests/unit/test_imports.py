"""The rooms' directions, one door per heavy library, and command lines that start without loading any of them."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
ROOMS = ("sbs", "harness", "sweeps", "slurm")
HEAVY = {"torch", "ray", "mlflow", "ffcv", "numba", "sklearn", "pandas", "matplotlib", "optuna", "submitit", "cv2"}


LINT = """
import sys
from importlinter.cli import lint_imports
sys.path.insert(0, sys.argv[1])
raise SystemExit(lint_imports(config_filename=sys.argv[2], no_cache=True))
"""


def lint_imports(folder: Path) -> subprocess.CompletedProcess[str]:
    """The project's contracts applied to the rooms in `folder`."""
    argv = [sys.executable, "-P", "-c", LINT, str(folder), str(ROOT / "pyproject.toml")]
    return subprocess.run(argv, cwd=folder, capture_output=True, text=True, timeout=60, check=False)


def test_the_contracts_hold() -> None:
    outcome = lint_imports(ROOT)
    assert outcome.returncode == 0, outcome.stdout


@pytest.mark.parametrize(
    ("importer", "statement"),
    [
        ("sbs/gates.py", "import ray"),
        ("sbs/gates.py", "import harness.errors"),
        ("harness/stages.py", "from sweeps import frontier"),
        ("harness/stages.py", "import mlflow"),
        ("sweeps/frontier.py", "import ffcv"),
        ("sweeps/frontier.py", "import slurm"),
        ("slurm/script.py", "from harness import stages"),
        ("slurm/script.py", "import torch"),
    ],
)
def test_the_contracts_can_break(tmp_path: Path, importer: str, statement: str) -> None:
    modules = ("sbs/gates.py", "harness/errors.py", "harness/stages.py", "sweeps/frontier.py", "slurm/script.py")
    for module in (*(f"{room}/__init__.py" for room in ROOMS), *modules):
        path = tmp_path / module
        path.parent.mkdir(exist_ok=True)
        path.write_text("")
    (tmp_path / importer).write_text(statement)
    outcome = lint_imports(tmp_path)
    assert outcome.returncode == 1, outcome.stdout
    assert "1 broken" in outcome.stdout


def imports_of(path: Path) -> set[str]:
    """Dotted names of all absolute imports in the file, lazy ones too."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def test_ray_train_has_one_door() -> None:
    # import-linter sees external packages whole, so this part of Ray is looked for by hand.
    importers = {
        str(path.relative_to(ROOT))
        for room in ROOMS
        for path in (ROOT / room).rglob("*.py")
        if any(name == "ray.train" or name.startswith("ray.train.") for name in imports_of(path))
    }
    assert importers <= {"harness/ray_worker.py", "harness/doctor_probes.py"}


@pytest.mark.parametrize("room", ["harness", "sweeps", "slurm"])
def test_package_files_import_nothing(room: str) -> None:
    (docstring,) = ast.parse((ROOT / room / "__init__.py").read_text()).body
    assert isinstance(docstring, ast.Expr)


@pytest.mark.parametrize(
    "module",
    ["harness.__main__", "sweeps.__main__", "slurm.__main__", "harness.errors", "harness.settings", "harness.doctor"],
)
def test_command_lines_start_light(module: str) -> None:
    code = f"import json, sys, {module}; print(json.dumps(sorted({{name.split('.')[0] for name in sys.modules}})))"
    outcome = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60, check=True
    )
    assert not HEAVY & set(json.loads(outcome.stdout))
