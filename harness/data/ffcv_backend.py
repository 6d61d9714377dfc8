"""The FFCV backend, the only module that imports ffcv: its file reader, its loader thread with its ring of buffers, its
operations and its C decoder, without the parts that hang or mislead (`docs/data.md` lists them).

What is ours: one decode operation that does everything (see `kernel`), the order, the plan of augmentations, the way
to the bytes (see `storage`), checks of the decoder's status, and a thread whose errors reach the caller.
"""

import ctypes
import queue
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from importlib.metadata import version
from typing import Any

import numba
import numpy as np
from numpy.typing import NDArray

from harness.data.beton import Index
from harness.data.kernel import render
from harness.data.pipeline import Pipeline, undecodable
from harness.data.storage import Mapped, Storage, Streamed
from harness.errors import UserError


@contextmanager
def _jit_off() -> Iterator[None]:
    """FFCV compiles typed dictionaries when it is imported (3 s) that plain ones replace."""
    before, numba.config.DISABLE_JIT = numba.config.DISABLE_JIT, True
    try:
        yield
    finally:
        numba.config.DISABLE_JIT = before


try:
    with _jit_off():
        from ffcv.libffcv import ctypes_imdecode
        from ffcv.loader.epoch_iterator import EpochIterator
        from ffcv.loader.loader import Loader
        from ffcv.pipeline.allocation_query import AllocationQuery
        from ffcv.pipeline.graph import Graph
        from ffcv.pipeline.operation import Operation
        from ffcv.pipeline.pipeline_spec import PipelineSpec
        from ffcv.reader import Reader
except ImportError as error:
    raise UserError(
        f"FFCV cannot be loaded here ({error}). Build it with `make setup`, or set data.backend = 'torch'."
    ) from None

# Address of FFCV's C decoder, for `kernel.render`.
IMDECODE = ctypes.cast(ctypes_imdecode, ctypes.c_void_p).value
# With FFCV's two spare slots: how many batches lie in memory at a time.
BATCHES_AHEAD = 2


class FFCVBackend(Loader):
    """An FFCV loader over one pipeline."""

    name = f"ffcv {version('ffcv')}"

    def __init__(self, pipeline: Pipeline) -> None:
        # FFCV's own constructor is left out: it compiles, builds dictionaries over all samples (0.5 KB each) and sets
        # torch's number of threads.
        self.pipeline = pipeline
        self.fname = str(pipeline.index.path)
        self.batch_size = pipeline.batch_size
        self.batches_ahead = BATCHES_AHEAD
        self.num_workers = pipeline.threads
        self.traversal_order = None
        self.reader = Reader(self.fname)
        self.memory_manager = Streamed(pipeline.index) if pipeline.memory == "stream" else Mapped(pipeline.index)
        self._decode = _Decode(pipeline)
        specs = {"image": PipelineSpec("image", self._decode), "label": PipelineSpec("label", _Label(pipeline.index))}
        self.graph = Graph(specs, self.reader.handlers, {"image": 0, "label": 1}, self.reader.metadata, None)
        self.code = _code(self.graph)
        self._active: _Epoch | None = None
        self._stuck = False

    def batches(self, epoch: int, order: NDArray[np.int64], size: int) -> Iterator[tuple[Any, NDArray[np.int64]]]:
        """See `Backend.batches`."""
        self._end_epoch()
        if self._stuck:
            raise UserError(f"the loader of {self.fname} stood still before: open it anew")
        self._decode.epoch, self._decode.size = epoch, size
        active = self._active = _Epoch(self, order)
        try:
            while (batch := active.take()) is not None:
                yield batch
        finally:
            if self._active is active:
                self._end_epoch()

    def close(self) -> None:
        """End the loader's threads."""
        self._end_epoch()
        self._decode.close()

    def _end_epoch(self) -> None:
        active, self._active = self._active, None
        if active is not None:
            self._stuck = active.stuck
            active.close()
            if not active.stuck:
                active.join()


def _code(graph: Graph) -> tuple[list[Any], list[int]]:
    """What FFCV's thread runs on each batch, in the form that it expects: stages, and the results to return."""
    leaves = [graph.leaf_nodes["image"], graph.leaf_nodes["label"]]
    ids = [leaf.id for leaf in leaves]

    def stage(batch_indices: NDArray[np.int64], storage_state: Any, **memory: Any) -> tuple[Any, ...]:
        return tuple(leaf.decoder.run(batch_indices, memory[f"memory_{leaf.id}"], storage_state) for leaf in leaves)

    return [(stage, ids)], ids


