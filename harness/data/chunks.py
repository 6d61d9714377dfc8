"""Encoding in chunks of samples, each carried out by one process and kept when the run is killed afterwards."""

import json
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from harness.data.beton import sample_digest
from harness.data.encode import BadImageError, WriteSettings, encode
from harness.data.processes import leave_with_program
from harness.data.sources import Ref, Source
from harness.errors import UserError

# What the parent needs to know of one stored sample. `digest` covers label, mode, sides and bytes; `total` and
# `square` are means over (some) pixels of each channel and of its square.
ROW = np.dtype(
    [
        ("position", "<i8"), ("label", "<i8"), ("mode", "<u1"), ("height", "<u2"), ("width", "<u2"), ("offset", "<u8"),
        ("size", "<u8"), ("digest", "<u1", 16), ("total", "<f8", 3), ("square", "<f8", 3),
    ]
)  # fmt: skip
_STATISTICS_SIDE = 32


@dataclass(frozen=True)
class Chunk:
    """A run of samples: number, position of the first in the split, references, labels."""

    number: int
    first: int
    refs: Sequence[Ref]
    labels: NDArray[np.int64]


@dataclass(frozen=True)
class ChunkJob:
    """All that a writing process needs besides the chunk."""

    source: Source
    settings: WriteSettings
    file: Path
    folder: Path
    pages_start: int


class Counter(Protocol):
    """The next free page, shared by all writers."""

    value: int

    def get_lock(self) -> Any:
        """A context that holds it."""


def chunk_path(folder: Path, number: int) -> Path:
    """The record that says that a chunk is finished."""
    return folder / f"chunk-{number:06d}.npz"


class ChunkWriter:
    """Encodes chunks into pages of the file; one instance per process."""

    def __init__(self, job: ChunkJob, next_page: Counter) -> None:
        self._job, self._next_page = job, next_page
        self._page = bytearray(job.settings.page_bytes)
        self._used = 0
        self._page_start = -1

    def write(self, chunk: Chunk) -> int:
        """Store a chunk; returns the number of samples done with. Raises OSError (full disk)."""
        rows: list[tuple[Any, ...]] = []
        problems: list[str] = []
        changes: dict[str, int] = {}
        with self._job.file.open("r+b", buffering=0) as file:
            self._page_start = -1
            for i, (ref, label) in enumerate(zip(chunk.refs, chunk.labels.tolist(), strict=True)):
                try:
                    image = encode(self._read(ref), self._job.settings, chunk.first + i)
                except BadImageError as error:
                    problems.append(f"{self._job.source.describe(ref)} {error}")
                    continue
                if image.change:
                    changes[image.change] = changes.get(image.change, 0) + 1
                offset = self._place(file, image.payload)
                digest = sample_digest(label, image.mode, image.height, image.width, image.payload)
                rows.append(
                    (
                        chunk.first + i, label, image.mode, image.height, image.width, offset, len(image.payload),
                        np.frombuffer(digest, np.uint8), *_statistics(image.pixels),
                    )
                )  # fmt: skip
            self._flush(file)
            os.fsync(file.fileno())
        notes = json.dumps({"problems": problems, "changes": changes})
        path = chunk_path(self._job.folder, chunk.number)
        partial = path.with_suffix(".partial")
        with partial.open("wb") as record:
            np.savez(record, rows=np.array(rows, ROW), notes=np.array(notes))
            record.flush()
            os.fsync(record.fileno())
        partial.rename(path)
        return len(chunk.refs)

    def _read(self, ref: Ref) -> bytes | NDArray[np.uint8]:
        try:
            return self._job.source.read(ref)
        except OSError as error:
            raise BadImageError(f"cannot be read: {error.strerror or error}") from None

    def _place(self, file: Any, payload: bytes) -> int:
        """Put an image into the current page, or the next free one; returns its offset in the file."""
        if self._page_start < 0 or self._used + len(payload) > len(self._page):
            self._flush(file)
            with self._next_page.get_lock():
                page, self._next_page.value = self._next_page.value, self._next_page.value + 1
            self._page_start, self._used = self._job.pages_start + page * len(self._page), 0
        offset = self._page_start + self._used
        self._page[self._used : self._used + len(payload)] = payload
        self._used += len(payload)
        return offset

    def _flush(self, file: Any) -> None:
        if self._page_start < 0:
            return
        self._page[self._used :] = bytes(len(self._page) - self._used)
        file.seek(self._page_start)
        rest = memoryview(self._page)
        while rest:
            rest = rest[file.write(rest) :]
        self._page_start = -1


def _statistics(pixels: NDArray[np.uint8]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    step = max(1, min(pixels.shape[:2]) // _STATISTICS_SIDE)
    some = pixels[::step, ::step].astype(np.float64)
    return some.mean(axis=(0, 1)), (some**2).mean(axis=(0, 1))


class _LocalCounter:
    """A `Counter` for one process."""

    def __init__(self, value: int) -> None:
        self.value = value

    def get_lock(self) -> Any:
        return threading.Lock()


def run_chunks(
    job: ChunkJob,
    chunks: Iterable[Chunk],
    *,
    first_page: int,
    workers: int,
    limit_s: float,
    done: Callable[[int], None],
) -> None:
    """Write chunks with `workers` processes, or in this one if 0; `done` hears the samples of each finished chunk.

    Raises OSError (full disk), or `UserError` where a process dies or none finishes a chunk within `limit_s` seconds.
    """
    if workers == 0:
        writer = ChunkWriter(job, _LocalCounter(first_page))
        for chunk in chunks:
            done(writer.write(chunk))
        return
    context = multiprocessing.get_context("spawn")
    before = set(multiprocessing.active_children())
    pool = ProcessPoolExecutor(workers, context, _start_worker, (job, context.Value("q", first_page)))
    try:
        _feed(pool, iter(chunks), ahead=2 * workers, limit_s=limit_s, source=job.source, done=done)
    except BrokenProcessPool:
        raise UserError(
            "a writing process died (killed, or out of memory); what was finished is kept: run the same command again, "
            "perhaps with fewer --workers"
        ) from None
    finally:
        for child in set(multiprocessing.active_children()) - before:
            child.kill()
        pool.shutdown(cancel_futures=True)


def _feed(
    pool: ProcessPoolExecutor, chunks: Any, *, ahead: int, limit_s: float, source: Source, done: Callable[[int], None]
) -> None:
    """Keep `ahead` chunks in the pool until all are done."""
    pending: dict[Future[int], Chunk] = {}
    while True:
        while len(pending) < ahead and (chunk := next(chunks, None)) is not None:
            pending[pool.submit(_write_chunk, chunk)] = chunk
        if not pending:
            return
        finished, _ = wait(pending, limit_s, FIRST_COMPLETED)
        if not finished:
            oldest = next(iter(pending.values()))
            raise UserError(
                f"no progress for {limit_s:.0f} s while writing images from {source.describe(oldest.refs[0])} on: "
                "does the storage still answer? What was finished is kept: run the same command again"
            )
        for future in finished:
            del pending[future]
            done(future.result())


_writer: ChunkWriter


def _start_worker(job: ChunkJob, next_page: Counter) -> None:
    global _writer
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # A pool's processes outlive a killed program, since each holds the queue's writing end.
    threading.Thread(target=leave_with_program, daemon=True).start()
    _writer = ChunkWriter(job, next_page)


def _write_chunk(chunk: Chunk) -> int:
    return _writer.write(chunk)
