"""What a stage needs from the trial around it: its folder, peers and data, and whether it was asked to leave."""

import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, Literal, NoReturn

import torch
from torch import nn

from harness.arithmetic import autocast
from harness.checkpoint import CheckpointFolder, State, remove_torn
from harness.config import Recipe, TrialSpec
from harness.data import data_checksum
from harness.data.loader import Loader, open_data
from harness.errors import Preempted, UserError
from harness.metrics import Scores, evaluate
from harness.ranks import Ranks
from harness.remote import RemoteCopy
from harness.run_dir import MetricsLog, RecordKind, RunDir
from harness.settings import LEAVE_SIGNALS
from harness.watch import Watchdog

Report = Callable[[dict[str, Any]], None]
_STOP_FILE_INTERVAL_S = 0.5
_PROGRESS_INTERVAL_S = 1.0
# How long the end of a run waits for its remote copy; whoever is asked to leave has 20 s for everything.
_COPY_LIMIT_S, _LEAVING_COPY_LIMIT_S = 600.0, 8.0


@dataclass(frozen=True)
class Data:
    """Where images come from: `harness.data`, or made-up ones in a dry run, of which no figure is worth a remark."""

    open: Callable[..., Any] = open_data
    checksum: Callable[[str], str] = data_checksum
    made_up: bool = False


REAL_DATA = Data()


