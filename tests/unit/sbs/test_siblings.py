"""Layers of a fixed-bit network that quantise their weights together compute what each would alone."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import sbs
from sbs import siblings
from sbs.layers import QuantizedLayer
from tests.numerics import networks

SIZE, BATCH = 8, 6


def _network() -> nn.Module:
    torch.manual_seed(0)
    model, x = networks.randomise(networks.Inverted(), 1), torch.zeros(1, 3, SIZE, SIZE)
    policy = sbs.Policy.uniform(model, x, 4, 4)
    images = networks.images(BATCH, SIZE, 1)
    return sbs.compress(model, policy, example_input=x, calibration=[images]).train()


def _siblings(net: nn.Module) -> list[siblings.Siblings | None]:
    return [m.siblings for m in net.modules() if isinstance(m, QuantizedLayer)]


def _steps(net: nn.Module, autocast: bool) -> dict[str, Tensor]:
    """State and gradients after some steps, the second of two micro-batches."""
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)
    for step in range(3):
        optimizer.zero_grad()
        for part in range(1 + step % 2):
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
                logits = net(networks.images(BATCH, SIZE, 10 * step + part))
            F.cross_entropy(logits.float(), torch.arange(BATCH) % 5).backward()
        optimizer.step()
        sbs.after_step(net)
    return net.state_dict() | {f"{name}.grad": p.grad for name, p in net.named_parameters()}


@pytest.fixture
def together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(siblings, "_LAUNCHING", ("cpu",))


@pytest.mark.parametrize("autocast", [False, True])
def test_steps_are_the_same_to_the_bit(monkeypatch, autocast):
    alone = _network()
    want = _steps(alone, autocast)
    assert set(_siblings(alone)) == {None}
    monkeypatch.setattr(siblings, "_LAUNCHING", ("cpu",))
    net = _network()
    got = _steps(net, autocast)
    assert len(set(_siblings(net))) == 1
    assert None not in _siblings(net)
    for name, value in want.items():
        assert torch.equal(got[name], value), name


@pytest.mark.usefixtures("together")
def test_every_pass_has_the_codes_of_its_weights():
    """Also of weights that were written through `.data`, which raises no version."""
    net, x = _network().eval(), networks.images(BATCH, SIZE, 5)
    sbs.after_step(net)
    alone = copy.deepcopy(net)
    assert set(_siblings(alone)) == {None}
    with torch.no_grad():
        assert torch.equal(net(x), alone(x))
        for each in (net, alone):
            for p in each.parameters():
                p.data.mul_(1.5).add_(0.01)
        assert torch.equal(net(x), alone(x))


@pytest.mark.usefixtures("together")
def test_layers_that_have_gone_apart_are_alone():
    net, x = _network().eval(), networks.images(BATCH, SIZE, 5)
    sbs.after_step(net)
    layers = [m for m in net.modules() if isinstance(m, QuantizedLayer)]
    want = layers[0](x)
    layers[-1].double()
    assert torch.equal(layers[0](x), want)
