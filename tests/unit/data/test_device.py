"""The way to a GPU, on made-up streams that run as late or in as odd an order as their waits allow."""

import random
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from harness.data import device as device_module
from harness.data.device import DeviceFeed, HostBatch
from harness.data.normalise import normalise, plain

SIDE, CAPACITY = 4, 5
CPU = torch.device("cpu")


class Stream:
    def __init__(self, *_: object) -> None:
        self.work: deque[Callable[[], None]] = deque()
        self.given = self.done = 0

    def give(self, work: Callable[[], None]) -> None:
        self.work.append(work)
        self.given += 1

    def run(self, until: int) -> None:
        while self.done < until:
            self.done += 1
            self.work.popleft()()

    def wait_event(self, event: "Event") -> None:
        if event.stream is not None:
            stream, place = event.stream, event.place
            self.give(lambda: stream.run(place))

    def wait_stream(self, other: "Stream") -> None:
        place = other.given
        self.give(lambda: other.run(place))


class Event:
    def __init__(self, *, blocking: bool = False) -> None:
        self.stream: Stream | None = None
        self.place = 0

    def record(self, stream: Stream) -> None:
        self.stream, self.place = stream, stream.given

    def synchronize(self) -> None:
        if self.stream is not None:
            self.stream.run(self.place)


class Cuda(TorchDispatchMode):
    """`torch.cuda`, whose copies are done when their stream gets to them; `seed` decides what runs before it must."""

    Stream, Event = Stream, Event

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.compute = Stream()
        self.streams = [self.compute]
        self.chance = random.Random(seed)
        self.laziness = 1.0 if seed == 0 else self.chance.random()
        self.current = self.compute
        self.lazy = False

    def current_stream(self, _: object = None) -> Stream:
        return self.compute

    @contextmanager
    def stream(self, stream: Stream) -> Iterator[None]:
        if stream not in self.streams:
            self.streams.append(stream)
        self.current, self.lazy = stream, True
        yield
        self.current, self.lazy = self.compute, False

    def give(self, work: Callable[[], None]) -> None:
        self.current.give(work)
        while self.chance.random() > self.laziness:
            stream = self.chance.choice(self.streams)
            stream.run(min(stream.given, stream.done + 1))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self.lazy and func is torch.ops.aten.copy_.default:
            self.give(lambda: self._copy(*args))
            return args[0]
        return func(*args, **(kwargs or {}))

    def _copy(self, target: torch.Tensor, source: torch.Tensor, *_: object) -> None:
        lazy, self.lazy = self.lazy, False
        target.copy_(source)
        self.lazy = lazy


def host(batches: int, last: int) -> Iterator[HostBatch]:
    """Batches in one buffer that is filled again and again; the last one is shorter."""
    images, labels = np.empty((CAPACITY, SIDE, SIDE, 3), np.uint8), np.empty(CAPACITY, np.int64)
    for number in range(batches):
        count = last if number == batches - 1 else CAPACITY
        images[:count], labels[:count] = content(number)[0][:count], content(number)[1][:count]
        yield images[:count], labels[:count]
        images.fill(255)
        labels.fill(-1)


def content(number: int) -> HostBatch:
    rng = np.random.default_rng(number)
    return rng.integers(0, 256, (CAPACITY, SIDE, SIDE, 3), np.uint8), rng.integers(0, 9, CAPACITY)


def table(dtype: torch.dtype = torch.float32) -> torch.Tensor:
    mean, std = np.array([[120.0], [110.0], [100.0]]), np.array([[60.0], [50.0], [70.0]])
    return torch.from_numpy((np.arange(256) - mean) / std).to(dtype)


def seen(monkeypatch: pytest.MonkeyPatch, seed: int, batches: int, stop_after: int | None = None) -> list[Any]:
    """What a reader computes on, whose work runs when its stream gets to it."""
    cuda = Cuda(seed)
    monkeypatch.setattr(device_module, "cuda", cuda)
    monkeypatch.setattr(device_module, "_pinned_like", torch.empty_like)
    monkeypatch.setattr(device_module, "normalise", lambda *given: cuda.give(lambda: normalise(*given)))
    found: list[Any] = []
    with cuda:
        feed = DeviceFeed(table(), CPU).batches(host(batches, last=3))
        for images, labels in feed:
            cuda.give(lambda i=images, n=labels: found.append((i.clone(), n.clone())))
            if len(found) == stop_after:
                break
        feed.close()
        cuda.compute.run(cuda.compute.given)
    return found


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("batches", [1, 2, 7])
def test_no_buffer_is_filled_while_it_is_read(monkeypatch: pytest.MonkeyPatch, batches: int, seed: int):
    found = seen(monkeypatch, seed, batches)
    assert len(found) == batches
    mean, std = torch.tensor([120.0, 110, 100]).view(3, 1, 1), torch.tensor([60.0, 50, 70]).view(3, 1, 1)
    for number, (images, labels) in enumerate(found):
        count = 3 if number == batches - 1 else CAPACITY
        levels, names = (torch.from_numpy(part[:count]) for part in content(number))
        assert labels.tolist() == names.tolist()
        assert torch.allclose(images, (levels.permute(0, 3, 1, 2) - mean) / std, atol=1e-6)


def test_an_epoch_without_batches_or_with_an_early_end(monkeypatch: pytest.MonkeyPatch):
    assert seen(monkeypatch, 0, 0) == []
    assert len(seen(monkeypatch, 3, 7, stop_after=2)) >= 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_byte_becomes_the_rounded_number_of_its_channel(dtype: torch.dtype):
    levels = torch.arange(256, dtype=torch.uint8).view(1, 16, 16, 1).repeat(1, 1, 1, 3)
    out = torch.empty(1, 16, 16, 3, dtype=dtype)
    plain(levels, table(dtype), out)
    exact = (levels.double() - torch.tensor([120.0, 110, 100])) / torch.tensor([60.0, 50, 70])
    assert torch.equal(out, exact.to(dtype))
