"""Shape tables of the reference networks, written from their papers and not from any module of the product.

Each row is one convolution or linear layer in order of execution. From the rows alone: MACs, parameters, BOPs.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Row:
    """One layer: `height` and `width` are those of its output."""

    c_in: int
    c_out: int
    kernel: int
    height: int
    width: int
    groups: int = 1
    bias: bool = False
    norm: bool = True

    @property
    def fan_in(self) -> int:
        return self.c_in // self.groups * self.kernel**2

    @property
    def macs(self) -> int:
        return self.height * self.width * self.c_out * self.fan_in

    @property
    def params(self) -> int:
        return self.c_out * self.fan_in + (self.c_out if self.bias else 0) + (2 * self.c_out if self.norm else 0)


def _linear(c_in: int, c_out: int) -> Row:
    return Row(c_in, c_out, 1, 1, 1, bias=True, norm=False)


def _half(size: int) -> int:
    return (size - 1) // 2 + 1  # 3x3 with padding 1, 7x7 with padding 3, 1x1 without: all at stride 2


def cifar_resnet(depth: int, num_classes: int, size: int = 32) -> list[Row]:
    """He et al. section 4.2 with 1x1 convolutions on the shortcuts that change shape: depth = 6n + 2."""
    rows, c_in = [Row(3, 16, 3, size, size)], 16
    for stage, width in enumerate((16, 32, 64)):
        for block in range((depth - 2) // 6):
            if stage > 0 and block == 0:
                size = _half(size)
            rows += [Row(c_in, width, 3, size, size), Row(width, width, 3, size, size)]
            if c_in != width:
                rows.append(Row(c_in, width, 1, size, size))
            c_in = width
    return [*rows, _linear(64, num_classes)]


def imagenet_resnet(layers: tuple[int, ...], bottleneck: bool, num_classes: int = 1000, size: int = 224) -> list[Row]:
    """He et al. table 1 (bottlenecks stride in their 3x3 convolution)."""
    size = _half(size)
    rows, c_in = [Row(3, 64, 7, size, size)], 64
    size = _half(size)
    for stage, count in enumerate(layers):
        width = 64 * 2**stage
        c_out = width * 4 if bottleneck else width
        for block in range(count):
            before, size = size, _half(size) if stage > 0 and block == 0 else size
            if bottleneck:
                rows += [
                    Row(c_in, width, 1, before, before),
                    Row(width, width, 3, size, size),
                    Row(width, c_out, 1, size, size),
                ]
            else:
                rows += [Row(c_in, width, 3, size, size), Row(width, c_out, 3, size, size)]
            if block == 0 and (stage > 0 or bottleneck):
                rows.append(Row(c_in, c_out, 1, size, size))
            c_in = c_out
    return [*rows, _linear(c_in, num_classes)]


MOBILENETV2_PLAN = (
    (1, 16, 1, 1),
    (6, 24, 2, 2),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)


def mobilenet_v2(num_classes: int = 1000, size: int = 224) -> list[Row]:
    """Sandler et al. table 2, width 1.0: expansion t, channels c, repeats n, stride s."""
    size = _half(size)
    rows, c_in = [Row(3, 32, 3, size, size)], 32
    for expand, c_out, repeats, stride in MOBILENETV2_PLAN:
        for block in range(repeats):
            hidden = c_in * expand
            if expand != 1:
                rows.append(Row(c_in, hidden, 1, size, size))
            size = _half(size) if stride == 2 and block == 0 else size
            rows += [Row(hidden, hidden, 3, size, size, groups=hidden), Row(hidden, c_out, 1, size, size)]
            c_in = c_out
    rows.append(Row(320, 1280, 1, size, size))
    return [*rows, _linear(1280, num_classes)]


@dataclass(frozen=True)
class Reference:
    """A network, its input, its rows and the published figures: MACs, and BOPs at 32/32 in 1e9 as printed."""

    name: str
    num_classes: int
    size: int
    rows: list[Row]
    macs: int
    gbops: float
    gbops_unit: float


REFERENCES = (
    Reference("resnet20", 100, 32, cifar_resnet(20, 100), 40_818_944, 41.7986, 1e-4),
    Reference("resnet56", 100, 32, cifar_resnet(56, 100), 125_753_600, 128.7717, 1e-4),
    Reference("resnet18", 1000, 224, imagenet_resnet((2, 2, 2, 2), False), 1_814_073_344, 1857.6, 0.1),
    Reference("resnet50", 1000, 224, imagenet_resnet((3, 4, 6, 3), True), 4_089_184_256, 4187.3, 0.1),
    Reference("mobilenetv2", 1000, 224, mobilenet_v2(), 300_774_272, 308.0, 0.1),
)
PARAMETERS = {"resnet18": 11_689_512, "resnet50": 25_557_032, "mobilenetv2": 3_504_872}  # torchvision's documentation
