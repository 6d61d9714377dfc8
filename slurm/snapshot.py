"""What a submission depends on, recorded and copied, so that editing the checkout does not change a queued job."""

import getpass
import os
import platform
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from harness.errors import UserError
from harness.settings import DEFAULT_RUNS_DIR
from slurm.files import make_private_dir, write_json, write_text
from slurm.records import SUBMISSION_FILE

CODE_FOLDER = "code"
LIMIT_BYTES = 512 << 20
_SECRET = re.compile(r"TOKEN|SECRET|PASSW|CREDENTIAL|_KEY$|^KEY|COOKIE|AUTH", re.IGNORECASE)
_NEVER = {".git", "__pycache__", ".mypy_cache", ".ruff_cache", ".pytest_cache", ".hypothesis"}
# Without git nobody says what is code: these are not.
_NOT_CODE = _NEVER | {".venv", "venv", "node_modules", DEFAULT_RUNS_DIR}


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments],
            capture_output=True,
            check=False,
            timeout=60,
            stdin=subprocess.DEVNULL,
        )
    except (FileNotFoundError, subprocess.TimeoutExpired):
        return None
    return done.stdout.decode("utf-8", "surrogateescape") if done.returncode == 0 else None


def code_state(folder: Path) -> dict[str, Any] | None:
    """The commit of a checkout and whether it was changed since; None outside git."""
    commit = _git(folder, "rev-parse", "HEAD")
    if commit is None:
        return None
    changes = _git(folder, "status", "--porcelain") or ""
    return {
        "commit": commit.strip(),
        "branch": (_git(folder, "rev-parse", "--abbrev-ref", "HEAD") or "").strip(),
        "changed_files": [line[3:] for line in changes.splitlines()],
    }


def environment(environ: Mapping[str, str]) -> dict[str, Any]:
    """Interpreter, packages, machine and variables; the values of what looks like a secret are left out."""
    packages = {dist.name: dist.version for dist in metadata.distributions()}
    return {
        "python": sys.version.split()[0],
        "executable": sys.executable,
        "platform": platform.platform(),
        "host": socket.gethostname(),
        "user": getpass.getuser(),
        "modules": environ.get("LOADEDMODULES", "").split(":") if environ.get("LOADEDMODULES") else [],
        "packages": dict(sorted(packages.items())),
        "variables": {k: "(left out)" if _SECRET.search(k) else v for k, v in sorted(environ.items())},
    }


def record(folder: Path, workdir: Path, environ: Mapping[str, str]) -> None:
    """Write `environment.json`, and for a checkout `code.json` and the uncommitted `changes.diff`, into `folder`."""
    write_json(folder / "environment.json", environment(environ))
    state = code_state(workdir)
    if state is not None:
        write_json(folder / "code.json", state)
        diff = _git(workdir, "diff", "HEAD") or ""
        if diff:
            write_text(folder / "changes.diff", diff.encode("utf-8", "replace").decode("utf-8"))


def files_of(workdir: Path) -> list[Path]:
    """The files that are the code, relative to `workdir`: what git tracks or does not ignore, else all but caches.

    Results (`runs/`) are none, whether git ignores them or not.
    """
    listed = _git(workdir, "ls-files", "--cached", "--others", "--exclude-standard", "-z")
    if listed is not None:
        named = [Path(name) for name in listed.split("\0") if name and not name.startswith(f"{DEFAULT_RUNS_DIR}/")]
        return sorted(file for file in named if (workdir / file).is_file())
    found = []
    for parent, folders, names in os.walk(workdir):
        folders[:] = [name for name in folders if name not in _NOT_CODE]
        found += [(Path(parent) / name).relative_to(workdir) for name in names]
    return sorted(found)


def copy_code(workdir: Path, folder: Path) -> Path:
    """Copy the code of `workdir` to `folder/code` and return that.

    What git ignores at the top level (data, results, the virtual environment) is linked, not copied, so that relative
    paths of a command mean the same in the copy: code and configuration are frozen, data and results are shared.
    Raises `UserError` if the code is larger than 512 MiB.
    """
    # submissions, with copies of their own, may lie in the checkout without being ignored
    earlier = {path.parent for path in folder.parent.glob(f"*/{SUBMISSION_FILE}")}
    files = [file for file in files_of(workdir) if earlier.isdisjoint((workdir / file).parents)]
    sizes = {file: (workdir / file).stat().st_size for file in files}
    if sum(sizes.values()) > LIMIT_BYTES:
        largest = sorted(sizes, key=lambda file: -sizes[file])[:3]
        raise UserError(
            f"the code in {workdir} is {sum(sizes.values()) >> 20} MiB, more than {LIMIT_BYTES >> 20} MiB; "
            f"largest: {', '.join(f'{file} ({sizes[file] >> 20} MiB)' for file in largest)}. "
            "Let git ignore data and results, or submit with --no-snapshot."
        )
    target = make_private_dir(folder / CODE_FOLDER)
    for file in files:
        (target / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(workdir / file, target / file)
    (workdir / DEFAULT_RUNS_DIR).mkdir(exist_ok=True)
    for entry in workdir.iterdir():
        if entry.name not in _NEVER and not (target / entry.name).exists():
            (target / entry.name).symlink_to(entry.resolve())
    return target
