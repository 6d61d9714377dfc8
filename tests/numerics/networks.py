"""Small networks of a user's own, none of them from the zoo, and helpers that bring them into a given state."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Plain(nn.Module):
    """Convolutions, max pooling, a flatten that keeps the pixels, two linear layers; modules throughout."""

    def __init__(self, width: int = 8, num_classes: int = 5):
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(2),
            nn.Conv2d(width, 2 * width, 3, padding=1),
            nn.BatchNorm2d(2 * width),
            nn.ReLU6(),
            nn.AvgPool2d(2),
        )
        self.hidden = nn.Linear(2 * width * 4, 16)
        self.head = nn.Linear(16, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.flatten(self.features(x), 1)
        return self.head(F.relu(self.hidden(x)))


class Residual(nn.Module):
    """A block with identity and one with projection shortcut; relu as function and as module, `+` and torch.add."""

    def __init__(self, width: int = 8, num_classes: int = 5):
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1, bias=False)
        self.stem_bn = nn.BatchNorm2d(width)
        self.conv_a = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn_a = nn.BatchNorm2d(width)
        self.relu_a = nn.ReLU(inplace=True)
        self.conv_b = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn_b = nn.BatchNorm2d(width)
        self.conv_c = nn.Conv2d(width, 2 * width, 3, stride=2, padding=1, bias=False)
        self.bn_c = nn.BatchNorm2d(2 * width)
        self.conv_d = nn.Conv2d(2 * width, 2 * width, 3, padding=1, bias=False)
        self.bn_d = nn.BatchNorm2d(2 * width)
        self.short = nn.Conv2d(width, 2 * width, 1, stride=2, bias=False)
        self.short_bn = nn.BatchNorm2d(2 * width)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(2 * width, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem_bn(self.stem(x)))
        y = self.bn_b(self.conv_b(self.relu_a(self.bn_a(self.conv_a(x)))))
        x = F.relu(x + y)
        y = self.bn_d(self.conv_d(F.relu(self.bn_c(self.conv_c(x)))))
        x = F.relu(torch.add(y, self.short_bn(self.short(x))))
        return self.fc(self.pool(x).flatten(1))


class Inverted(nn.Module):
    """An inverted residual with linear bottlenecks: consumers of `project` see signed inputs."""

    def __init__(self, width: int = 8, expand: int = 2, num_classes: int = 5):
        super().__init__()
        hidden = width * expand
        self.stem = nn.Sequential(nn.Conv2d(3, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU6())
        self.down = nn.Sequential(nn.Conv2d(width, width, 1, bias=False), nn.BatchNorm2d(width))
        self.expand = nn.Sequential(nn.Conv2d(width, hidden, 1, bias=False), nn.BatchNorm2d(hidden), nn.ReLU6())
        self.depthwise = nn.Sequential(
            nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden, bias=False), nn.BatchNorm2d(hidden), nn.ReLU6()
        )
        self.project = nn.Sequential(nn.Conv2d(hidden, width, 1, bias=False), nn.BatchNorm2d(width))
        self.last = nn.Sequential(nn.Conv2d(width, hidden, 1, bias=False), nn.BatchNorm2d(hidden), nn.ReLU6())
        self.head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(hidden, num_classes))

    def forward(self, x: Tensor) -> Tensor:
        x = self.down(self.stem(x))
        x = x + self.project(self.depthwise(self.expand(x)))
        return self.head(self.last(x))


class Signed(nn.Module):
    """No activation behind one norm and a norm behind one activation: prunable groups with signed consumers."""

    def __init__(self, width: int = 8, num_classes: int = 5):
        super().__init__()
        self.one = nn.Conv2d(3, width, 3, padding=1, bias=False)
        self.one_bn = nn.BatchNorm2d(width)
        self.two = nn.Conv2d(width, width, 3, padding=1)  # its bias keeps sums of codes off the kink of the ReLU
        self.two_bn = nn.BatchNorm2d(width)
        self.three = nn.Conv2d(width, 2 * width, 3, stride=2, padding=1, bias=False)
        self.three_bn = nn.BatchNorm2d(2 * width)
        self.four = nn.Linear(2 * width, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.one_bn(self.one(x))
        x = self.two_bn(F.relu(self.two(x)))
        x = F.relu(self.three_bn(self.three(x)))
        return self.four(x.mean((2, 3)))


USER_NETWORKS = {"plain": Plain, "residual": Residual, "inverted": Inverted, "signed": Signed}


def randomise(model: nn.Module, seed: int) -> nn.Module:
    """Batch norms with statistics and affine parameters of their own, channels of unequal weight: nothing cancels."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(like: Tensor, low: float, high: float) -> Tensor:
        return torch.empty(like.shape, dtype=like.dtype).uniform_(low, high, generator=generator)

    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                ranges = {
                    "weight": (0.5, 1.5),
                    "bias": (-0.2, 0.6),
                    "running_mean": (-0.2, 0.2),
                    "running_var": (0.5, 2),
                }
                for name, (low, high) in ranges.items():
                    value = getattr(module, name)
                    if value is not None:
                        value.copy_(uniform(value, low, high))
            elif isinstance(module, nn.Conv2d | nn.Linear):
                factors = uniform(module.weight.flatten(1)[:, 0], 0.4, 1.6)
                module.weight.mul_(factors.view(-1, *[1] * (module.weight.dim() - 1)))
    return model


def images(batch: int, size: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Smooth random images (so that activations are not pure noise), zero mean, signed."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(batch, 3, max(size // 4, 1), max(size // 4, 1), generator=generator)
    fine = torch.randn(batch, 3, size, size, generator=generator)
    return (F.interpolate(coarse, size=(size, size), mode="bilinear") + 0.3 * fine).to(dtype)
