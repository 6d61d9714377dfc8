"""`make gpu-rehearsal`: all of `run.py` on the CPU, from a copy of the tree, with no more than a bare machine has.

The first minute of a real GPU is not to go to an import that fails. GPU_VENV names the environment (default
.gpu-venv; several GiB where pip offers only torch with CUDA), TORCH_INDEX where torch comes from.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from scripts.bootstrap import ROOT, torch_source
from scripts.console import SetupError, fail, run, step
from scripts.gpu.carried import BASE, FFCV, RAY
from scripts.gpu.prepare import CARRIED, find_python

TORCH = "torch==2.11.0"
BARE = (
    "aiohttp", "attrs", "click", "cloudpickle", "filelock", "fsspec", "grpcio", "hypothesis", "jinja2", "matplotlib",
    "msgpack", "numba", "numpy", "opencv-python-headless", "packaging", "pandas", "pillow", "prometheus-client",
    "protobuf", "psutil", "pyarrow", "pytest", "pytest-timeout", "pytest-xdist", "pyyaml", "requests", "rich",
    "scikit-learn", "scipy", "setuptools", "sortedcontainers", "tqdm", "typer", "wheel",
)  # fmt: skip
"""What a bare machine has beside torch, of what the project or Ray use."""


def lacking() -> list[str]:
    """What it has not, although something of the above may bring it here."""
    carried = {line.partition("==")[0] for line in (*BASE, *RAY, *FFCV)} - {"typing_extensions"}
    return sorted(carried | {"mlflow", "optuna", "submitit", "sbs-harness"})


def make_environment(venv: Path, log: Path) -> Path:
    """The interpreter of an environment like that of a bare machine; made once."""
    python, stamp = venv / "bin" / "python", venv / "sbs-gpu-rehearsal"
    made_from = " ".join((TORCH, *BARE))
    if python.is_file() and stamp.is_file() and stamp.read_text() == made_from:
        return python
    with step(f"environment of a bare machine in {venv}"):
        if not python.is_file():
            run([str(find_python()), "-m", "venv", str(venv)], log)
        pip = [str(python), "-m", "pip", "--disable-pip-version-check", "--no-input"]
        run([*pip, "install", *torch_source(os.environ.get("TORCH_INDEX", "")), TORCH], log)
        run([*pip, "install", *BARE], log)
        run([*pip, "uninstall", "-y", *lacking()], log)
        stamp.write_text(made_from)
    return python


def copy_tree(folder: Path) -> None:
    """What would travel: tracked files, those that git does not ignore, and what is carried."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        check=True,
    )
    for name in filter(None, listed.stdout.decode().split("\0")):
        source = ROOT / name
        if source.is_file() and not source.is_symlink():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, folder / name)
    shutil.copytree(CARRIED, folder / CARRIED.name)


def made_up_cifar(folder: Path) -> list[str]:
    """Options for the part `cifar`: noise in the form of CIFAR-100, an epoch a stage."""
    import numpy as np

    random, place = np.random.default_rng(0), folder / "cifar.npz"
    arrays: dict[str, Any] = {}
    for split, count in (("train", 256), ("val", 100)):
        arrays[f"{split}_images"] = random.integers(0, 256, (count, 32, 32, 3)).astype(np.uint8)
        arrays[f"{split}_labels"] = np.arange(count) % 100
    np.savez(place, **arrays)
    sets = [f"--cifar-set={stage}.epochs=1" for stage in ("pretrain", "search", "finetune")]
    return ["--cifar", str(place), *sets]


def main(arguments: list[str]) -> int:
    """The exit status of the rehearsal; 2 when it cannot begin."""
    log = Path(tempfile.gettempdir()) / "sbs-gpu-rehearsal.log"
    try:
        if not CARRIED.is_dir():
            raise SetupError(f"{CARRIED} is not there; make gpu makes it")
        python = make_environment(Path(os.environ.get("GPU_VENV") or ROOT / ".gpu-venv").absolute(), log)
    except SetupError as error:
        return fail("make gpu-rehearsal", error)
    out = CARRIED.parent / ".gpu-rehearsal"
    with tempfile.TemporaryDirectory(prefix="sbs-gpu-tree-") as folder:
        copy_tree(Path(folder))
        command = ["scripts/gpu/run.py", "--rehearsal", "--budget-s", "3600", "--out", str(out)]
        command += [*made_up_cifar(Path(folder)), *arguments]
        variables = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        status = subprocess.run([str(python), *command], cwd=folder, env=variables, check=False).returncode
    print(f"results: {out}")
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
