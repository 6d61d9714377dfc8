"""The training loop of one stage: plain PyTorch, the same in one process, under torchrun and under Ray Train.

Every rank runs the same steps. What they must decide together (write a checkpoint, leave, give up) is agreed upon by a
maximum over ranks that travels while a step computes. A resumed run repeats exactly the steps that an undisturbed one
would have made: order of data, random draws and learning rate are functions of (seed, epoch, step).
"""

import logging
import time
import warnings
from collections import deque
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import sbs
from harness.checkpoint import State, to_cpu
from harness.config import TrainConfig
from harness.context import Context
from harness.data.loader import Loader
from harness.errors import TrainingError
from harness.metrics import Scores, Stopwatch, score_sums
from harness.optim import averaged, build_optimizer, lr_factor, set_lr
from harness.ranks import norm_statistics, seed_step, set_norm_statistics
from harness.watch import StepProfiler
from sbs.layers import QuantizedLayer

log = logging.getLogger(__name__)

# What the ranks may agree upon, the gravest wins.
_GO_ON, _CHECKPOINT, _LEAVE, _GIVE_UP = range(4)
_LOSSES_IN_FLIGHT = 4


def no_remark(step: int, steps: int, figures: dict[str, float]) -> str | None:  # noqa: ARG001 - what a remark is
    """Nothing worth a warning."""
    return None


@dataclass(frozen=True)
class Job:
    """What one stage trains: `penalty(step)` is added to the loss, `teacher` is imitated, `telemetry` is recorded.

    `key` is the identity of the stage; `start_step` counts the steps of the stages before; `policy` describes `net` if
    it is compressed; `remark(step, steps, figures)` may find something to warn of after an epoch.
    """

    stage: str
    key: str
    net: nn.Module
    config: TrainConfig
    start_step: int
    penalty: Callable[[int], torch.Tensor] | None = None
    teacher: nn.Module | None = None
    telemetry: Callable[[], dict[str, float]] = dict
    policy: dict[str, Any] | None = None
    remark: Callable[[int, int, dict[str, float]], str | None] = no_remark


@dataclass
class Position:
    """Epochs done, batches done in the current one, steps done in the stage."""

    epoch: int = 0
    batch: int = 0
    step: int = 0


