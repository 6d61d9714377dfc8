"""Exact figures over a distributed validation set, running sums over an epoch, and what the epoch's time went into."""

import resource
import time
from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from harness.ranks import Ranks


@dataclass(frozen=True)
class Scores:
    """Top-1 and top-5 in percent, mean cross-entropy in nats, over `count` images."""

    top1: float
    top5: float
    loss: float
    count: int

    def named(self, prefix: str) -> dict[str, float]:
        """As metrics, e.g. `finetune/top1`."""
        return {f"{prefix}/top1": self.top1, f"{prefix}/top5": self.top5, f"{prefix}/val_loss": self.loss}


def score_sums(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Sums over a batch, float64: [images, right at top-1, right within top-5, cross-entropy in nats].

    `logits` (N, classes), `labels` (N,). Among equal logits the lower class number stands first, so that a tie counts
    the same everywhere; logits that are not finite count as wrong.
    """
    logits = logits.detach().float()
    own = logits.gather(1, labels[:, None])
    lower_class = torch.arange(logits.shape[1], device=logits.device) < labels[:, None]
    place = ((logits > own) | ((logits == own) & lower_class)).sum(1)
    place = torch.where(logits.isfinite().all(1), place, logits.shape[1] + 5)
    loss = F.cross_entropy(logits, labels, reduction="none").double().sum()
    count = logits.new_full((), len(labels), dtype=torch.float64)
    return torch.stack([count, (place < 1).sum().double(), (place < 5).sum().double(), loss])


def scores(sums: torch.Tensor) -> Scores:
    """Figures from the sums of `score_sums`, added over all batches and ranks."""
    count, top1, top5, loss = sums.tolist()
    whole = max(count, 1.0)
    return Scores(100 * top1 / whole, 100 * top5 / whole, loss / whole, int(count))


def evaluate(
    net: nn.Module,
    batches: Iterable[tuple[torch.Tensor, torch.Tensor]],
    ranks: Ranks,
    *,
    flip_tta: bool = False,
) -> Scores:
    """Exact figures over the ranks' batches (every image once, whatever their sizes); with `flip_tta` the mean of the
    logits of an image and its mirror image counts. Leaves `net` in evaluation mode.
    """
    net.eval()
    sums = torch.zeros(4, dtype=torch.float64, device=ranks.device)
    with torch.no_grad():
        for images, labels in batches:
            logits = net(images)
            if flip_tta:
                logits = (logits + net(images.flip(3))) / 2
            sums += score_sums(logits, labels)
    return scores(ranks.sum(sums))


class Stopwatch:
    """Where an epoch's time goes: waiting for data, and the rest of the steps."""

    def __init__(self) -> None:
        self._begin = time.perf_counter()
        self.images = 0
        self.steps = 0
        self.wait_s = 0.0

    def step(self, images: int, wait_s: float) -> None:
        """Count one step over `images` images of all ranks, `wait_s` of it spent waiting for the loader."""
        self.images += images
        self.steps += 1
        self.wait_s += wait_s

    def images_per_s(self) -> float:
        """Images of all ranks per second so far."""
        return self.images / max(time.perf_counter() - self._begin, 1e-9)

    def report(self, device: torch.device) -> dict[str, float]:
        """Metrics `speed/...`: images/s of all ranks, mean step time, share of waiting, peak memory of this process."""
        elapsed_s = max(time.perf_counter() - self._begin, 1e-9)
        figures = {
            "speed/images_per_s": self.images / elapsed_s,
            "speed/step_s": elapsed_s / max(1, self.steps),
            "speed/data_wait_share": min(1.0, self.wait_s / elapsed_s),
            "speed/peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024.0,
        }
        if device.type == "cuda":
            figures["speed/peak_device_bytes"] = float(torch.cuda.max_memory_allocated(device))
        return figures
