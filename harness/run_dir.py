"""The folder of one trial: the truth about it, written atomically; everything else (MLflow, tables) is a view of it.

config.json provenance.json   what was asked, and on what it ran
metrics.jsonl                 one record a line, see `MetricsLog`
checkpoints/ stages/          see `harness.checkpoint`
policy.json weights.pt        what the search decided, the final weights
result.json | error.json      how it ended
"""

import errno
import fcntl
import json
import logging
import os
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, Literal

from harness.errors import UserError

log = logging.getLogger(__name__)

RecordKind = Literal["metrics", "checkpoint", "event"]
# Lustre without -o flock, NFS without its lock daemon.
_NO_LOCKS = {errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK}


class RunDir:
    """Paths and files of one trial. Reading is safe at any time; writing belongs to the holder of `lock()`."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.config_path = self.path / "config.json"
        self.provenance_path = self.path / "provenance.json"
        self.metrics_path = self.path / "metrics.jsonl"
        self.policy_path = self.path / "policy.json"
        self.weights_path = self.path / "weights.pt"
        self.export_path = self.path / "model.sbs"
        self.result_path = self.path / "result.json"
        self.error_path = self.path / "error.json"
        self.progress_path = self.path / "progress.json"
        self.checkpoints = self.path / "checkpoints"
        self.stages = self.path / "stages"
        self._stop_path = self.path / "stop"

    def create(self) -> "RunDir":
        """Make the folder and its subfolders; return self."""
        self.checkpoints.mkdir(parents=True, exist_ok=True)
        self.stages.mkdir(exist_ok=True)
        return self

    def result(self) -> dict[str, Any] | None:
        """Content of result.json, or None if the trial has not finished."""
        return read_json(self.result_path)

    def error(self) -> dict[str, Any] | None:
        """Content of error.json (`message`, `stage`), or None."""
        return read_json(self.error_path)

    def metrics(self) -> list[dict[str, Any]]:
        """All records of metrics.jsonl in order; a torn end is left out."""
        try:
            text = self.metrics_path.read_text(encoding="utf-8", errors="replace")
        except FileNotFoundError:
            return []
        return parse_records(text)

    def write_progress(self, progress: Mapping[str, Any]) -> None:
        """Replace progress.json, from which bars are drawn; atomic, but not synced to disk: it is cheap talk."""
        temporary = self.progress_path.with_suffix(".tmp")
        temporary.write_text(json.dumps(progress), encoding="utf-8")
        temporary.replace(self.progress_path)

    def request_stop(self) -> None:
        """Ask the processes that run this trial, wherever they are, to checkpoint and leave."""
        self.path.mkdir(parents=True, exist_ok=True)
        self._stop_path.touch()

    def stop_requested(self) -> bool:
        """Whether `request_stop` was called since the last `clear_stop`."""
        return self._stop_path.exists()

    def clear_stop(self) -> None:
        """Forget an earlier request to stop; whoever starts the trial again calls this."""
        self._stop_path.unlink(missing_ok=True)

    def clear_error(self) -> None:
        """Forget how an earlier attempt failed; whoever starts the trial again calls this."""
        self.error_path.unlink(missing_ok=True)

    @contextmanager
    def lock(self, patience_s: float = 60.0) -> Iterator[None]:
        """Hold the folder for writing; wait for a dying predecessor; `UserError` if another process keeps it."""
        self.path.mkdir(parents=True, exist_ok=True)
        with (self.path / "lock").open("a+", encoding="utf-8") as file:
            deadline = time.monotonic() + patience_s
            while not _try_lock(file):
                if time.monotonic() > deadline:
                    file.seek(0)
                    raise UserError(
                        f"{self.path} is in use by {file.read().strip() or 'another process'}. "
                        "Wait for it or end it, or choose another --run-dir."
                    )
                time.sleep(0.1)
            file.truncate(0)
            file.write(f"process {os.getpid()} on {os.uname().nodename}\n")
            file.flush()
            yield


class MetricsLog:
    """Appends records to metrics.jsonl with ascending `seq`; one writer at a time.

    A record: {"seq", "time" (unix seconds), "kind", "stage", "epoch", "step" (global over stages), "metrics": {...}}.
    A record of kind checkpoint says {"covers": seq}: everything up to there is durable and will never be written again
    differently; `truncate` drops what lies beyond the checkpoint that a run resumes from.
    """

    def __init__(self, run: RunDir) -> None:
        self._run = run
        records = run.metrics()
        self.last_seq = records[-1]["seq"] if records else 0
        self._lock = threading.Lock()
        _heal_torn_end(run.metrics_path)

    def append(
        self, kind: RecordKind, stage: str, epoch: int, step: int, metrics: Mapping[str, Any], **extra: Any
    ) -> int:
        """Write one record, so that it survives the death of this process; return its `seq`. Safe among threads."""
        about = {"time": time.time(), "kind": kind, "stage": stage, "epoch": epoch, "step": step}
        with self._lock, self._run.metrics_path.open("a", encoding="utf-8") as file:
            record = {"seq": self.last_seq + 1} | about | {"metrics": dict(metrics)} | extra
            file.write(json.dumps(record) + "\n")
            self.last_seq += 1
            return self.last_seq

    def sync(self) -> None:
        """Make what was appended survive a power cut; a checkpoint that covers it must not come through alone."""
        with self._run.metrics_path.open("a", encoding="utf-8") as file:
            os.fsync(file.fileno())

    def truncate(self, covers: int) -> None:
        """Drop every record after `covers`: the run goes on from a checkpoint that does not know them."""
        kept = [record for record in self._run.metrics() if record["seq"] <= covers]
        write_text(self._run.metrics_path, "".join(json.dumps(record) + "\n" for record in kept))
        self.last_seq = covers


def parse_records(text: str) -> list[dict[str, Any]]:
    """Records of a metrics.jsonl text, up to the first line that is none.

    A writer that dies leaves an incomplete last line; a power cut may leave anything beyond the last checkpoint.
    """
    return _whole_records(text)[0]


def _whole_records(text: str) -> tuple[list[dict[str, Any]], int]:
    """Records, and the number of characters that they take."""
    records, end = [], 0
    for line in text.splitlines(keepends=True):
        try:
            record = json.loads(line) if line.endswith("\n") else None
        except json.JSONDecodeError:
            record = None
        if not isinstance(record, dict):
            break
        records.append(record)
        end += len(line)
    return records, end


def write_bytes(path: Path, content: bytes) -> None:
    """Replace a file atomically and durably: readers see the old content or the new, also after a power cut."""
    temporary = path.with_name(f".{path.name}.{os.uname().nodename}-{os.getpid()}.tmp")  # ranks may share the folder
    with temporary.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def write_text(path: Path, text: str) -> None:
    """`write_bytes` for text, in UTF-8."""
    write_bytes(path, text.encode())


def write_json(path: Path, value: Any) -> None:
    """`write_bytes` for JSON, indented."""
    write_text(path, json.dumps(value, indent=1) + "\n")


def read_json(path: Path) -> dict[str, Any] | None:
    """A JSON object, or None if the file does not exist."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None


def _try_lock(file: IO[str]) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        log.warning("%s: this file system has no locks; see to it that one run at a time writes here", file.name)
    return True


def _heal_torn_end(path: Path) -> None:
    """Cut what is no record, so that the next one starts on a line of its own."""
    if not path.exists():
        return
    text = path.read_text(encoding="utf-8", errors="replace")
    _, end = _whole_records(text)
    if end != len(text):
        write_text(path, text[:end])
