"""One optimiser step: forward in parts, loss and penalty, backward, clipping, averaging; and all that steps change."""

import warnings
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import sbs
from harness.arithmetic import autocast
from harness.checkpoint import State
from harness.config import Recipe, TrainConfig
from harness.graphed import PlainStep, graphed
from harness.metrics import score_sums
from harness.optim import averaged, build_optimizer, lr_factor, set_lr
from harness.pressure import Pressure
from harness.ranks import Ranks, norm_statistics, seed_step, set_norm_statistics
from sbs.layers import QuantizedLayer


def no_remark(step: int, steps: int, figures: dict[str, float]) -> str | None:  # noqa: ARG001 - what a remark is
    """Nothing worth a warning."""
    return None


def _keep_norms(net: nn.Module) -> None:
    """Leave the running statistics as training left them."""


@dataclass(frozen=True)
class Job:
    """What one stage trains: `pressure` adds to the loss, `teacher` is imitated, `telemetry` is recorded.

    `key` is the identity of the stage; `start_step` counts the steps of the stages before; `policy` describes `net` if
    it is compressed; `estimate_norms(net)` is called before a network whose running statistics are not its own is
    validated; `remark(step, steps, figures)` may find something to warn of after an epoch.
    """

    stage: str
    key: str
    net: nn.Module
    config: TrainConfig
    start_step: int
    pressure: Pressure | None = None
    teacher: nn.Module | None = None
    telemetry: Callable[[], dict[str, float]] = dict
    policy: dict[str, Any] | None = None
    estimate_norms: Callable[[nn.Module], None] = _keep_norms
    remark: Callable[[int, int, dict[str, float]], str | None] = no_remark