class LeaveRequest:
    """Whether this process was asked to leave: by a signal to it, or by the stop file of its run (seen by rank 0)."""

    def __init__(self, run: RunDir, watch_file: bool) -> None:
        self._run = run
        self._watch_file = watch_file
        self._asked = False
        self._next_look = 0.0

    def asked(self) -> bool:
        """True from the first request on; looks at the file at most twice a second."""
        if not self._asked and self._watch_file and time.monotonic() >= self._next_look:
            self._next_look = time.monotonic() + _STOP_FILE_INTERVAL_S
            if self._run.stop_requested():  # no plain assignment: a signal may come during the look
                self._asked = True
        return self._asked

    @contextmanager
    def signals(self) -> Iterator[None]:
        """Count SIGTERM and SIGUSR2 as requests while inside; off the main thread (Ray) there are none to catch."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        old = {number: signal.signal(number, self._note) for number in LEAVE_SIGNALS}
        try:
            yield
        finally:
            for number, handler in old.items():
                signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:  # noqa: ARG002 - a signal handler's signature
        self._asked = True


class Context:
    """One process of one trial. Rank 0 alone has `log` and `checkpoints`; all ranks call the same methods in step."""

    def __init__(self, spec: TrialSpec, ranks: Ranks, report: Report | None = None, data: Data = REAL_DATA) -> None:
        self.spec = spec
        self.data = data
        self.recipe: Recipe = spec.recipe
        self.ranks = ranks
        self.run = RunDir(spec.run_dir)
        self.leave = LeaveRequest(self.run, watch_file=ranks.main)
        self.report = report or _keep_quiet
        self._remote: RemoteCopy | None = None
        if ranks.main and self.recipe.run.remote is not None:
            self._remote = RemoteCopy(self.run, self.recipe.run.remote)
            self._remote.fetch()
        if ranks.main:
            remove_torn(self.run.checkpoints, self.run.stages)
        self.log = MetricsLog(self.run.create()) if ranks.main else None
        self.checkpoints = (
            CheckpointFolder(self.run.checkpoints, self.recipe.run.keep_checkpoints) if ranks.main else None
        )
        self.stage = ""
        self.total_steps = 0
        self.last_checkpoint: Path | None = None
        self._loaders: dict[tuple[str, int], Loader] = {}
        self._progress_due_s = 0.0
        self._leaving = False
        self._watchdog = Watchdog(self.run, ranks.rank, ranks.world, self.recipe.run.stall_limit_s)

    def enter(self, stage: str) -> None:
        """Records from here on belong to `stage`."""
        self.stage = stage
        self.beat("at its start")

    def beat(self, place: str) -> None:
        """Tell the watchdog that this rank is alive and where in the stage it is."""
        self._watchdog.beat(f"{self.stage} {place}")

    def record(
        self, kind: RecordKind, epoch: int, step: int, metrics: Mapping[str, Any] | None = None, **extra: Any
    ) -> int:
        """Append a record of the current stage on rank 0; its `seq` (0 elsewhere)."""
        return 0 if self.log is None else self.log.append(kind, self.stage, epoch, step, metrics or {}, **extra)

    def progress(self, epoch: int, epochs: int, step: int, images_per_s: float, *, now: bool = False) -> None:
        """Rewrite progress.json on rank 0, at most once a second unless `now`."""
        if not self.ranks.main or (not now and time.monotonic() < self._progress_due_s):
            return
        self._progress_due_s = time.monotonic() + _PROGRESS_INTERVAL_S
        self.run.write_progress(
            {
                "time": time.time(),
                "stage": self.stage,
                "epoch": epoch,
                "epochs": epochs,
                "step": step,
                "total_steps": self.total_steps,
                "samples_per_s": images_per_s,
            }
        )

    def write_checkpoint(self, step: int, key: str, epoch: int, state: State) -> None:
        """Write the state of the current stage in the background of rank 0, then record what it covers."""
        if self.log is None or self.checkpoints is None:
            return
        log, stage, covers = self.log, self.stage, self.log.last_seq
        path = self.checkpoints.path(stage, step)

        def done() -> None:
            log.append("checkpoint", stage, epoch, step, {}, covers=covers)
            self.last_checkpoint = path
            self.send()

        self.checkpoints.write(stage, step, key, state | {"seq": covers}, done, before=log.sync)

    def send(self) -> None:
        """Begin to bring the remote copy up to date, where the recipe wants one (rank 0)."""
        if self._remote is not None:
            self._remote.send()

    def write_best(self, key: str, state: State) -> None:
        """Write the best weights of the current stage so far in the background of rank 0, to best-<stage>.pt."""
        if self.checkpoints is not None:
            self.checkpoints.write_best(self.stage, key, state)

    def newest_checkpoint(self, key: str, covers: int, step: int) -> State | None:
        """State of the newest sound checkpoint of the current stage on every rank, or None.

        Drops the records beyond it; without one, those beyond `covers`, the last of the stages before (after `step`).
        """
        state = None
        if self.checkpoints is not None:
            found = self.checkpoints.newest(self.stage, key)
            if found is not None:
                state, self.last_checkpoint = found
        state = self.ranks.share(state)
        if state is None:
            self.rewind(covers, 0, step)
        else:
            self.rewind(state["seq"], state["epoch"], state["global_step"])
        return state

    def rewind(self, covers: int, epoch: int, step: int) -> None:
        """Drop the records after `covers`, left by an earlier start, and record that those up to there are durable."""
        if self.log is None:
            return
        records = self.run.metrics()
        if covers and not (records and records[-1].get("covers") == covers):
            self.log.truncate(covers)
            self.record("checkpoint", epoch, step, covers=covers)
        elif not covers:
            self.log.truncate(0)

    def evaluate(self, net: nn.Module, before_leaving: Callable[[], None] | None = None) -> Scores:
        """Exact scores over the validation set. Looks at requests to leave at each batch, for it can take long.

        Raises `Preempted`, after `before_leaving()`, when asked to leave.
        """
        self.ranks.average_norms(net)
        with autocast(self.recipe.run, self.ranks.device):
            return evaluate(net, self._val_batches(before_leaving), self.ranks, flip_tta=self.recipe.run.flip_tta)

    def depart(self) -> NoReturn:
        """Leave in order, all ranks together; what must be kept is on its way to the disk."""
        self._leaving = True
        self.flush()
        raise Preempted(
            f"left {self.spec.label} during {self.stage} as asked, with its state in {self.run.path}; "
            "run the same command again to go on"
        )

    def flush(self) -> None:
        """Wait until rank 0 has written every checkpoint; all ranks call this before they leave together."""
        if self.checkpoints is not None:
            self.checkpoints.flush()
        self.ranks.max(0)

    def train_loader(self, epochs: int) -> Loader:
        """This rank's share of every global training batch, in a stage of so many epochs."""
        return self._loader("train", self.recipe.data.batch_size // self.ranks.world, epochs)

    def steps_per_epoch(self) -> int:
        """Optimiser steps of an epoch of any stage."""
        return len(self.train_loader(1))

    def val_loader(self) -> Loader:
        """This rank's share of the validation images, each of them on one rank once."""
        size = self.recipe.data.eval_batch_size or self.recipe.data.batch_size
        return self._loader("val", -(-size // self.ranks.world), 1)

    def close(self) -> None:
        """Close what was opened; pending checkpoints are written first, and copied."""
        self._watchdog.close()
        for loader in self._loaders.values():
            loader.close()
        if self.checkpoints is not None:
            self.checkpoints.close()
        if self._remote is not None:
            self._remote.close(_LEAVING_COPY_LIMIT_S if self._leaving else _COPY_LIMIT_S)

    def _val_batches(self, before_leaving: Callable[[], None] | None) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        loader = self.val_loader()
        batches = iter(loader.epoch(0))
        for _ in range(self.ranks.max(len(loader))):
            leave = self.ranks.begin_max(self.leave.asked())
            self.beat("in validation")
            batch = next(batches, None)
            if batch is not None:
                yield batch
            if leave():
                if before_leaving is not None:
                    before_leaving()
                self.depart()

    def _loader(self, split: Literal["train", "val"], batch_size: int, epochs: int) -> Loader:
        key = (split, epochs if self.recipe.data.resize_schedule else 0)
        if key not in self._loaders:
            self._loaders[key] = self.data.open(
                self.recipe.data,
                split,
                batch_size=batch_size,
                seed=self.recipe.run.seed,
                rank=self.ranks.rank,
                world=self.ranks.world,
                device=self.ranks.device,
                epochs=epochs,
                stall_limit_s=self.recipe.run.stall_limit_s,
            )
            self._check_classes(self._loaders[key].num_classes)
        return self._loaders[key]

    def _check_classes(self, found: int | None) -> None:
        classes = self.recipe.model.num_classes
        if found is not None and found != classes:
            raise UserError(
                f"model.num_classes = {classes}, but {self.recipe.data.dir} holds {found} classes. "
                f"Set model.num_classes={found} or choose other data."
            )


def _keep_quiet(metrics: dict[str, Any]) -> None:
    """The report of a run that nobody listens to."""
