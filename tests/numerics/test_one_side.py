"""Layers that quantise one operand alone, and codes too wide for half precision: against products written out."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import sbs
from sbs.layers import QuantSettings, from_float
from tests.numerics import networks


@pytest.mark.parametrize("quantised", ["weight", "input"])
def test_gradients_of_the_side_in_full_precision(quantised):
    """y = Q(x) W^T or x Q(W)^T: the gradient of the float operand is that of a product with the quantised one."""
    torch.manual_seed(0)
    bits = ((4,), (32,)) if quantised == "weight" else ((32,), (4,))
    layer = from_float(nn.Linear(8, 6, bias=False).double(), QuantSettings(*bits, signed=False))
    layer.set_clip("weight", 2.0)
    layer.set_clip("activation", 1.5)
    x = (2 * torch.rand(3, 8, dtype=torch.float64)).requires_grad_()
    dy = torch.randn(3, 6, dtype=torch.float64)
    y = layer(x)
    y.backward(dy)
    if quantised == "weight":
        w = layer.weight.detach()
        std = w.std(correction=0)
        u = ((w - w.mean()) / (2.0 * std)).clamp(-1, 1)
        value = 2.0 * std * (2 * torch.round((u + 1) / 2 * 15) - 15) / 15
        torch.testing.assert_close(y, x @ value.t())
        torch.testing.assert_close(x.grad, dy @ value)
    else:
        value = torch.round((x.detach() / 1.5).clamp(0, 1) * 15) / 15 * 1.5
        torch.testing.assert_close(y, value @ layer.weight.t())
        torch.testing.assert_close(layer.weight.grad, dy.t() @ value)
        torch.testing.assert_close(x.grad, (dy @ layer.weight.detach()) * (x.detach() <= 1.5))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_wide_codes_stay_whole_under_autocast(dtype):
    """Codes of 16 bits are no numbers of half precision: products are then taken in float32."""
    torch.manual_seed(0)
    layer = from_float(nn.Linear(64, 16, bias=False), QuantSettings((16,), (16,), signed=True))
    layer.set_clip("weight", 4.0)
    layer.set_clip("activation", 3.0)
    x = torch.randn(32, 64)
    with torch.no_grad():
        want = layer(x)
        with torch.autocast("cpu", dtype=dtype):
            got = layer(x)
    torch.testing.assert_close(got.float(), want, rtol=0, atol=1e-5)


def test_bf16_gradients_are_those_of_float32():
    """All of them in one direction: relative to the length, what bf16 (3 digits) leaves of a network of six layers."""
    found = {}
    for enabled in (False, True):
        torch.manual_seed(0)
        net = sbs.prepare(
            networks.randomise(networks.Plain(), 1), sbs.SearchSpace(group_size=2), torch.zeros(1, 3, 8, 8)
        )
        x = networks.images(32, 8, 2)
        sbs.calibrate(net, [x])
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            logits = net.eval()(x)
        nn.functional.cross_entropy(logits.float(), torch.arange(32) % 5).backward()
        grads = {n: p.grad for n, p in net.named_parameters() if p.grad is not None and p.grad.norm() > 0}
        found[enabled] = grads
    assert found[True].keys() == found[False].keys()
    weights = [n for n in found[True] if n.endswith("weight")]
    for name in weights:
        want, got = found[False][name].flatten(), found[True][name].flatten()
        assert 0.9 < float(got @ want / (want @ want)) < 1.1, name
