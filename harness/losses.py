"""The losses of the last steps, looked at once they are known: a host that asked sooner would wait for the device."""

import math
from collections import deque
from typing import NamedTuple

import torch
from torch import Tensor, cuda

# Steps that the host may be ahead of the device.
_ROOM = 64


class StepLoss(NamedTuple):
    """The loss of one step: `step` counts in the trial, `batch` in the epoch."""

    loss: float
    step: int
    batch: int


class LossWatch:
    """Finds the first loss that is not finite. On a GPU each one travels to pinned memory behind its step."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._travelling: deque[tuple[int, int, int]] = deque()  # slot, step, batch
        self._next = 0
        on_host = device.type == "cpu"
        self._values = torch.zeros(_ROOM) if on_host else torch.zeros(_ROOM, pin_memory=True)
        self._events = [] if on_host else [cuda.Event(blocking=True) for _ in range(_ROOM)]

    def add(self, loss: Tensor, step: int, batch: int) -> StepLoss | None:
        """Take the loss () of a step; the first bad one of those that have come by now."""
        found = self._take(self._travelling.popleft(), wait=True) if len(self._travelling) == _ROOM else None
        slot, self._next = self._next, (self._next + 1) % _ROOM
        self._values[slot].copy_(loss, non_blocking=True)
        if self._events:
            self._events[slot].record(cuda.current_stream(self._device))
        self._travelling.append((slot, step, batch))
        return found or self.bad(wait=False)

    def bad(self, *, wait: bool) -> StepLoss | None:
        """The first loss that is not finite of those that have come, or, after waiting, of all; each is told once."""
        while self._travelling and (wait or self._has_come(self._travelling[0][0])):
            found = self._take(self._travelling.popleft(), wait=wait)
            if found is not None:
                return found
        return None

    def _has_come(self, slot: int) -> bool:
        return not self._events or self._events[slot].query()

    def _take(self, place: tuple[int, int, int], *, wait: bool) -> StepLoss | None:
        slot, step, batch = place
        if wait and self._events:
            self._events[slot].synchronize()
        loss = self._values[slot].item()
        return None if math.isfinite(loss) else StepLoss(loss, step, batch)
