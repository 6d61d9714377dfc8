"""Small files on storage that several machines share: written whole or not at all, readable by their owner only."""

import errno
import json
import os
import tempfile
from pathlib import Path
from typing import Any

OWNER_ONLY = 0o700
_STALE_TRIES = 5


def make_private_dir(path: Path) -> Path:
    """Create `path` (and what is missing above it) readable and enterable by its owner alone."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.mkdir(mode=OWNER_ONLY, exist_ok=True)
    path.chmod(OWNER_ONLY)
    return path


def write_text(path: Path, text: str) -> None:
    """Replace `path` by `text`; the file has mode 600 and survives a loss of power once this returns."""
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        Path(temporary).rename(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def write_json(path: Path, tree: Any) -> None:
    """Replace `path` by plain data, as `write_text` does."""
    write_text(path, json.dumps(tree, indent=1) + "\n")


def read_json(path: Path) -> Any | None:
    """Plain data of a file that another machine may just have written; None while there is none."""
    for _ in range(_STALE_TRIES):
        refresh(path.parent)
        try:
            return json.loads(path.read_text(encoding="utf-8"))
        except (FileNotFoundError, json.JSONDecodeError):
            return None
        except OSError as error:
            if error.errno != errno.ESTALE:  # replaced while it was read: the new one is there
                raise
    return None


def refresh(folder: Path) -> None:
    """Make a network file system forget what it remembers of `folder`, so that new files in it are seen at once."""
    try:
        folder.chmod(folder.stat().st_mode)
    except OSError:
        return
