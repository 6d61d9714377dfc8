"""The networks that one search leaves say the same: searched, compressed, exported; on the GPU and on the CPU.

On one device in float32 without cuDNN, whose algorithms may round sums of integers, the three are equal to the bit.
Between devices full-precision parts of a network round differently, which can flip a code: what counts there is how far
logits are apart, and whether classes are the same; in float64 hardly a code flips.
"""

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

import sbs
from scripts.gpu.part import Options, main
from tests.benchmarks.bench_sbs import Case, Variant, prepared, start
from tests.benchmarks.measure import Row
from tests.numerics.states import scatter_thresholds

CASES = (
    Case("resnet18", 112, 64, 1, must=0, wanted=0),
    Case("mobilenetv2", 112, 64, 1, must=0, wanted=0),
)
STEPS, IMAGES = 6, 32
DEVICES_MUST, CUDNN_MUST, DOUBLE_MUST = 0.05, 0.02, 1e-6


def rows(options: Options) -> Iterator[Row]:
    """Equalities and distances of logits, for each network."""
    for case in CASES:
        size, batch = (32, 8) if options.tiny else (case.size, case.batch)
        yield from _of(Case(case.model, size, batch, 1, must=0, wanted=0), options.device, options.work)


def _of(case: Case, device: str, work: Path) -> Iterator[Row]:
    model, x, y = start(case, device)
    _make_uneven(model)
    net = prepared(model, x)
    _search(Variant(net, x, y, search=True, autocast=device == "cuda"))
    small = sbs.compress(net, sbs.freeze(net))
    file = work / f"{case.model}.sbs"
    sbs.export(small.eval(), file)
    plain = sbs.models.build(case.model, 100)
    again = sbs.load_exported(file, plain, torch.zeros(1, 3, case.size, case.size))
    images = torch.randn(IMAGES, 3, case.size, case.size, generator=torch.Generator().manual_seed(1))

    def on(network: nn.Module, place: str, dtype: torch.dtype = torch.float32) -> Tensor:
        network.to(place, dtype)
        given = images.to(place, dtype).to(memory_format=torch.channels_last)
        with torch.no_grad():
            return network.eval()(given).double().cpu()

    with torch.backends.cudnn.flags(enabled=False):
        searched, compressed, exported = (on(each, device) for each in (net, small, again))
        yield Row(f"{case.model}: compressed equals searched, {device}", torch.equal(compressed, searched), 1,
                  at_least=True)  # fmt: skip
        yield Row(f"{case.model}: exported equals compressed, {device}", torch.equal(exported, compressed), 1,
                  at_least=True)  # fmt: skip
    pruned = 1 - _size(small) / _size(net.model)
    yield Row(f"{case.model}: compression removed parameters", pruned > 0, 1, at_least=True)
    yield Row(f"{case.model}: compressed, with cuDNN / without", far(on(small, device), compressed), CUDNN_MUST)
    at_home = on(small, "cpu")
    yield Row(f"{case.model}: compressed, CPU / {device}", far(at_home, compressed), DEVICES_MUST)
    agree = (at_home.argmax(1) == compressed.argmax(1)).double().mean()
    yield Row(f"{case.model}: same class on both", 100 * float(agree), 90, "%", at_least=True)
    double = far(on(again, "cpu", torch.float64), on(again, device, torch.float64))
    yield Row(f"{case.model}: exported in float64, CPU / {device}", double, DOUBLE_MUST)


@torch.no_grad()
def _make_uneven(model: nn.Module) -> None:
    """Filters as different as those of a trained network: of equal ones a search prunes none."""
    generator = torch.Generator().manual_seed(2)
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            factor = torch.randn(module.out_channels, 1, 1, 1, generator=generator).mul(0.5).exp()
            module.weight.mul_(factor.to(module.weight.device))


def _search(variant: Variant) -> None:
    """Some steps, then gates that are closed in part."""
    for _ in range(STEPS):
        variant.step()
    home = variant.images.device
    scatter_thresholds(variant.net.cpu(), seed=3)
    variant.net.to(home)


def _size(network: nn.Module) -> int:
    return sum(p.numel() for p in network.parameters())


def far(a: Tensor, b: Tensor) -> float:
    """Largest difference relative to the largest entry."""
    return float((a - b).abs().max() / b.abs().max())


if __name__ == "__main__":
    main(rows)