class _Epoch(EpochIterator):
    """FFCV's producer thread; what goes wrong in it is raised by `take`."""

    stuck = False

    def run(self) -> None:
        try:
            for number, samples in enumerate(self.iter_ixes):
                slot = number % (self.loader.batches_ahead + 2)
                if not self._put(self.run_pipeline(number, samples, slot, None)):
                    return
            self._put(None)
        except BaseException as error:  # noqa: BLE001 - raised again in the caller's thread
            self._put(error)

    def _put(self, item: Any) -> bool:
        """Wait for room; False if nobody wants more."""
        while not self.terminate_event.is_set():
            try:
                self.output_queue.put(item, timeout=0.2)
                return True
            except queue.Full:
                continue
        return False

    def take(self) -> Any:
        """The next batch, None at the end; raises the thread's error, or `UserError` if it stands still."""
        limit_s = self.loader.pipeline.stall_limit_s
        deadline = time.monotonic() + limit_s
        while True:
            alive = self.is_alive()  # asked before the queue, so that a thread's last words are heard
            try:
                item = self.output_queue.get(timeout=min(1.0, limit_s) if alive else 0.0)
            except queue.Empty:
                if alive and time.monotonic() < deadline:
                    continue
                self.stuck = alive
                state = f"made no batch for {limit_s:.0f} s" if alive else "ended without a word"
                raise UserError(f"the loader's thread {state} while it read {self.loader.fname}") from None
            if isinstance(item, BaseException):
                raise item
            return item


class _Decode(Operation):
    """FFCV operation: the images of a batch, ready for the network; `epoch` and `size` are set before each epoch."""

    def __init__(self, pipeline: Pipeline) -> None:
        super().__init__()
        self.pipeline = pipeline
        self.epoch = self.size = 0
        index = pipeline.index
        columns = (index.offsets, index.sizes, index.modes, index.heights, index.widths)
        self._records = np.stack(columns, axis=1).astype(np.int64)
        self._image_bytes = max(
            int((index.heights.astype(np.int64) * index.widths).max()) * 3, int(index.sizes.max()) + 2
        )
        self._threads = ThreadPoolExecutor(pipeline.threads, "decode") if pipeline.threads > 1 else None
        self._scratch = np.empty((pipeline.threads, 3, 0), np.uint8)

    def declare_state_and_memory(self, previous_state: Any) -> tuple[Any, AllocationQuery]:
        shape, dtype = (self.size, self.size, 3), self.pipeline.table.dtype
        return replace(previous_state, jit_mode=True, shape=shape, dtype=dtype), AllocationQuery(shape, dtype)

    def generate_code(self) -> Any:
        return self.run

    def run(self, samples: NDArray[np.int64], out: Any, storage: Storage) -> Any:
        pipeline, count = self.pipeline, len(samples)
        plan = pipeline.plan(samples, self.epoch, self.size)
        records = self._records[samples]
        records[:, 0] = storage.addresses(records[:, 0])
        status = np.zeros(count, np.int64)
        colours = np.zeros((0, 3), np.float32) if plan.colours is None else plan.colours
        room = max(self._image_bytes, 3 * self.size * self.size)
        if self._scratch.shape[2] < room:
            self._scratch = np.empty((pipeline.threads, 3, room), np.uint8)

        def part(thread: int) -> None:
            first, last = thread * count // pipeline.threads, (thread + 1) * count // pipeline.threads
            render(
                IMDECODE, records, plan.boxes, plan.flips, colours, plan.holes,
                pipeline.fill, pipeline.table, self._scratch[thread], status, out, first, last,
            )  # fmt: skip

        list((map if self._threads is None else self._threads.map)(part, range(pipeline.threads)))
        if status.any():
            raise undecodable(pipeline.index.path, int(samples[np.flatnonzero(status)[0]]))
        return out

    def close(self) -> None:
        if self._threads is not None:
            self._threads.shutdown(cancel_futures=True)


class _Label(Operation):
    """FFCV operation: the labels of a batch."""

    def __init__(self, index: Index) -> None:
        super().__init__()
        self._labels = index.labels

    def declare_state_and_memory(self, previous_state: Any) -> tuple[Any, AllocationQuery]:
        dtype = np.dtype(np.int64)
        return replace(previous_state, jit_mode=True, shape=(), dtype=dtype), AllocationQuery((), dtype)

    def generate_code(self) -> Any:
        return self.run

    def run(self, samples: NDArray[np.int64], out: Any, _storage: Any) -> Any:
        np.take(self._labels, samples, out=out)
        return out
