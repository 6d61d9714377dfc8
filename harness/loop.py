"""The training loop of one stage: plain PyTorch, the same in one process, under torchrun and under Ray Train.

Every rank runs the same steps. What they must decide together (write a checkpoint, leave, give up) is agreed upon by a
maximum over ranks that travels while a step computes. A resumed run repeats exactly the steps that an undisturbed one
would have made: order of data, random draws and learning rate are functions of (seed, epoch, step).
"""

import logging
import time
from dataclasses import dataclass

import torch

from harness.checkpoint import State, to_cpu
from harness.context import Context
from harness.data.loader import Loader
from harness.errors import TrainingError
from harness.layers_log import layers_of
from harness.losses import LossWatch, StepLoss
from harness.machine import Sampler
from harness.metrics import Scores, Stopwatch
from harness.step import Job, Stepper
from harness.watch import StepProfiler

log = logging.getLogger(__name__)

# What the ranks may agree upon, the gravest wins.
_GO_ON, _CHECKPOINT, _LEAVE, _GIVE_UP = range(4)


@dataclass
class Position:
    """Epochs done, batches done in the current one, steps done in the stage."""

    epoch: int = 0
    batch: int = 0
    step: int = 0


class StageLoop:
    """Trains `job.net` in place, from a checkpoint's state or from the start.

    `calibration_s`: what the stage's calibration took, which is part of its time.
    """

    def __init__(self, job: Job, context: Context, state: State | None, calibration_s: float = 0.0) -> None:
        run, ranks = context.recipe.run, context.ranks
        self.job, self.context, self.ranks = job, context, ranks
        self.at = Position()
        self.stepper = Stepper(job, context.recipe, ranks, state)
        self._loader: Loader = context.train_loader(job.config.epochs)
        self._sums = torch.zeros(5, dtype=torch.float64, device=ranks.device)  # over the epoch so far, see Stepper.step
        self._best_top1, self._flips_before = -1.0, 0.0
        self._warned: list[str] = []  # kinds of remarks, by their first words
        self._profiler = StepProfiler(
            context.run.path / f"trace-{job.stage}.json", run.profile_steps if ranks.main else 0
        )
        self._machine = Sampler(ranks.device)
        self._fault = ""
        self._losses = LossWatch(ranks.device)
        self._begin_s = self._last_checkpoint_s = time.monotonic()
        self._earlier_s = calibration_s
        if state is not None:
            self._restore(state)

    def run(self) -> None:
        """Train to the end of the stage.

        Raises `Preempted` after a checkpoint when asked to leave, `TrainingError` when the loss is not finite.
        """
        while self.at.epoch < self.job.config.epochs:
            watch = Stopwatch()
            self._train_epoch(watch)
            speed = watch.report(self.ranks.device)
            self.stepper.own_norms()
            scores = self.context.evaluate(self.stepper.weights(), before_leaving=self.checkpoint)
            self._finish_epoch(scores, speed)
        self._profiler.close()

    def elapsed_s(self) -> float:
        """Seconds spent in this stage, those before a resume included."""
        return self._earlier_s + time.monotonic() - self._begin_s

    def global_step(self) -> int:
        """Steps of the trial so far, all stages counted."""
        return self.job.start_step + self.at.step

    # One epoch ------------------------------------------------------------------------------------------------------

    def _train_epoch(self, watch: Stopwatch) -> None:
        self.job.net.train()
        steps = len(self._loader)
        if self.at.batch >= steps:
            return
        batches = iter(self._loader.epoch(self.at.epoch, skip=self.at.batch))
        while self.at.batch < steps:
            agreed = self.ranks.begin_max(max(self._wish(), self._due()))
            waited_s = self._loader.waited_s
            self.context.beat("waiting for data")
            images, labels = next(batches)
            self.context.beat(f"at step {self.global_step()}")
            self._step(images, labels)
            self._profiler.step()
            watch.step(len(labels) * self.ranks.world, self._loader.waited_s - waited_s)
            self.context.progress(self.at.epoch, self.job.config.epochs, self.global_step(), watch.images_per_s())
            self._act(agreed())
        self._give_up_on_faults()  # the last step's weights have no loss yet that could tell

    def _step(self, images: torch.Tensor, labels: torch.Tensor) -> None:
        sums, loss = self.stepper.step(images, labels, self.at.step, len(self._loader))
        self._sums += sums
        self._blame(self._losses.add(loss, self.global_step(), self.at.batch))
        self.at.batch += 1
        self.at.step += 1

    def _finish_epoch(self, scores: Scores, speed: dict[str, float]) -> None:
        stage = self.job.stage
        images, top1, _, loss, penalty = self.ranks.sum(self._sums).tolist()
        metrics = {f"{stage}/loss": loss / images, f"{stage}/train_top1": 100 * top1 / images}
        metrics |= scores.named(stage) | self._telemetry() | {f"{stage}/lr": self.stepper.lr}
        if self.job.pressure is not None:
            metrics |= {f"{stage}/penalty": penalty / images} | self.job.pressure.figures()
        metrics |= speed | self._machine.sample()
        self._sums.zero_()
        self.at = Position(self.at.epoch + 1, 0, self.at.step)
        step, epochs = self.global_step(), self.job.config.epochs
        self.context.record("metrics", self.at.epoch, step, metrics, **layers_of(self.job.net))
        self.context.progress(self.at.epoch, epochs, step, speed["speed/images_per_s"], now=True)
        self._keep_best(scores)
        self._warn_once(metrics)
        # epochs_done counts all stages: what a scheduler compares trials by
        done = {"stage": stage, "epoch": self.at.epoch, "epochs_done": step // max(1, len(self._loader))}
        self.context.report(done | {"top1": scores.top1} | metrics)

    def _telemetry(self) -> dict[str, float]:
        figures = self.job.telemetry()
        if "gates/flips" in figures:
            figures["gates/flips_in_epoch"] = figures["gates/flips"] - self._flips_before
            self._flips_before = figures["gates/flips"]
        return figures

    def _keep_best(self, scores: Scores) -> None:
        if scores.top1 <= self._best_top1:
            return
        self._best_top1 = scores.top1
        if self.ranks.main:
            weights = to_cpu(self.stepper.weights().state_dict())
            best = {"epoch": self.at.epoch, "top1": scores.top1, "policy": self.job.policy, "net": weights}
            self.context.write_best(self.job.key, best)

    def _warn_once(self, figures: dict[str, float]) -> None:
        text = self.job.remark(self.at.step, self.job.config.epochs * len(self._loader), figures)
        if text is None or (kind := text.split(" ", 1)[0]) in self._warned:
            return
        self._warned.append(kind)
        if self.ranks.main:
            log.warning("%s: %s", self.job.stage, text)
        self.context.record("event", self.at.epoch, self.global_step(), message=text)

    # What the ranks agree upon --------------------------------------------------------------------------------------

    def _wish(self) -> int:
        if self._fault:
            return _GIVE_UP
        return _LEAVE if self.context.leave.asked() else _GO_ON

    def _due(self) -> int:
        """Whether rank 0 wants a checkpoint after the step that begins now."""
        run = self.context.recipe.run
        if run.checkpoint_every_steps is not None:
            due = (self.at.step + 1) % run.checkpoint_every_steps == 0
        else:
            due = time.monotonic() - self._last_checkpoint_s >= run.checkpoint_every_s
        return _CHECKPOINT if due and self.ranks.main else _GO_ON

    def _act(self, agreed: int) -> None:
        if agreed == _GIVE_UP:
            self._give_up()
        elif agreed != _GO_ON:
            self.checkpoint()
        if agreed == _LEAVE:
            self.context.depart()

    def _blame(self, found: StepLoss | None) -> None:
        if found is None or self._fault:
            return
        images = list(self._loader.indices(self.at.epoch, found.batch))
        place = f"step {found.step}, batch {found.batch} of epoch {self.at.epoch}"
        self._fault = f"the loss is {found.loss} in {self.job.stage} ({place}, rank {self.ranks.rank}, images {images})"

    def _give_up_on_faults(self) -> None:
        """Make sure that all losses so far and all weights of all ranks are finite; every rank calls this."""
        self._blame(self._losses.bad(wait=True))
        if not self._fault and not self.stepper.finite():
            self._fault = f"a weight is not finite in {self.job.stage} after step {self.global_step()}"
        if self.ranks.max(bool(self._fault)):
            self._give_up()

    def _give_up(self) -> None:
        self.context.flush()  # what is still being written may be the last good one
        faults = self.ranks.strings(self._fault)
        last = self.ranks.share(str(self.context.last_checkpoint or ""))  # rank 0 alone knows
        kept = f"the last good checkpoint is {last}" if last else "there is no earlier checkpoint"
        raise TrainingError(f"{next(filter(None, faults))}; {kept}. Lower the learning rate or change the precision.")

    # Checkpoints ----------------------------------------------------------------------------------------------------

    def checkpoint(self) -> None:
        """Write the whole state of the stage; every rank calls this at the same step."""
        self._give_up_on_faults()
        state = self.stepper.state() | {
            "epoch": self.at.epoch,
            "batch": self.at.batch,
            "step": self.at.step,
            "global_step": self.global_step(),
            "elapsed_s": self.elapsed_s(),
            "sums": self.ranks.sum(self._sums),
            "best_top1": self._best_top1,
            "flips_before": self._flips_before,
            "warned": list(self._warned),
            "policy": self.job.policy,
        }
        self._last_checkpoint_s = time.monotonic()
        if self.ranks.main:
            self.context.write_checkpoint(self.global_step(), self.job.key, self.at.epoch, to_cpu(state))

    def _restore(self, state: State) -> None:
        self._earlier_s = state["elapsed_s"]
        self._best_top1, self._flips_before = state["best_top1"], state["flips_before"]
        self._warned = list(state["warned"])
        if self.ranks.main:
            self._sums += state["sums"].to(self._sums.device)
        self.at = Position(state["epoch"], state["batch"], state["step"])
