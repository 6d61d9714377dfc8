"""Checkpoints of a run: weights-only files with a digest beside them, written atomically, newest sound one found first.

checkpoints/search-00000120.pt    in the middle of a stage; the last k are kept
checkpoints/search-00000120.json  its digest; written after the .pt, so a checkpoint without it does not exist
stages/search.pt, .json           the outcome of a finished stage, under the key of all it depends on
"""

import hashlib
import io
import logging
import queue
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from harness.errors import UserError, require_file
from harness.run_dir import read_json, write_bytes, write_json
from harness.settings import CHECKPOINT_FORMAT

log = logging.getLogger(__name__)

State = dict[str, Any]


def to_cpu(value: Any) -> Any:
    """A copy of nested containers with every tensor cloned to CPU memory; what training does next cannot change it."""
    if isinstance(value, torch.Tensor):
        return value.detach().to("cpu", copy=True)  # strides stay: optimiser states must match their parameters'
    if isinstance(value, dict):
        return {key: to_cpu(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_cpu(item) for item in value]
    return value


def save(path: Path, state: State, key: str) -> None:
    """Write a state and then its digest; a reader sees both or neither."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    content = buffer.getvalue()
    write_bytes(path, content)
    about = {
        "format": CHECKPOINT_FORMAT,
        "key": key,
        "sha256": hashlib.sha256(content).hexdigest(),
        "bytes": len(content),
    }
    write_json(path.with_suffix(".json"), about)


def load(path: Path, key: str | None = None) -> State | None:
    """The state in `path`, or None if it is absent, made under another key or format, or damaged (with a warning)."""
    about = _read_about(path)
    if about is None or about["format"] != CHECKPOINT_FORMAT or (key is not None and about["key"] != key):
        return None
    content = path.read_bytes() if path.exists() else b""
    if hashlib.sha256(content).hexdigest() != about["sha256"]:
        log.warning("checkpoint %s is damaged (%d bytes, expected %d): skipped", path, len(content), about["bytes"])
        return None
    return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)


def _read_about(path: Path) -> dict[str, Any] | None:
    try:
        return read_json(path.with_suffix(".json"))
    except ValueError:
        log.warning("checkpoint %s has a damaged digest file: skipped", path)
        return None


def weights_digest(state: State) -> str:
    """SHA-256 over the names, shapes, types and bits of a state dict, whatever its memory layout."""
    total = hashlib.sha256()
    for name, tensor in sorted(state.items()):
        total.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        total.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return total.hexdigest()


def save_weights(path: Path, weights: State) -> None:
    """Write a plain state dict, for anyone to read with torch.load(weights_only=True)."""
    buffer = io.BytesIO()
    torch.save(weights, buffer)
    write_bytes(path, buffer.getvalue())


def load_weights(path: Path) -> State:
    """A plain state dict; `UserError` if the file is missing or is none."""
    state = load_any(path)
    if not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise UserError(f"{path} holds no state dict (names with tensors)")
    return state


def load_any(path: Path) -> State:
    """A dictionary from any file of torch.save, without running code from it; `UserError` if it is none."""
    require_file(path, "weights", "Give a state dict saved by torch.save.")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # noqa: BLE001 - its reader stumbles over foreign bytes in many ways
        reason = (str(error).splitlines() or [""])[0]
        raise UserError(f"{path} is not a readable state dict ({type(error).__name__}: {reason})") from None
    if not isinstance(state, dict):
        raise UserError(f"{path} holds no state dict (names with tensors)")
    return state


def remove(path: Path) -> None:
    """Take a checkpoint away, digest first."""
    path.with_suffix(".json").unlink(missing_ok=True)
    path.unlink(missing_ok=True)


def remove_torn(*folders: Path) -> None:
    """Take away what killed writers left half-written; for the holder of the run's lock."""
    for path in [path for folder in folders for path in folder.glob(".*.tmp")]:
        path.unlink(missing_ok=True)


class CheckpointFolder:
    """The checkpoints of one run's unfinished stage, written by rank 0 from a background thread."""

    def __init__(self, folder: Path, keep: int) -> None:
        self._folder = folder
        self._keep = keep
        self._queue: queue.Queue[Callable[[], None] | None] = queue.Queue(maxsize=1)
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._work, name="checkpoint-writer", daemon=True)
        self._thread.start()

    def path(self, stage: str, step: int) -> Path:
        """Where the checkpoint of a stage after a global step lies."""
        return self._folder / f"{stage}-{step:08d}.pt"

    def newest(self, stage: str, key: str) -> tuple[State, Path] | None:
        """State and path of the newest sound checkpoint of a stage; damaged ones are skipped with a warning."""
        for path in self._of(stage):
            state = load(path, key)
            if state is not None:
                return state, path
        return None

    def write(
        self,
        stage: str,
        step: int,
        key: str,
        state: State,
        done: Callable[[], None],
        *,
        before: Callable[[], None] | None = None,
    ) -> None:
        """In the background call `before`, write a state (a copy by `to_cpu`), call `done`, and drop old checkpoints.

        Waits if an earlier one is still being written; raises what went wrong with that.
        """

        def job() -> None:
            if before is not None:
                before()
            save(self.path(stage, step), state, key)
            done()
            for old in self._of(stage)[self._keep :]:
                remove(old)

        self._check()
        self._queue.put(job)

    def write_best(self, stage: str, key: str, state: State) -> None:
        """Write a state in the background as the best of its stage."""
        self._check()
        self._queue.put(lambda: save(self._folder / f"best-{stage}.pt", state, key))

    def flush(self) -> None:
        """Wait until everything is written; raises what went wrong."""
        self._queue.join()
        self._check()

    def close(self) -> None:
        """Write what is waiting and end the thread."""
        self._queue.put(None)
        self._thread.join()

    def clear(self, stage: str) -> None:
        """Remove the checkpoints of a stage: it has an outcome."""
        self.flush()
        for path in self._of(stage):
            remove(path)

    def _of(self, stage: str) -> list[Path]:
        return sorted(self._folder.glob(f"{stage}-*.pt"), reverse=True)

    def _check(self) -> None:
        if self._failure is not None:
            raise RuntimeError("writing a checkpoint failed") from self._failure

    def _work(self) -> None:
        while True:
            job = self._queue.get()
            try:
                if job is None:
                    return
                job()
            except BaseException as failure:  # noqa: BLE001 - handed to the training thread
                self._failure = failure
            finally:
                self._queue.task_done()
