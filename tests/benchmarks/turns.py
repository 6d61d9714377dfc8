"""Two training runs that take turns, so that their steps are timed side by side: the loader decides who may go on.

The loop is the real one and does not know. Its loader, on rank 0, waits before every turn until the turn is its run's;
the other ranks wait in the collective of the step, as for any slow peer. `python -m tests.benchmarks.turns SPEC` runs
one under torchrun.
"""

import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from harness.config import TrialSpec
from harness.context import Data
from harness.errors import Preempted

STEPS_PER_TURN = 12


def turn_file(folder: Path) -> Path:
    """Holds "NAME NUMBER": whose turn it is, and a number that rises."""
    return folder / "turn"


def result_file(folder: Path, name: str, number: int) -> Path:
    """Holds the seconds of a turn."""
    return folder / f"{name}-{number}"


class TurnLoader:
    """Made-up images of one size, endlessly; waits for the turn of its run and writes how long each took."""

    stack, order, memory, waited_s = "turns", "turns", "turns", 0.0
    num_classes = None

    def __init__(self, data: Any, split: str, *, batch_size: int, rank: int, **_: Any) -> None:
        self._folder = Path(data.dir)
        self._name = data.source
        self._main = rank == 0 and split == "train"
        self._size, self._batch_size = data.image_size, batch_size
        self.num_samples = batch_size

    def __len__(self) -> int:
        return 1_000_000

    def epoch(self, epoch: int, skip: int = 0) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """The same batch again and again."""
        images = torch.randn(self._batch_size, 3, self._size, self._size).to(memory_format=torch.channels_last)
        labels = torch.arange(self._batch_size) % 10
        seen = 0
        while True:
            if self._main:
                seen = self._wait_for_turn(seen)
            begin = time.perf_counter()
            for _ in range(STEPS_PER_TURN):
                yield images, labels
            if self._main:
                result_file(self._folder, self._name, seen).write_text(str(time.perf_counter() - begin))

    def indices(self, epoch: int, batch: int) -> Sequence[int]:
        """The images of a batch."""
        return range(self._batch_size)

    def close(self) -> None:
        """Nothing is open."""

    def _wait_for_turn(self, seen: int) -> int:
        deadline = time.monotonic() + 300
        while time.monotonic() < deadline:
            text = turn_file(self._folder).read_text() if turn_file(self._folder).exists() else ""
            name, _, number = text.partition(" ")
            if name == self._name and number.isdigit() and int(number) > seen:
                return int(number)
            time.sleep(0.001)
        raise TimeoutError("nobody gave this run a turn for 300 s")


DATA = Data(open=TurnLoader, checksum=lambda _: "turns")


def work(spec: TrialSpec, launcher: str | None = None) -> None:
    """Train until asked to leave."""
    from harness.stages import run

    try:
        run(spec, launcher=launcher, data=DATA)
    except Preempted:
        return


def ray_work(config: dict[str, Any]) -> None:
    """`work` as a Ray Train worker."""
    work(TrialSpec.model_validate(config["spec"]), "ray.train")


if __name__ == "__main__":
    work(TrialSpec.model_validate_json(Path(sys.argv[1]).read_text()))
