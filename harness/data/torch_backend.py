"""The plain backend: PIL and numpy, without FFCV. The oracle of the FFCV one, and what runs where that cannot be."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import PIL
from numpy.typing import NDArray

from harness.data.pipeline import Pipeline, undecodable
from harness.data.pixels import UndecodableError, decode, render
from harness.data.processes import LoadingProcesses
from harness.data.storage import CheckedMap

_Batch = tuple[NDArray[Any], NDArray[np.int64]]


class _Images:
    """Whole batches by request; opens the file in the process that reads it."""

    def __init__(self, pipeline: Pipeline) -> None:
        self._pipeline = pipeline
        self._map: CheckedMap | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {"_pipeline": self._pipeline, "_map": None}

    def batch(self, order: NDArray[np.int64], epoch: int, size: int, start: int) -> _Batch:
        """The batch from place `start` of an epoch's order on; see `Backend.batches`."""
        pipeline, index = self._pipeline, self._pipeline.index
        samples = order[start : start + pipeline.batch_size]
        self._map = self._map or CheckedMap(index)
        self._map.check()
        stored = memoryview(self._map.bytes)
        plan = pipeline.plan(samples, epoch, size)
        out = np.empty((len(samples), size, size, 3), pipeline.table.dtype)
        for k, sample in enumerate(samples.tolist()):
            start, height, width = int(index.offsets[sample]), int(index.heights[sample]), int(index.widths[sample])
            payload = stored[start : start + int(index.sizes[sample])]
            try:
                image = decode(payload, int(index.modes[sample]), height, width)
            except UndecodableError:
                raise undecodable(index.path, sample) from None
            image = render(image, plan, k, size=size, fill=pipeline.fill)
            for c in range(3):
                np.take(pipeline.table[c], image[..., c], out=out[k, ..., c])
        return out, index.labels[samples]


class TorchBackend:
    """Batches of one pipeline: made in this process for one thread, else by as many processes, begun when needed."""

    name = f"torch (PIL {PIL.__version__}, numpy {np.__version__})"

    def __init__(self, pipeline: Pipeline) -> None:
        self._pipeline = pipeline
        self._images = _Images(pipeline)
        self._processes: LoadingProcesses | None = None

    def batches(self, epoch: int, order: NDArray[np.int64], size: int) -> Iterator[_Batch]:
        """See `Backend.batches`."""
        pipeline, job = self._pipeline, (order, epoch, size)
        starts = range(0, len(order), pipeline.batch_size)
        if pipeline.threads == 1:
            yield from (self._images.batch(*job, start) for start in starts)
            return
        if self._processes is None or self._processes.closed:
            self._processes = LoadingProcesses(
                self._images.batch, pipeline.threads, what=str(pipeline.index.path), limit_s=pipeline.stall_limit_s
            )
        yield from self._processes.answers(job, starts)

    def close(self) -> None:
        """End the processes."""
        if self._processes is not None:
            self._processes.close()
