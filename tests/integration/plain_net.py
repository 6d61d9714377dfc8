"""A network without batch norm, for which the parts of a batch add up exactly; also a program for several ranks."""

import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn

from harness.arithmetic import arithmetic
from harness.config import TrainConfig, TrialSpec
from harness.context import Context
from harness.loop import StageLoop
from harness.ranks import joined
from harness.step import Job


class PlainNet(nn.Module):
    """Two convolutions and a classifier for 16x16 images in 8 classes."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 8, 3, 2), nn.GroupNorm(2, 8), nn.ReLU(), nn.Conv2d(8, 8, 3, 2), nn.ReLU(), nn.Flatten()
        )
        self.head = nn.Linear(72, 8)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(images))


def train_plain(spec: TrialSpec, changes: dict[str, Any]) -> torch.Tensor:
    """Train a `PlainNet` in the loop; all its weights in one vector."""
    config = TrainConfig.model_validate({"epochs": 2, "lr": 0.05, "warmup_epochs": 0.5} | changes)
    with arithmetic(spec.recipe.run), joined(spec.recipe.run) as ranks:
        context = Context(spec, ranks)
        torch.manual_seed(0)
        net = PlainNet()
        try:
            StageLoop(Job("pretrain", "key", net, config, 0), context, None).run()
        finally:
            context.close()
    return torch.cat([p.detach().flatten() for p in net.parameters()])


if __name__ == "__main__":
    made = TrialSpec.model_validate_json(Path(sys.argv[1]).read_text())
    torch.save(train_plain(made, {}), sys.argv[2])
