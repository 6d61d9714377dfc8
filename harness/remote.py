"""A second copy of a run directory at an fsspec URL (s3://, gs://, file://), for machines that share no disk.

Rank 0 asks for the copy after every checkpoint, and a thread sends what changed; a start that finds an empty run
directory fetches the copy first. What counts is still the local folder: a remote that is slow or away delays nothing
but the copy.
"""

import logging
import queue
import threading
from contextlib import suppress
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
        self._run, self._url, self._root = run, url, f"{root.rstrip('/')}/{run.path.name}"
        self._sent: dict[str, Any] | None = None  # what is there, by name; None: not looked yet
        self._requests: queue.SimpleQueue[bool] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    def fetch(self) -> bool:
        """Fill an empty run directory from the copy, to go on with it; whether there was one.

        Raises `UserError` if that cannot be found out. How an earlier attempt failed is not fetched.
        """
        return not self._run.config_path.exists() and self._fetch(leave_out={"error.json"})

    def fetch_outcome(self) -> bool:
        """Bring the run directory to the state of the copy, as others left it; whether there was one."""
        return self._fetch(leave_out=set())

    def send(self) -> None:
        """Begin to bring the copy up to date. Trouble on the way is logged; the next call tries again."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name="remote-copy", daemon=True)
            self._thread.start()
        self._requests.put(True)

    def close(self, limit_s: float) -> None:
        """Wait until the copy is up to date, though no longer than `limit_s`."""
        if self._thread is None:
            return
        self._requests.put(False)
        self._thread.join(limit_s)
        if self._thread.is_alive():
            log.warning("the copy at %s is behind: not complete after %g s", self._root, limit_s)

    def _fetch(self, leave_out: set[str]) -> bool:
        try:
            names = self._names()
            # config.json last: without it a fetch that broke off counts as none
            for name in sorted(names - leave_out, key=lambda name: (name == "config.json", name)):
                target = self._run.path / name
                target.parent.mkdir(parents=True, exist_ok=True)
                self._fs.get_file(f"{self._root}/{name}", str(target))
        except Exception as error:  # each store has exceptions of its own
            raise UserError(f"run.remote = {self._url!r} cannot be read: {type(error).__name__}: {error}") from error
        self._sent = {name: _state(self._run.path / name) for name in names}
        return bool(names)

    def _names(self) -> set[str]:
        self._fs.invalidate_cache()
        if not self._fs.exists(self._root):
            return set()
        return {found[found.index(self._root) + len(self._root) :].lstrip("/") for found in self._fs.find(self._root)}

    def _work(self) -> None:
        go_on = True
        while go_on:
            requests = [self._requests.get()]
            while not self._requests.empty():
                requests.append(self._requests.get())
            go_on = all(requests)
            if any(requests):
                try:
                    self._send()
                except Exception as error:  # noqa: BLE001 - each store has exceptions of its own
                    log.warning("the copy at %s is behind: %s: %s", self._root, type(error).__name__, error)

    def _send(self) -> None:
        if self._sent is None:
            self._sent = dict.fromkeys(self._names())
        files = {str(path.relative_to(self._run.path)): path for path in self._files()}
        for name in sorted(files, key=_rank):
            state = _state(files[name])
            if state is not None and state != self._sent.get(name):
                self._fs.makedirs(f"{self._root}/{name}".rpartition("/")[0], exist_ok=True)
                try:
                    self._fs.put_file(str(files[name]), f"{self._root}/{name}")
                except FileNotFoundError:
                    if files[name].exists():
                        raise
                    continue  # an old checkpoint, taken away meanwhile
                self._sent[name] = state
        for name in sorted(self._sent.keys() - files.keys()):
            with suppress(FileNotFoundError):
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
