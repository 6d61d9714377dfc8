"""`make gpu`: put what a bare GPU machine lacks into `.gpu`, once, and say how to run there."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from scripts.bootstrap import ROOT
from scripts.console import SetupError, fail, step
from scripts.gpu.carried import ARCHIVES, PYTHON, Archive, pack

CARRIED = ROOT / ".gpu"
CONTENTS = CARRIED / "contents.json"
LIMIT_MIB = 60.0
NEXT = """
To run there: copy the tree and .gpu, then, in the tree,
  python3 scripts/gpu/run.py --out FOLDER --budget-s 600
Rehearse it first, on the CPU: make gpu-rehearsal"""


def find_python() -> Path:
    """An interpreter of the GPU machine's version: GPU_PYTHON, one on PATH, or one of pyenv's."""
    named = os.environ.get("GPU_PYTHON")
    candidates = [named] if named else [f"python{PYTHON}", *map(str, Path("~/.pyenv/versions").expanduser().glob(
        f"{PYTHON}.*/bin/python"))]  # fmt: skip
    for candidate in candidates:
        found = shutil.which(candidate)
        ask = [found or candidate, "-c", "import sys; print('%d.%d' % sys.version_info[:2], sys.executable)"]
        answer = subprocess.run(ask, capture_output=True, text=True, check=False).stdout.split() if found else []
        if answer[:1] == [PYTHON]:
            return Path(answer[1])
    looked = ", ".join(candidates)
    raise SetupError(
        f"the GPU machine has Python {PYTHON}, and none is here (looked for {looked}); install one with its headers, "
        f"or name it: make gpu GPU_PYTHON=/path/to/python{PYTHON}"
    )


def contents() -> dict[str, Any]:
    """What `.gpu` holds: {name: {key, bytes}}; nothing if it was never made."""
    return dict(json.loads(CONTENTS.read_text())["archives"]) if CONTENTS.is_file() else {}


def make(archive: Archive, python: Path, log: Path) -> dict[str, Any] | None:
    """Bring one archive up to date; its entry in the contents, None for one that is left out."""
    path = CARRIED / f"{archive.name}.tar.xz"
    key = hashlib.sha256(json.dumps([PYTHON, archive.inputs]).encode()).hexdigest()[:16]
    if path.is_file() and contents().get(archive.name, {}).get("key") == key:
        return {"key": key, "bytes": path.stat().st_size}
    path.unlink(missing_ok=True)
    try:
        with step(archive.what), tempfile.TemporaryDirectory(prefix="sbs-gpu-") as folder:
            archive.fill(python, Path(folder), log)
            pack(Path(folder), path)
    except SetupError as error:
        if archive.needed:
            raise
        print(f"  left out: {archive.what}: {error}", flush=True)
        return None
    return {"key": key, "bytes": path.stat().st_size}


def check_size(sizes: dict[str, int]) -> None:
    """Print what will be carried; raises SetupError when it is more than a machine is given."""
    for name, size in sizes.items():
        print(f"  {CARRIED.name}/{name}.tar.xz  {size / 2**20:.1f} MiB")
    total = sum(sizes.values()) / 2**20
    print(f"  in all  {total:.1f} MiB of at most {LIMIT_MIB:g}")
    if total > LIMIT_MIB:
        raise SetupError(f"{CARRIED} is too large to be carried; remove one of the archives that can be done without")


def main() -> int:
    """Exit status: 0 when all that is needed is there, 2 with one message otherwise."""
    try:
        python = find_python()
        print(f"Preparing {CARRIED} for Python {PYTHON} (about two minutes the first time)", flush=True)
        CARRIED.mkdir(exist_ok=True)
        log = Path(tempfile.gettempdir()) / "sbs-gpu-prepare.log"
        made: dict[str, Any] = {}
        for archive in ARCHIVES:
            entry = make(archive, python, log)
            made |= {} if entry is None else {archive.name: entry}
            CONTENTS.write_text(json.dumps({"python": PYTHON, "archives": contents() | made}, indent=2))
        CONTENTS.write_text(json.dumps({"python": PYTHON, "archives": made}, indent=2))
        check_size({name: entry["bytes"] for name, entry in made.items()})
    except SetupError as error:
        return fail("make gpu", error)
    print(NEXT)
    return 0


if __name__ == "__main__":
    sys.exit(main())
