"""A second copy of a run directory at an fsspec URL (s3://, gs://, file://), for machines that share no disk.

Rank 0 sends what changed after every checkpoint; a start that finds an empty run directory fetches the copy first. What
counts is still the local folder: a remote that is away delays nothing but the copy.
"""

import logging
from pathlib import Path
from typing import Any

from harness.errors import UserError
from harness.run_dir import RunDir

log = logging.getLogger(__name__)

# Digests after the states they vouch for, the end of a run last: a copy that breaks off claims nothing that it lacks.
_ORDER = (".pt", ".sbs", ".jsonl", ".json")
_LAST = {"result.json", "error.json"}
_LOCAL_ONLY = {"lock", "stop", "progress.json", "stall.json"}


class RemoteCopy:
    """The copy of `run` under `url`, in a folder of the same name."""

    def __init__(self, run: RunDir, url: str) -> None:
        import fsspec  # type: ignore[import-untyped]

        try:
            self._fs, root = fsspec.core.url_to_fs(url)
        except (ImportError, ValueError) as error:
            raise UserError(f"run.remote = {url!r}: {error}") from None
        self._run, self._root = run, f"{root.rstrip('/')}/{run.path.name}"
        self._sent: dict[str, tuple[int, int]] = {}

    def fetch(self) -> bool:
        """Fill an empty run directory from the copy; whether there was one."""
        if self._run.config_path.exists() or not self._fs.exists(self._root):
            return False
        for remote in self._fs.find(self._root):
            name = remote.removeprefix(self._root).lstrip("/")
            target = self._run.path / name
            target.parent.mkdir(parents=True, exist_ok=True)
            self._fs.get_file(remote, str(target))
            self._sent[name] = _state(target)
        return True

    def send(self) -> None:
        """Bring the copy up to date. Trouble on the way is logged; the next call tries again."""
        try:
            self._send()
        except OSError as error:
            log.warning("the copy at %s is behind: %s", self._root, error)

    def _send(self) -> None:
        files = {str(path.relative_to(self._run.path)): path for path in self._files()}
        for name in sorted(files, key=_rank):
            state = _state(files[name])
            if state is not None and state != self._sent.get(name):
                self._fs.makedirs(f"{self._root}/{name}".rpartition("/")[0], exist_ok=True)
                self._fs.put_file(str(files[name]), f"{self._root}/{name}")
                self._sent[name] = state
        for name in self._sent.keys() - files.keys():
            self._fs.rm_file(f"{self._root}/{name}")
            del self._sent[name]

    def _files(self) -> list[Path]:
        folders = (self._run.path, self._run.checkpoints, self._run.stages)
        return [
            path
            for folder in folders
            for path in folder.glob("*")
            if path.is_file() and path.name not in _LOCAL_ONLY and not path.name.startswith(".")
        ]


def _state(path: Path) -> Any:
    """What changes when a file does; None if it is gone again."""
    try:
        about = path.stat()
    except FileNotFoundError:
        return None
    return about.st_size, about.st_mtime_ns


def _rank(name: str) -> tuple[bool, int, str]:
    suffix = Path(name).suffix
    return name in _LAST, _ORDER.index(suffix) if suffix in _ORDER else 0, name
