"""The plain backend: PIL and numpy under a torch DataLoader. The oracle of the FFCV one, and what runs without FFCV."""

import mmap
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset

from harness.data.pipeline import Pipeline, undecodable
from harness.data.pixels import UndecodableError, decode, render
from harness.errors import UserError

# One batch as it is asked for: samples, epoch, side of the output.
_Request = tuple[NDArray[np.int64], int, int]


class _Images(Dataset[Any]):
    """Whole batches by request; opens the file in the process that reads it."""

    def __init__(self, pipeline: Pipeline) -> None:
        self._pipeline = pipeline
        self._bytes: memoryview | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {"_pipeline": self._pipeline, "_bytes": None}

    def __getitem__(self, request: _Request) -> tuple[NDArray[Any], NDArray[np.int64]] | UserError:
        """A batch; user errors are handed over as values, since DataLoader buries raised ones in a traceback's text."""
        try:
            return self._batch(*request)
        except UserError as error:
            return error

    def _batch(self, samples: NDArray[np.int64], epoch: int, size: int) -> tuple[NDArray[Any], NDArray[np.int64]]:
        pipeline, index = self._pipeline, self._pipeline.index
        if self._bytes is None:
            with index.path.open("rb") as file:
                self._bytes = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
        plan = pipeline.plan(samples, epoch, size)
        out = np.empty((len(samples), size, size, 3), pipeline.table.dtype)
        for k, sample in enumerate(samples.tolist()):
            start, height, width = int(index.offsets[sample]), int(index.heights[sample]), int(index.widths[sample])
            payload = self._bytes[start : start + int(index.sizes[sample])]
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
        self._batch_size = pipeline.batch_size
        several = {} if pipeline.threads == 1 else {
            "num_workers": pipeline.threads, "multiprocessing_context": "spawn", "persistent_workers": True,
        }  # fmt: skip
        self._loader: DataLoader[Any] | None = DataLoader(
            _Images(pipeline),
            batch_size=None,
            sampler=_Live(self._requests),
            collate_fn=_as_is,
            **several,  # type: ignore[arg-type]
        )

    def batches(
        self, epoch: int, order: NDArray[np.int64], size: int
    ) -> Iterator[tuple[NDArray[Any], NDArray[np.int64]]]:
        """See `Backend.batches`."""
        assert self._loader is not None, "the loader is closed"
        starts = range(0, len(order), self._batch_size)
        self._requests[:] = [(order[start : start + self._batch_size], epoch, size) for start in starts]
        for batch in self._loader:
            if isinstance(batch, UserError):
                raise batch
            yield batch

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
