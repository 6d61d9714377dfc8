"""Optimisers with the parameter groups of the method, learning-rate schedules as pure functions, averaged weights."""

import math
from collections.abc import Iterable

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import sbs
from harness.config import TrainConfig, scaled_lr


def build_optimizer(net: nn.Module, stage: TrainConfig, batch_size: int) -> torch.optim.Optimizer:
    """SGD or AdamW over `sbs.param_groups(net)`; every group carries its `peak_lr`.

    Weight decay holds for convolution and linear weights alone. Clips have a learning rate of their own (`clip_lr`, not
    scaled with the batch); thresholds are moved by `sbs.after_step`.
    """
    lr = scaled_lr(stage, batch_size)
    rates = {"decay": lr, "no_decay": lr, "clips": stage.clip_lr or lr}
    groups = [
        {
            "params": parameters,
            "name": name,
            "lr": rates[name],
            "peak_lr": rates[name],
            "weight_decay": stage.weight_decay if name == "decay" else 0.0,
        }
        for name, parameters in sbs.param_groups(net).items()
        if parameters
    ]
    if stage.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=lr, weight_decay=0.0)
    return torch.optim.SGD(groups, lr=lr, momentum=stage.momentum, nesterov=stage.nesterov and stage.momentum > 0)


def lr_factor(stage: TrainConfig, step: int, steps_per_epoch: int) -> float:
    """Share of the peak learning rate at a step (counted from 0 over the stage), in [0, 1].

    Warm-up is linear over `warmup_epochs`, then cosine to `final_lr_share`, steps of `step_factor` at `step_epochs`,
    or constant. One-cycle: linear up to the peak at `warmup_epochs`, linear down to `final_lr_share` at the end.
    """
    total = stage.epochs * steps_per_epoch
    warmup = round(stage.warmup_epochs * steps_per_epoch)
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(1, total - warmup)
    if stage.schedule == "cosine":
        return stage.final_lr_share + (1 - stage.final_lr_share) * 0.5 * (1 + math.cos(math.pi * progress))
    if stage.schedule == "one_cycle":
        return 1 - (1 - stage.final_lr_share) * progress
    if stage.schedule == "step":
        return float(stage.step_factor ** sum(step >= epoch * steps_per_epoch for epoch in stage.step_epochs))
    return 1.0


def set_lr(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Give every group `factor` times its peak learning rate."""
    for group in optimizer.param_groups:
        group["lr"] = group["peak_lr"] * factor


class Averaged(AveragedModel):
    """torch's averaged model with an update in a few grouped launches, of which the host waits for none.

    torch's own asks in every step how many came before, sends that number to the device, and copies buffers one by one.
    """

    def __init__(self, net: nn.Module, decay: float) -> None:
        super().__init__(net)
        self._lerp = get_ema_multi_avg_fn(decay)
        self._has_begun = False

    @torch.no_grad()
    def update_parameters(self, model: nn.Module) -> None:
        """Average parameters, the first time copy them; copy buffers."""
        begun, self._has_begun = self._has_begun or bool(self.n_averaged), True
        for ours, theirs in _by_type(self.module.parameters(), model.parameters()):
            if begun:
                self._lerp(ours, theirs, self.n_averaged)
            else:
                torch._foreach_copy_(ours, theirs)
        for ours, theirs in _by_type(self.module.buffers(), model.buffers()):
            torch._foreach_copy_(ours, theirs)
        self.n_averaged += 1


def _by_type(
    ours: Iterable[torch.Tensor], theirs: Iterable[torch.Tensor]
) -> Iterable[tuple[list[torch.Tensor], list[torch.Tensor]]]:
    """Both sides by the type of ours: only equal types are taken together in a launch."""
    groups: dict[torch.dtype, tuple[list[torch.Tensor], list[torch.Tensor]]] = {}
    for own, other in zip(ours, theirs, strict=True):
        left, right = groups.setdefault(own.dtype, ([], []))
        left.append(own)
        right.append(other)
    return groups.values()


def averaged(net: nn.Module, decay: float) -> Averaged:
    """Exponential moving average of the weights; buffers are copied at each update."""
    return Averaged(net, decay)