class StageLoop:
    """Trains `job.net` in place, from a checkpoint's state or from the start; `run()` returns the last scores."""

    def __init__(self, job: Job, context: Context, state: State | None) -> None:
        run, ranks = context.recipe.run, context.ranks
        self.job, self.context, self.ranks = job, context, ranks
        self.at = Position()
        self._loader: Loader = context.train_loader(job.config.epochs)
        self._optimizer = build_optimizer(job.net, job.config, context.recipe.data.batch_size)
        self._ema = None if job.config.ema_decay is None else averaged(job.net, job.config.ema_decay)
        self._scaler = torch.amp.GradScaler(ranks.device.type, enabled=run.precision == "fp16")
        # Sums over the epoch so far: images, right at 1, right at 5, cross-entropy, penalty x images.
        self._sums = torch.zeros(5, dtype=torch.float64, device=ranks.device)
        self._best_top1, self._flips_before, self._warned = -1.0, 0.0, False
        self._profiler = StepProfiler(
            context.run.path / f"trace-{job.stage}.json", run.profile_steps if ranks.main else 0
        )
        self._fault = ""
        self._losses: deque[tuple[torch.Tensor, int, int]] = deque()
        self._begin_s = self._last_checkpoint_s = time.monotonic()
        self._earlier_s = 0.0
        if state is not None:
            self._restore(state)
        self._ddp = self._distribute()
        self._forward: nn.Module | Any = self._ddp or job.net
        if run.compile and not any(isinstance(module, QuantizedLayer) for module in job.net.modules()):
            # Quantised layers compile kernels of their own; a graph around them would be compiled anew as gates move.
            self._forward = torch.compile(self._forward)

    def run(self) -> Scores | None:
        """Train to the end of the stage; None if there is nothing to train.

        Raises `Preempted` after a checkpoint when asked to leave, `TrainingError` when the loss is not finite.
        """
        scores = None
        while self.at.epoch < self.job.config.epochs:
            watch = Stopwatch()
            self._train_epoch(watch)
            speed = watch.report(self.ranks.device)
            scores = self.context.evaluate(self.weights(), before_leaving=self.checkpoint)
            self._finish_epoch(scores, speed)
        return scores

    def elapsed_s(self) -> float:
        """Seconds spent in this stage, those before a resume included."""
        return self._earlier_s + time.monotonic() - self._begin_s

    def weights(self) -> nn.Module:
        """The network that counts: the averaged one where the recipe asks for it."""
        return self.job.net if self._ema is None else self._ema.module

    # One epoch ------------------------------------------------------------------------------------------------------

    def _train_epoch(self, watch: Stopwatch) -> None:
        self.job.net.train()
        steps = len(self._loader)
        if self.at.batch >= steps:
            return
        batches = iter(self._loader.epoch(self.at.epoch, skip=self.at.batch))
        while self.at.batch < steps:
            agreed = self.ranks.begin_max(max(self._wish(), self._due()))
            begin_s = time.perf_counter()
            self.context.beat("waiting for data")
            images, labels = next(batches)
            wait_s = time.perf_counter() - begin_s
            self.context.beat(f"at step {self._global_step()}")
            self._step(images, labels)
            self._profiler.step()
            watch.step(len(labels) * self.ranks.world, wait_s)
            self.at.batch += 1
            self.at.step += 1
            self.context.progress(self.at.epoch, self.job.config.epochs, self._global_step(), watch.images_per_s())
            self._act(agreed())
        self._check_losses(0)
        if self.ranks.max(bool(self._fault)):
            self._give_up()

    def _step(self, images: torch.Tensor, labels: torch.Tensor) -> None:
        job, config = self.job, self.job.config
        seed_step(self.context.recipe.run.seed, self.ranks.rank, self._global_step())
        set_lr(self._optimizer, lr_factor(config, self.at.step, len(self._loader)))
        parts = list(zip(images.chunk(config.accumulate), labels.chunk(config.accumulate), strict=True))
        for number, (part, part_labels) in enumerate(parts):
            last = number == len(parts) - 1
            with nullcontext() if last or self._ddp is None else self._ddp.no_sync():
                self._backward(part, part_labels, len(parts), last)
        self._scaler.unscale_(self._optimizer)
        if config.clip_norm is not None:
            nn.utils.clip_grad_norm_(job.net.parameters(), config.clip_norm)
        self._scaler.step(self._optimizer)
        self._scaler.update()
        self._optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            sbs.after_step(job.net)
        if self._ema is not None:
            self._ema.update_parameters(job.net)

    def _backward(self, images: torch.Tensor, labels: torch.Tensor, parts: int, last: bool) -> None:
        with self.context.autocast():
            logits = self._forward(images)
            loss = self._task_loss(images, logits, labels)
        total = loss / parts
        penalty = torch.zeros((), device=loss.device)
        if last and self.job.penalty is not None:
            penalty = self.job.penalty(self.at.step)
            total = total + penalty
        self._scaler.scale(total).backward()
        self._sums += torch.cat([score_sums(logits, labels), (penalty.detach().double() * len(labels) * parts)[None]])
        self._watch_loss(loss + penalty)

    def _task_loss(self, images: torch.Tensor, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        config = self.job.config
        loss = F.cross_entropy(logits.float(), labels, label_smoothing=config.label_smoothing)
        if self.job.teacher is None:
            return loss
        with torch.no_grad():
            target = F.log_softmax(self.job.teacher(images).float() / config.distill_temperature, dim=1)
        own = F.log_softmax(logits.float() / config.distill_temperature, dim=1)
        imitation = F.kl_div(own, target, reduction="batchmean", log_target=True) * config.distill_temperature**2
        return (1 - config.distill) * loss + config.distill * imitation

    def _finish_epoch(self, scores: Scores, speed: dict[str, float]) -> None:
        stage = self.job.stage
        images, top1, _, loss, penalty = self.ranks.sum(self._sums).tolist()
        metrics = {f"{stage}/loss": loss / images, f"{stage}/train_top1": 100 * top1 / images}
        metrics |= scores.named(stage) | self._telemetry()
        metrics[f"{stage}/lr"] = self._optimizer.param_groups[0]["lr"]
        if self.job.penalty is not None:
            metrics[f"{stage}/penalty"] = penalty / images
        metrics |= speed
        self._sums.zero_()
        self.at = Position(self.at.epoch + 1, 0, self.at.step)
        self.context.record("metrics", self.at.epoch, self._global_step(), metrics)
        self.context.progress(
            self.at.epoch, self.job.config.epochs, self._global_step(), speed["speed/images_per_s"], now=True
        )
        if scores.top1 > self._best_top1:
            self._best_top1 = scores.top1
            best = {"epoch": self.at.epoch, "top1": scores.top1, "policy": self.job.policy}
            if self.ranks.main:
                self.context.write_best(self.job.key, best | {"net": to_cpu(self.weights().state_dict())})
        self._warn_once(metrics)
        self.context.report({"stage": stage, "epoch": self.at.epoch, "top1": scores.top1} | self._done() | metrics)

    def _telemetry(self) -> dict[str, float]:
        figures = self.job.telemetry()
        if "gates/flips" in figures:
            figures["gates/flips_in_epoch"] = figures["gates/flips"] - self._flips_before
            self._flips_before = figures["gates/flips"]
        return figures

    def _done(self) -> dict[str, int]:
        """Epochs of this trial so far, all stages counted: what a scheduler compares trials by."""
        return {"epochs_done": self._global_step() // max(1, len(self._loader))}

    def _warn_once(self, figures: dict[str, float]) -> None:
        text = self.job.remark(self.at.step, self.job.config.epochs * len(self._loader), figures)
        if text is None or self._warned:
            return
        self._warned = True
        if self.ranks.main:
            log.warning("%s: %s", self.job.stage, text)
        self.context.record("event", self.at.epoch, self._global_step(), message=text)

    # What the ranks agree upon ------------------------------------------------------------------------------------

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

    def _watch_loss(self, loss: torch.Tensor) -> None:
        self._losses.append((loss.detach(), self._global_step(), self.at.batch))
        self._check_losses(0 if loss.device.type == "cpu" else _LOSSES_IN_FLIGHT)

    def _check_losses(self, leave: int) -> None:
        """Look at all but the last `leave` losses; on a GPU those are still being computed and looking would wait."""
        while len(self._losses) > leave:
            loss, step, batch = self._losses.popleft()
            if not self._fault and not bool(torch.isfinite(loss)):
                images = list(self._loader.indices(self.at.epoch, batch))
                place = f"step {step}, batch {batch} of epoch {self.at.epoch}, rank {self.ranks.rank}, images {images}"
                self._fault = f"the loss is {loss.item()} in {self.job.stage} ({place})"

    def _give_up(self) -> None:
        self.context.flush()  # what is still being written may be the last good one
        faults = self.ranks.strings(self._fault)
        last = self.context.last_checkpoint
        kept = f"the last good checkpoint is {last}" if last else "there is no earlier checkpoint"
        raise TrainingError(f"{next(filter(None, faults))}; {kept}. Lower the learning rate or change the precision.")

    # Checkpoints --------------------------------------------------------------------------------------------------

    def checkpoint(self) -> None:
        """Write the whole state of the stage; every rank calls this at the same step."""
        self._check_losses(0)
        parameters = [p.detach() for p in self.job.net.parameters()]
        if not self._fault and not bool(nn.utils.get_total_norm(parameters).isfinite()):
            self._fault = f"a weight is not finite in {self.job.stage} after step {self._global_step()}"
        if self.ranks.max(bool(self._fault)):
            self._give_up()
        sums = self.ranks.sum(self._sums)
        norms = [self.ranks.gather(norm_statistics(net)) for net in self._nets()]
        self._last_checkpoint_s = time.monotonic()
        if not self.ranks.main:
            return
        state: State = {
            "epoch": self.at.epoch,
            "batch": self.at.batch,
            "step": self.at.step,
            "global_step": self._global_step(),
            "elapsed_s": self.elapsed_s(),
            "net": self.job.net.state_dict(),
            "optimizer": self._optimizer.state_dict(),
            "scaler": self._scaler.state_dict(),
            "ema": None if self._ema is None else self._ema.state_dict(),
            "sums": sums,
            "best_top1": self._best_top1,
            "flips_before": self._flips_before,
            "warned": self._warned,
            "policy": self.job.policy,
            "norms": norms,
        }
        self.context.write_checkpoint(self._global_step(), self.job.key, self.at.epoch, to_cpu(state))

    def _restore(self, state: State) -> None:
        self._earlier_s = state["elapsed_s"]
        self._best_top1, self._flips_before = state["best_top1"], state["flips_before"]
        self._warned = state["warned"]
        self.job.net.load_state_dict(state["net"])
        self._optimizer.load_state_dict(state["optimizer"])
        self._scaler.load_state_dict(state["scaler"])
        if self._ema is not None:
            self._ema.load_state_dict(state["ema"])
        for net, statistics in zip(self._nets(), state["norms"], strict=True):
            same_world = len(statistics) == self.ranks.world
            own = statistics[self.ranks.rank] if same_world else torch.stack(statistics).mean(dim=0)
            set_norm_statistics(net, own.to(self.ranks.device))
        if self.ranks.main:
            self._sums += state["sums"].to(self._sums.device)
        self.at = Position(state["epoch"], state["batch"], state["step"])

    def _nets(self) -> list[nn.Module]:
        return [self.job.net] if self._ema is None else [self.job.net, self._ema.module]

    # Devices ------------------------------------------------------------------------------------------------------

    def _distribute(self) -> DistributedDataParallel | None:
        if self.ranks.world == 1:
            return None
        # Buckets that are rebuilt after the first step change the order in which three or more ranks add up, and so the
        # last bits after a resume; the search for unused parameters keeps the first layout.
        fixed_buckets = self.context.recipe.run.deterministic and self.ranks.world > 2
        with warnings.catch_warnings():
            # Its successor `forward_sync_buffers` copies rank 0's buffers at once, and batch norms are each rank's own.
            warnings.filterwarnings("ignore", message="`broadcast_buffers` is deprecated", category=FutureWarning)
            return DistributedDataParallel(
                self.job.net,
                device_ids=[self.ranks.device.index] if self.ranks.device.type == "cuda" else None,
                broadcast_buffers=False,
                find_unused_parameters=fixed_buckets,
            )

    def _global_step(self) -> int:
        return self.job.start_step + self.at.step
