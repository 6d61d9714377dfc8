"""Integer codes stay whole numbers, whatever a process allows float32 products to be rounded to."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

import sbs
from sbs import compiled, kernels, library
from sbs.layers import QuantizedLayer
from tests.numerics import networks, states

SIZE = 8


@pytest.fixture
def rounded_products() -> Iterator[None]:
    """A process that lets oneDNN round float32 products to bfloat16, as torch.set_float32_matmul_precision may."""
    products = (torch.backends.mkldnn.conv, torch.backends.mkldnn.matmul)
    former = [each.fp32_precision for each in products]
    for each in products:
        each.fp32_precision = "bf16"
    yield
    for each, precision in zip(products, former, strict=True):
        each.fp32_precision = precision


@pytest.mark.usefixtures("rounded_products")
@pytest.mark.parametrize(("bits", "precision"), [((4, 8), "bf16"), ((8, 16), "ieee")])
def test_codes_wider_than_8_bits_are_convolved_in_whole_float32(monkeypatch, bits, precision):
    """Narrow ones keep the fast products that the user allowed: in them they are exact."""
    net = sbs.prepare(networks.Residual(), sbs.SearchSpace(bits, bits, edge_bits=bits[-1]), torch.zeros(1, 3, 8, 8))
    sbs.calibrate(net, [networks.images(4, SIZE, 1)])
    conv2d, seen = torch.conv2d, []

    def spy(*args: Tensor) -> Tensor:
        seen.append(torch.backends.mkldnn.conv.fp32_precision)
        return conv2d(*args)

    monkeypatch.setattr(torch, "conv2d", spy)
    net.train()(networks.images(4, SIZE, 2))
    assert seen == [precision] * 6
    assert torch.backends.mkldnn.conv.fp32_precision == "bf16"
    assert torch.backends.mkldnn.matmul.fp32_precision == "bf16"


def test_compiled_kernels_divide_as_eager_ones(monkeypatch):
    """An approximate division is off in the last bit, which rounds some quotients to another code."""
    asked = []
    monkeypatch.setattr(library, "kernel", lambda function, *given: asked.append(given[-1]) or function)
    operand = kernels.Operand(torch.ones(4), None, *torch.ones(3).unbind(0))
    sbs.use_compiled(True)
    compiled._Compiled(kernels.encode)(operand, kernels.Form(False, kernels.GateMode.NONE, (1, 3)), torch.float32)
    assert [options["eager_numerics.division_rounding"] for options in asked] == [True]


@pytest.mark.parametrize("kind", ["super-network", "compressed"])
@pytest.mark.parametrize(("low", "share"), [(torch.bfloat16, 2**-6), (torch.float16, 2**-9)])
def test_autocast_changes_a_layers_output_by_the_rounding_of_its_type_alone(kind, low, share):
    """Every layer given the same input, three roundings each; float16, where sums of codes would overflow, included."""
    torch.manual_seed(0)
    net = states.searched(networks.Inverted(), SIZE, seed=5, group_size=2).eval()
    net = net if kind == "super-network" else sbs.compress(net, sbs.freeze(net))
    layers = {name: m for name, m in net.named_modules() if isinstance(m, QuantizedLayer)}
    calls: dict[str, tuple[Tensor, Tensor]] = {}

    def again(name: str, x: Tensor, y: Tensor) -> None:
        if name not in calls:  # the hook calls the layer itself, within the gates of this pass
            calls[name] = x, y
            with torch.autocast("cpu", dtype=low):
                calls[name] = y, layers[name](x)

    for name, layer in layers.items():
        layer.register_forward_hook(lambda _, x, y, name=name: again(name, x[0], y))
    with torch.no_grad():
        net(networks.images(4, SIZE, 2))
    assert len(calls) == 7
    for name, (whole, rounded) in calls.items():
        assert rounded.dtype == low, name
        assert (rounded.float() - whole).abs().max() <= share * whole.abs().max(), name
