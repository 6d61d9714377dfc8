"""The plain backend: PIL and numpy under a torch DataLoader. The oracle of the FFCV one, and what runs without FFCV."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset

from harness.data.pipeline import Pipeline, undecodable
from harness.data.pixels import UndecodableError, decode, render
from harness.data.storage import CheckedMap
from harness.errors import UserError

# One batch as it is asked for: samples, epoch, side of the output.
_Request = tuple[NDArray[np.int64], int, int]


class _Images(Dataset[Any]):
    """Whole batches by request; opens the file in the process that reads it."""

    def __init__(self, pipeline: Pipeline) -> None:
        self._pipeline = pipeline
        self._map: CheckedMap | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {"_pipeline": self._pipeline, "_map": None}

    def __getitem__(self, request: _Request) -> tuple[NDArray[Any], NDArray[np.int64]] | UserError:
        """A batch; user errors are handed over as values, since DataLoader buries raised ones in a traceback's text."""
        try:
            return self._batch(*request)
        except UserError as error:
            return error

    def _batch(self, samples: NDArray[np.int64], epoch: int, size: int) -> tuple[NDArray[Any], NDArray[np.int64]]:
        pipeline, index = self._pipeline, self._pipeline.index
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
    """A torch DataLoader over one pipeline: in this process for one thread, else with as many processes."""

    name = f"torch {torch.__version__} + PIL"

    def __init__(self, pipeline: Pipeline) -> None:
        self._requests: list[_Request] = []
        self._batch_size, self._path = pipeline.batch_size, pipeline.index.path
        several = {} if pipeline.threads == 1 else {
            "num_workers": pipeline.threads, "multiprocessing_context": "spawn", "persistent_workers": True,
        }  # fmt: skip
        self._loader: DataLoader[Any] | None = DataLoader(
            _Images(pipeline),
            batch_size=None,
            sampler=_Live(self._requests),
            collate_fn=_as_is,
            timeout=0 if pipeline.threads == 1 else pipeline.stall_limit_s,
            **several,  # type: ignore[arg-type]
        )

    def batches(
        self, epoch: int, order: NDArray[np.int64], size: int
    ) -> Iterator[tuple[NDArray[Any], NDArray[np.int64]]]:
        """See `Backend.batches`."""
        assert self._loader is not None, "the loader is closed"
        starts = range(0, len(order), self._batch_size)
        self._requests[:] = [(order[start : start + self._batch_size], epoch, size) for start in starts]
        batches = iter(self._loader)
        while (batch := self._next(batches)) is not None:
            if isinstance(batch, UserError):
                raise batch
            yield batch

    def _next(self, batches: Iterator[Any]) -> Any:
        """The next batch, None at the end."""
        try:
            return next(batches, None)
        except RuntimeError as error:
            if not str(error).startswith("DataLoader "):  # its own words on a process that died or stands still
                raise
            raise UserError(f"a loading process of {self._path} died or stands still: {error}") from None

    def close(self) -> None:
        """End the processes."""
        self._loader = None


class _Live:
    """A sampler over a list that changes between epochs."""

    def __init__(self, requests: list[_Request]) -> None:
        self._requests = requests

    def __iter__(self) -> Iterator[_Request]:
        return iter(list(self._requests))

    def __len__(self) -> int:
        return len(self._requests)


def _as_is(batch: Any) -> Any:
    return batch
