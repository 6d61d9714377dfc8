"""When a loss is looked at, on a made-up device that says of each step whether it is done."""

import math

import pytest
import torch

from harness import losses
from harness.losses import LossWatch, StepLoss

CPU, GPU = torch.device("cpu"), torch.device("cuda")


class Event:
    """Done when the test says so; counts who waited."""

    waited = 0

    def __init__(self, *, blocking: bool = False) -> None:
        self.done = True

    def record(self, stream: object) -> None:
        self.done = False

    def query(self) -> bool:
        return self.done

    def synchronize(self) -> None:
        Event.waited += not self.done
        self.done = True


@pytest.fixture
def watch(monkeypatch: pytest.MonkeyPatch) -> LossWatch:
    """A watch for a GPU; `zeros` without pinned memory, which only a GPU's driver has."""
    monkeypatch.setattr(losses.cuda, "Event", Event)
    monkeypatch.setattr(losses.cuda, "current_stream", lambda device: None)
    zeros = torch.zeros
    monkeypatch.setattr(losses.torch, "zeros", lambda count, pin_memory: zeros(count))
    Event.waited = 0
    return LossWatch(GPU)


def test_on_the_cpu_a_bad_loss_is_told_at_once_and_once():
    watch = LossWatch(CPU)
    assert watch.add(torch.tensor(1.0), 0, 0) is None
    found = watch.add(torch.tensor(-math.inf), 1, 1)
    assert found == StepLoss(-math.inf, 1, 1)
    assert watch.bad(wait=True) is None


def test_steps_that_are_not_done_are_not_waited_for(watch: LossWatch):
    assert watch.add(torch.tensor(1.0), 10, 0) is None
    assert watch.add(torch.tensor(math.nan), 11, 1) is None
    assert watch.add(torch.tensor(2.0), 12, 2) is None
    assert Event.waited == 0
    watch._events[1].done = True  # though it is, the one before it is not: steps end in their order
    assert watch.bad(wait=False) is None
    watch._events[0].done = True
    found = watch.bad(wait=False)
    assert found is not None
    assert math.isnan(found.loss)
    assert found[1:] == (11, 1)
    assert Event.waited == 0


def test_a_checkpoint_waits_for_all(watch: LossWatch):
    for step, loss in enumerate([1.0, 2.0, math.inf, 3.0]):
        watch.add(torch.tensor(loss), step, step)
    assert watch.bad(wait=True) == StepLoss(math.inf, 2, 2)
    assert watch.bad(wait=True) is None
    assert Event.waited == 4


def test_the_host_may_be_only_so_far_ahead(watch: LossWatch):
    for step in range(losses._ROOM + 3):
        watch.add(torch.tensor(math.nan if step == 1 else 0.0), step, step)
        assert Event.waited == max(0, step + 1 - losses._ROOM)
    assert watch.add(torch.tensor(0.0), 99, 9) is None, "the bad one was told when its place was needed"
