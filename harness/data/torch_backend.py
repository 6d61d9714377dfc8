"""The plain backend: PIL and numpy under a torch DataLoader. The oracle of the FFCV one, and what runs without FFCV."""

import faulthandler
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
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

    def __getitem__(self, request: _Request) -> tuple[Tensor, Tensor] | UserError:
        """A batch; user errors are handed over as values, since DataLoader buries raised ones in a traceback's text.

        Tensors go through shared memory. Arrays would go through a pipe, and a process that is killed half-way through
        one leaves its reader waiting for the rest.
        """
        limited = self._pipeline.threads > 1  # with one, no process of its own
        if limited:  # ends a process that stands still, with its stack on stderr; `_asked` finds it dead
            faulthandler.dump_traceback_later(self._pipeline.stall_limit_s, exit=True)
        try:
            images, labels = self._batch(*request)
        except UserError as error:
            return error
        finally:
            if limited:
                faulthandler.cancel_dump_traceback_later()
        return torch.from_numpy(images), torch.from_numpy(labels)

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
        self._stall_limit_s = pipeline.stall_limit_s
        several = {} if pipeline.threads == 1 else {
            "num_workers": pipeline.threads, "multiprocessing_context": "spawn", "persistent_workers": True,
        }  # fmt: skip
        self._batches: Iterator[Any] = iter(())  # here and in no frame, where an error's traceback would keep it alive
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
        starts = range(0, len(order), self._batch_size)
        self._requests[:] = [(order[start : start + self._batch_size], epoch, size) for start in starts]
        self._batches = self._asked(self._begin)
        while (batch := self._asked(lambda: next(self._batches, None))) is not None:
            if isinstance(batch, UserError):
                raise batch
            images, labels = batch
            yield images.numpy(), labels.numpy()

    def _begin(self) -> Iterator[Any]:
        """DataLoader's iterator, begun anew, with its processes started.

        Aside, since in the main thread DataLoader would set a SIGCHLD handler for the whole program, one that raises
        wherever that thread happens to be when a process dies: within a training step, say. Without it, it looks
        every 5 s.
        """
        assert self._loader is not None, "the loader is closed"
        with ThreadPoolExecutor(1) as aside:
            return aside.submit(self._loader.__iter__).result()

    def _asked(self, ask: Callable[[], Any]) -> Any:
        """What DataLoader answers; `UserError` if a process died or stood still for `stall_limit_s`."""
        try:
            return ask()
        except (ConnectionError, EOFError, RuntimeError) as error:
            if isinstance(error, RuntimeError) and not str(error).startswith("DataLoader worker"):
                raise
            what = repr(error)
        raise UserError(  # not in the handler: the traceback of DataLoader's error would keep its processes alive
            f"a loading process of {self._path} died ({what}): it was killed, for want of memory perhaps (lower "
            f"data.workers), or made no batch for {self._stall_limit_s:g} s (then its stack is on stderr)"
        )

    def close(self) -> None:
        """End the processes."""
        self._loader, self._batches = None, iter(())


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
