"""`make setup`: the virtual environment, pinned packages, FFCV from source, all verified; idempotent.

Variables: PYTHON (which interpreter), TORCH_INDEX (an index URL or a folder of wheels to take torch from, say the one
of CPU builds or of another CUDA version), and all of pip's own (PIP_INDEX_URL, PIP_FIND_LINKS, HTTPS_PROXY ...).
"""

import fcntl
import hashlib
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from scripts import debian
from scripts.console import SetupError, fail, run, step

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
PYTHON = VENV / "bin" / "python"
STAMP = VENV / "sbs-harness-setup"
CONSTRAINTS = ROOT / "constraints.txt"
PIP = (str(PYTHON), "-m", "pip", "--disable-pip-version-check", "--no-input")

CPU_TORCH_GIB = 5.0
CUDA_TORCH_GIB = 14.0
CUDA_NOTE = """\
    NOTE: no GPU here, yet pip's package index has only the default build of torch, which on Linux brings CUDA
    (several GB). To take a CPU build instead: Ctrl-C, then make setup TORCH_INDEX=<an index of CPU wheels, or a
    folder of wheels>; the PyTorch site's installation page names the index."""
FFCV = "ffcv==1.0.2"
# FFCV's setup.py asks pkg-config for all of OpenCV; it uses these two parts of it.
OPENCV_HEADER = "#include <opencv2/core.hpp>\n#include <opencv2/imgproc.hpp>\n"
OPENCV_PC = """Name: opencv4
Description: core and imgproc
Version: 4
Libs: -lopencv_imgproc -lopencv_core
Cflags: -I{shim} {include}
"""
INCLUDE_FOLDERS = tuple(
    Path(folder)
    for folder in (
        *os.environ.get("CPLUS_INCLUDE_PATH", "").split(":"),
        "/usr/include/opencv4",
        "/usr/include",
        "/usr/local/include/opencv4",
        "/usr/local/include",
    )
    if folder
)
HEADERS = {
    "libopencv-core-dev": "opencv2/core.hpp",
    "libopencv-imgproc-dev": "opencv2/imgproc.hpp",
    "libturbojpeg0-dev": "turbojpeg.h",
}


def fingerprint() -> str:
    """What a finished set-up was made from: a change in any of it runs the set-up again."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    parts = {
        "constraints": CONSTRAINTS.read_text(),
        "project": {
            "project": project["project"],
            "build": project["build-system"],
            "setuptools": project["tool"]["setuptools"],
        },
        "scripts": [path.read_text() for path in sorted((ROOT / "scripts").glob("*.py"))],
        "packages": [name for name in ("sbs", "harness", "sweeps", "slurm") if (ROOT / name / "__init__.py").is_file()],
        "python": [sys.version, sys.base_prefix],
        "torch_index": os.environ.get("TORCH_INDEX", ""),
        "root": str(ROOT),
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def missing_packages() -> list[str]:
    """The Debian packages to add: by what they provide, so that a self-built or differently packaged one counts too."""
    missing = [] if shutil.which("g++") else ["g++"]
    missing += [] if shutil.which("pkg-config") else ["pkg-config"]
    missing += [
        package
        for package, header in HEADERS.items()
        if not any((folder / header).is_file() for folder in INCLUDE_FOLDERS)
    ]
    series = f"python{sys.version_info.major}.{sys.version_info.minor}"
    if not (Path(sysconfig.get_path("include")) / "Python.h").is_file():
        missing.append(f"{series}-dev")
    if subprocess.run([sys.executable, "-c", "import venv, ensurepip"], capture_output=True, check=False).returncode:
        missing.append(f"{series}-venv")
    return missing


def has_gpu() -> bool:
    """Whether an NVIDIA device is on this machine, asked without any library."""
    return any(Path("/dev").glob("nvidia[0-9]*"))


def require_space(gib: float, what: str) -> None:
    """Raises SetupError when the project's disk has less room."""
    free = shutil.disk_usage(ROOT).free / 2**30
    if free < gib:
        raise SetupError(
            f"{what} needs about {gib:.0f} GiB free under {ROOT}, {free:.1f} GiB are; free some space and try again"
        )


def make_venv(log: Path) -> None:
    """A usable `.venv`, made anew where an interrupted run or a move left a broken one."""
    usable = PYTHON.is_file() and subprocess.run([*PIP, "--version"], capture_output=True, check=False).returncode == 0
    if usable:
        ask = [str(PYTHON), "-c", "import sys; print(sys.version)"]
        same_python = subprocess.run(ask, capture_output=True, text=True, check=False).stdout.strip() == sys.version
        # Scripts name the folder they were installed in, so a moved environment is of no use.
        at_home = (VENV / "bin" / "activate").read_bytes().find(os.fsencode(VENV)) >= 0
        usable = same_python and at_home
    if not usable:
        # From inside another virtual environment: the interpreter behind it, which outlives it.
        base = getattr(sys, "_base_executable", sys.executable)
        run([base, "-m", "venv", "--clear", str(VENV)], log)
    # A pip that was killed can leave a package without its list of files, which pip would then take for installed.
    for record in VENV.glob("lib/python*/site-packages/*.dist-info"):
        if not (record / "RECORD").is_file():
            shutil.rmtree(record)


