"""What a network is made of moves with it: to another device (here one that holds no data) and another type."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor, nn

import sbs
from sbs.layers import QuantSettings, from_float
from tests.numerics import networks, states

SIZE = 8


@pytest.fixture(params=["super-network", "compressed"])
def net(request: pytest.FixtureRequest) -> nn.Module:
    """With closed gates of every kind, fresh from a forward pass in training."""
    torch.manual_seed(0)
    net = states.searched(networks.Inverted(), SIZE, seed=5, group_size=2)
    net = net if request.param == "super-network" else sbs.compress(net, sbs.freeze(net))
    net.train()(networks.images(4, SIZE, 1))
    return net


def _logits(net: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return net.eval()(x)


def _own_tensors(net: nn.Module) -> set[str]:
    """Names under which modules hold tensors that torch does not know of."""
    return {name for m in net.modules() for name, value in vars(m).items() if isinstance(value, Tensor)}


def test_nothing_but_masks_stays_behind(net):
    """Masks of kept weights follow at the next forward pass."""
    assert _own_tensors(net) <= {"kept"}
    net.to("meta")
    held = list(itertools.chain(net.named_parameters(), net.named_buffers()))
    assert len(held) > 50
    for name, tensor in held:
        assert tensor.device.type == "meta", name


def test_masks_that_lie_elsewhere_are_replaced_and_those_that_are_equal_stay():
    """As after a network moved: what is on another device can be neither compared nor written."""
    layer = from_float(nn.Linear(4, 2), QuantSettings((8,), (8,), signed=False))
    layer.kept = (torch.ones(2, 1, device="meta"),)
    mask = torch.tensor([[1.0], [0.0]])
    assert layer.keep((mask,))
    assert torch.equal(*layer.kept, mask)
    assert not layer.keep((mask.clone(),))
    assert layer.keep((torch.ones(2, 1),))
    assert layer.kept == ()
    assert not layer.keep(())


def test_a_wider_type_and_back_is_the_same_network(net):
    sbs.after_step(net)
    x = networks.images(4, SIZE, 2)
    want, state = _logits(net, x), {name: value.clone() for name, value in net.state_dict().items()}
    wide = _logits(net.double(), x.double())
    assert wide.dtype == torch.float64
    assert all(
        t.dtype == torch.float64 for t in itertools.chain(net.parameters(), net.buffers()) if t.is_floating_point()
    )
    assert (wide - want).abs().max() < 0.05 * want.abs().max()  # other rounding flips a code here and there
    assert torch.equal(_logits(net.float(), x), want)
    for name, value in net.state_dict().items():
        assert torch.equal(value, state[name]), name


def test_a_type_changed_between_a_pass_and_its_step_counts_the_pass():
    nets = [states.searched(networks.Inverted(), SIZE, seed=5, group_size=2) for _ in range(2)]
    nets[1].load_state_dict(nets[0].state_dict())
    for net in nets:
        net.train()(networks.images(4, SIZE, 1))
    before = nets[0].activation_gates.statistic.clone()
    sbs.after_step(nets[0])
    sbs.after_step(nets[1].double())
    assert not torch.equal(nets[0].activation_gates.statistic, before)
    torch.testing.assert_close(
        nets[1].activation_gates.statistic, nets[0].activation_gates.statistic.double(), rtol=1e-5, atol=1e-6
    )