class Stepper:
    """Makes the steps of a job on this rank; continues from a checkpoint's `state` if one is given."""

    def __init__(self, job: Job, recipe: Recipe, ranks: Ranks, state: State | None) -> None:
        self.job, self._run, self._ranks = job, recipe.run, ranks
        self._optimizer = build_optimizer(job.net, job.config, recipe.data.batch_size)
        self._ema = None if job.config.ema_decay is None else averaged(job.net, job.config.ema_decay)
        self._scaler = torch.amp.GradScaler(ranks.device.type, enabled=recipe.run.precision == "fp16")
        if state is not None:
            self._restore(state)
        self._ddp = self._distribute()
        self._forward: nn.Module | Any = self._ddp or job.net
        if recipe.run.compile and not any(isinstance(module, QuantizedLayer) for module in job.net.modules()):
            # Quantised layers compile kernels of their own; a graph around them would be compiled anew as gates move.
            # One graph for each image size of a schedule: a graph for any size would be slower at all of them.
            self._forward = torch.compile(self._forward, dynamic=False)
        self._number, self._steps, self._loss_scale = 0, 0, 1.0
        learned = [parameter for parameter in job.net.parameters() if parameter.requires_grad]
        net = job.net
        aside = {"keep_aside": net.kept_aside} if isinstance(net, sbs.SuperNet) else {}
        plain = PlainStep(self._compute, self._after_step, captures_after=job.pressure is not None, **aside)
        turns = "search.bop_gradient = 'alternate' changes from step to step what is computed"
        stage_obstacle = turns if job.pressure is not None and recipe.search.bop_gradient == "alternate" else None
        self._work = graphed(plain, learned, recipe.run, ranks, job.stage, stage_obstacle=stage_obstacle)

    @property
    def lr(self) -> float:
        """Learning rate of the weights in the last step."""
        return float(self._optimizer.param_groups[0]["lr"])

    def own_norms(self) -> None:
        """Give the network that counts batch-norm statistics of its own, where gates or averaging took them away."""
        if self._ema is not None or self.job.pressure is not None:
            self.job.estimate_norms(self.weights())

    def weights(self) -> nn.Module:
        """The network that counts: the averaged one where the recipe asks for it."""
        return self.job.net if self._ema is None else self._ema.module

    def step(
        self, images: torch.Tensor, labels: torch.Tensor, number: int, steps_per_epoch: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Step `number` of the stage on this rank's images (N, 3, H, W) and labels (N,).

        Returns the sums [images, right at 1, right within 5, cross-entropy, penalty x images], float64, and the sum of
        the losses of the parts, which is not finite if one of them is not. The next step may overwrite both.
        """
        seed_step(self._run.seed, self._ranks.rank, self.job.start_step + number)
        set_lr(self._optimizer, lr_factor(self.job.config, number, steps_per_epoch))
        self._number, self._steps = number, self.job.config.epochs * steps_per_epoch
        sums, losses = self._work(images, labels)
        self._update(number)
        return sums, losses

    def _compute(self, images: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The sums of `step`, and the gradients; where graphs repeat it, the step's number must change nothing."""
        count, number = self.job.config.accumulate, self._number
        parts = list(zip(images.chunk(count), labels.chunk(count), strict=True))
        sums = torch.zeros(5, dtype=torch.float64, device=images.device)
        losses = torch.zeros((), device=images.device)
        for index, (part, part_labels) in enumerate(parts):
            last = index == len(parts) - 1
            with nullcontext() if last or self._ddp is None else self._ddp.no_sync():
                penalty = self.job.pressure.penalty(number) if last and self.job.pressure is not None else None
                logits, loss = self._backward(part, part_labels, len(parts), penalty)
            sums[:4] += score_sums(logits, part_labels)
            losses += loss
        if penalty is not None:
            sums[4] += penalty.detach().double() * len(labels)
        return sums, losses

    def _backward(
        self, images: torch.Tensor, labels: torch.Tensor, parts: int, penalty: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        with autocast(self._run, self._ranks.device):
            logits = self._forward(images)
            loss = self.task_loss(images, logits, labels)
        total = loss / parts if penalty is None else loss / parts + penalty
        self._scaler.scale(total).backward()
        return logits.detach(), total.detach()

    def task_loss(self, images: torch.Tensor, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Mean cross-entropy with label smoothing, or its mixture with imitating the teacher's softened logits."""
        config = self.job.config
        loss = F.cross_entropy(logits.float(), labels, label_smoothing=config.label_smoothing)
        if self.job.teacher is None:
            return loss
        with torch.no_grad():
            target = F.log_softmax(self.job.teacher(images).float() / config.distill_temperature, dim=1)
        own = F.log_softmax(logits.float() / config.distill_temperature, dim=1)
        imitation = F.kl_div(own, target, reduction="batchmean", log_target=True) * config.distill_temperature**2
        return (1 - config.distill) * loss + config.distill * imitation

    def _update(self, number: int) -> None:
        net = self.job.net
        self._scaler.unscale_(self._optimizer)
        if self.job.config.clip_norm is not None:
            nn.utils.clip_grad_norm_(net.parameters(), self.job.config.clip_norm)
        self._loss_scale = self._scaler.get_scale()  # without fp16 a constant, which no device is asked for
        self._scaler.step(self._optimizer)
        self._scaler.update()
        self._optimizer.zero_grad(set_to_none=True)
        self._work.finish()
        if self.job.pressure is not None:
            self.job.pressure.stepped(number)
        if self._ema is not None:
            self._ema.update_parameters(net)

    def _after_step(self) -> None:
        sbs.after_step(self.job.net, self._steps, loss_scale=self._loss_scale)

    # State --------------------------------------------------------------------------------------------------------

    def finite(self) -> bool:
        """Whether all weights are finite."""
        return bool(nn.utils.get_total_norm([p.detach() for p in self.job.net.parameters()]).isfinite())

    def state(self) -> State:
        """All that steps change; every rank calls this, for batch-norm statistics are each rank's own."""
        return {
            "net": self.job.net.state_dict(),
            "optimizer": self._optimizer.state_dict(),
            "scaler": self._scaler.state_dict(),
            "ema": None if self._ema is None else self._ema.state_dict(),
            "pressure": None if self.job.pressure is None else self.job.pressure.state(),
            "norms": [self._ranks.gather(norm_statistics(net)) for net in self._nets()],
        }

    def _restore(self, state: State) -> None:
        self.job.net.load_state_dict(state["net"])
        self._optimizer.load_state_dict(state["optimizer"])
        self._scaler.load_state_dict(state["scaler"])
        if self.job.pressure is not None:
            self.job.pressure.restore(state["pressure"])
        if self._ema is not None:
            self._ema.load_state_dict(state["ema"])
        for net, statistics in zip(self._nets(), state["norms"], strict=True):
            same_world = len(statistics) == self._ranks.world
            own = statistics[self._ranks.rank] if same_world else torch.stack(statistics).mean(dim=0)
            set_norm_statistics(net, own.to(self._ranks.device))

    def _nets(self) -> list[nn.Module]:
        return [self.job.net] if self._ema is None else [self.job.net, self._ema.module]

    def _distribute(self) -> DistributedDataParallel | None:
        if self._ranks.world == 1:
            return None
        # Buckets that are rebuilt after the first step change the order in which three or more ranks add up, and so the
        # last bits after a resume; the search for unused parameters keeps the first layout.
        fixed_buckets = self._run.deterministic and self._ranks.world > 2
        with warnings.catch_warnings():
            # Its successor `forward_sync_buffers` copies rank 0's buffers at once, and batch norms are each rank's own.
            warnings.filterwarnings("ignore", message="`broadcast_buffers` is deprecated", category=FutureWarning)
            return DistributedDataParallel(
                self.job.net,
                device_ids=[self._ranks.device.index] if self._ranks.device.type == "cuda" else None,
                broadcast_buffers=False,
                find_unused_parameters=fixed_buckets,
            )
