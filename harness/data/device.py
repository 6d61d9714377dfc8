"""The way of a batch to a GPU: copied and normalised on a stream of its own while the step before it computes."""

from collections.abc import Generator, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, cuda

from harness.data.normalise import normalise

HostBatch = tuple[NDArray[Any], NDArray[np.int64]]


@dataclass
class _Place:
    """Room for a batch on the device: `ready` once it is filled, `free` once the step that reads it has ended."""

    images: Tensor
    labels: Tensor
    free: cuda.Event
    ready: cuda.Event


class _Raw(NamedTuple):
    """A batch as bytes: on the device, or in pinned memory of the host."""

    images: Tensor
    labels: Tensor


class DeviceFeed:
    """Turns host batches of bytes into normalised ones on a CUDA device, one batch ahead of its reader.

    table: (3, 256), byte to delivered number. Who waits for whom, batch after batch:

    - the host, before it asks for the next host batch, for the copy of the last one: its memory is filled again;
    - the copy stream, before it writes to one of the two places, for the step that read it two batches ago;
    - the reader's stream, before it reads a place, for what filled it.

    The host waits for nothing younger than the step before the last, so a queue of work always lies before the device;
    nor can it run ahead further than that, so that memory stays at two batches of numbers and one of bytes.
    """

    def __init__(self, table: Tensor, device: torch.device) -> None:
        self._device = device
        self._table = table.to(device)
        self._stream = cuda.Stream(device)

    def batches(self, host: Iterator[HostBatch]) -> Generator[tuple[Tensor, Tensor]]:
        """Yield (images (n, 3, size, size) channels_last, labels (n,)), valid until the next is asked for.

        host: images (n, size, size, 3) uint8 and labels (n,), none longer than the first, each valid until the next is
        asked for. Memory that is not pinned is copied to some that is.
        """
        first = next(host, None)
        if first is None:
            return
        transfer = _Transfer(self._stream, self._device, self._table, first)
        try:
            transfer.begin(first, 0)
            for number, following in enumerate(transfer.rest(host), start=1):
                if following is not None:
                    transfer.begin(following, number)
                yield transfer.ready(number - 1)
                transfer.release(number - 1)
        finally:
            transfer.end()


class _Transfer:
    """One epoch's batches on their way. Its memory is of the reader's stream: when it ends, training can have it."""

    def __init__(self, stream: cuda.Stream, device: torch.device, table: Tensor, first: HostBatch) -> None:
        self._stream, self._device, self._table = stream, device, table
        self._copied = cuda.Event(blocking=True)
        images, labels = map(torch.from_numpy, first)
        self._raw = _Raw(torch.empty_like(images, device=device), torch.empty_like(labels, device=device))
        self._places = [
            _Place(
                torch.empty_like(images, device=device, dtype=table.dtype),
                torch.empty_like(labels, device=device),
                cuda.Event(),
                cuda.Event(),
            )
            for _ in range(2)
        ]
        self._staging: _Raw | None = None
        self._counts = [0, 0]
        # what had this memory before may still be read
        self._stream.wait_stream(cuda.current_stream(device))

    def rest(self, host: Iterator[HostBatch]) -> Iterator[HostBatch | None]:
        """The host's other batches, each asked for once the copy of the one before it is done; then None."""
        more: HostBatch | None
        while True:
            self._copied.synchronize()
            more = next(host, None)
            yield more
            if more is None:
                return

    def begin(self, batch: HostBatch, number: int) -> None:
        """Start the way of batch `number`."""
        place, source = self._places[number % 2], self._pinned(batch)
        count = self._counts[number % 2] = len(source.labels)
        with cuda.stream(self._stream):
            self._raw.images[:count].copy_(source.images, non_blocking=True)
            self._raw.labels[:count].copy_(source.labels, non_blocking=True)
            self._copied.record(self._stream)
            self._stream.wait_event(place.free)
            normalise(self._raw.images[:count], self._table, place.images[:count])
            place.labels[:count].copy_(self._raw.labels[:count])
            place.ready.record(self._stream)

    def ready(self, number: int) -> tuple[Tensor, Tensor]:
        """Batch `number`, for the current stream."""
        place, count = self._places[number % 2], self._counts[number % 2]
        cuda.current_stream(self._device).wait_event(place.ready)
        return place.images[:count].permute(0, 3, 1, 2), place.labels[:count]

    def release(self, number: int) -> None:
        """All that reads batch `number` has been launched on the current stream."""
        self._places[number % 2].free.record(cuda.current_stream(self._device))

    def end(self) -> None:
        """Leave the host's memory to its owner, and the device's to the current stream."""
        self._copied.synchronize()
        cuda.current_stream(self._device).wait_stream(self._stream)

    def _pinned(self, batch: HostBatch) -> _Raw:
        images, labels = map(torch.from_numpy, batch)
        if images.is_pinned() and labels.is_pinned():
            return _Raw(images, labels)
        if self._staging is None:
            self._staging = _Raw(_pinned_like(images), _pinned_like(labels))
        count = len(labels)
        self._staging.images[:count].copy_(images)
        self._staging.labels[:count].copy_(labels)
        return _Raw(self._staging.images[:count], self._staging.labels[:count])


def _pinned_like(tensor: Tensor) -> Tensor:
    return torch.empty_like(tensor, pin_memory=True)