def pip_install(log: Path, *arguments: str, env: dict[str, str] | None = None) -> None:
    """`pip install` under the constraints file."""
    run((*PIP, "install", "--constraint", str(CONSTRAINTS), *arguments), log, env)


def torch_source(index: str) -> list[str]:
    """pip's arguments for TORCH_INDEX: a folder of wheels beside the usual index, or an index of its own."""
    return ["--find-links", index] if Path(index).is_dir() else ["--index-url", index] if index else []


def install_torch(log: Path) -> None:
    """torch alone, first: a CPU build on a machine without a GPU wherever pip's sources offer one."""
    pinned = next(line for line in CONSTRAINTS.read_text().splitlines() if line.startswith("torch=="))
    source = torch_source(os.environ.get("TORCH_INDEX", ""))
    if not has_gpu():
        require_space(CPU_TORCH_GIB, "the set-up")
        # pip, not the caller, decides: a local version "+cpu" exists only in sources that carry CPU builds.
        try:
            return pip_install(log, "--no-deps", *source, f"{pinned}+cpu")
        except SetupError as error:
            if "offers no" not in str(error):
                raise
        if not source:
            print(CUDA_NOTE, flush=True)
    require_space(CUDA_TORCH_GIB, "torch with CUDA (smaller: TORCH_INDEX=<an index of CPU wheels>)")
    pip_install(log, "--no-deps", *source, pinned)
    return None


def ffcv_works() -> bool:
    """Whether this environment's FFCV is the pinned one and its native part loads."""
    code = (
        f"import importlib.metadata as m, ffcv._libffcv; raise SystemExit(m.version('ffcv') != {FFCV.split('==')[1]!r})"
    )
    return subprocess.run([str(PYTHON), "-c", code], capture_output=True, check=False).returncode == 0


@contextmanager
def ffcv_environment() -> Iterator[dict[str, str]]:
    """The variables under which pip builds FFCV, against the two parts of OpenCV that it uses."""
    # pkg-config's flags are split at blanks: a folder without any, whatever TMPDIR and the checkout are called.
    with tempfile.TemporaryDirectory(
        prefix="sbs-ffcv-", dir=None if " " not in tempfile.gettempdir() else "/tmp"
    ) as folder:
        shim = Path(folder)
        (shim / "opencv2").mkdir()
        (shim / "opencv2" / "opencv.hpp").write_text(OPENCV_HEADER)
        include = " ".join(f"-I{path}" for path in INCLUDE_FOLDERS if path.name == "opencv4" and path.is_dir())
        (shim / "opencv4.pc").write_text(OPENCV_PC.format(shim=shim, include=include))
        paths = [str(shim), *filter(None, [os.environ.get("PKG_CONFIG_PATH")])]
        yield {**os.environ, "PKG_CONFIG_PATH": ":".join(paths), "TMPDIR": folder}


def build_ffcv(log: Path) -> None:
    """FFCV from source, against the few libraries it uses; about 20 s."""
    with ffcv_environment() as environment:
        # Built here each time: a wheel from pip's cache could be linked against libraries that are gone since.
        pip_install(
            log, "--no-deps", "--no-build-isolation", "--no-cache-dir", "--force-reinstall", FFCV, env=environment
        )
    if not ffcv_works():
        raise SetupError(f"FFCV was built, but its native part does not load; log: {log}")


def set_up(log: Path) -> None:
    """Every step in order; each leaves alone what is there already."""
    if missing := missing_packages():
        with step("system packages"):
            debian.install(missing, log, "building FFCV and torch.compile")
    with step("virtual environment"):
        make_venv(log)
        pip_install(log, "setuptools", "wheel")
    with step("torch"):
        install_torch(log)
    with step("Ray, MLflow, pinned packages and this project"):
        pip_install(log, "--no-build-isolation", "--editable", f"{ROOT}[dev]")
    if not ffcv_works():
        with step("FFCV"):
            build_ffcv(log)
    print("  verification ...", flush=True)
    if subprocess.run([str(PYTHON), "-m", "harness", "doctor"], cwd=ROOT, check=False).returncode:
        raise SetupError("installed, but a check above failed; mend what it names and run the same command again")


def main() -> int:
    """Exit status: 0 when everything is there, 2 with one message otherwise."""
    if sys.platform != "linux":
        return fail("make setup", SetupError(f"needs Linux (FFCV, Ray and SLURM); this is {sys.platform}"))
    os.environ.pop("PYTHONPATH", None)
    lock = os.open(ROOT, os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)  # two `make` in one checkout: the second waits, then finds all done
    try:
        wanted = fingerprint()
        if PYTHON.is_file() and STAMP.is_file() and STAMP.read_text() == wanted:
            return 0
        print(f"Setting up {VENV} with Python {sys.version.split()[0]} (a few minutes the first time)", flush=True)
        log = Path(tempfile.mkstemp(prefix="sbs-harness-setup-", suffix=".log")[1])
        set_up(log)
        shutil.move(log, VENV / "setup.log")
        STAMP.write_text(wanted)
    except SetupError as error:
        return fail("make setup", error)
    except KeyboardInterrupt:
        return fail("make setup", SetupError("interrupted; the same command goes on from here"))
    finally:
        os.close(lock)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
