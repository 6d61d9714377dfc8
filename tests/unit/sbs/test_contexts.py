"""Gates reach the layers for one step: also in recomputation, never in copies, and no layer runs without them."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import sbs


def _images(batch: int = 4) -> Tensor:
    return torch.randn(batch, 3, 8, 8, generator=torch.Generator().manual_seed(1))


class Checkpointed(nn.Module):
    """Forgets what is inside its body, if told to, and computes it again in the backward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.fc = nn.Conv2d(3, 8, 3), nn.Linear(8, 4)
        self.body = nn.Sequential(nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU())
        self.forgets = False

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        x = checkpoint(self.body, x, use_reentrant=False) if self.training and self.forgets else self.body(x)
        return self.fc(x.mean((2, 3)))


def _searching() -> sbs.SuperNet:
    torch.manual_seed(0)
    net = sbs.prepare(Checkpointed(), sbs.SearchSpace(group_size=2), _images())
    sbs.calibrate(net, [_images()])
    with torch.no_grad():
        net.channel_gates.open[::2] = 0.0
        net.weight_gates.open[0, 1:] = 0.0
        net.activation_gates.open[1, 1:] = 0.0
    return net.train()


@pytest.mark.parametrize("forwards", [1, 2])
def test_activation_checkpointing_changes_nothing(forwards: int):
    """Gradients to the bit, statistics to a rounding (what is computed twice is counted twice), also accumulated."""
    nets = [_searching(), _searching()]
    nets[1].model.forgets = True
    for net in nets:
        for batch in _images(4 * forwards).split(4):
            (F.cross_entropy(net(batch), torch.arange(4)) + 0.125 * sbs.bop_penalty(net)).backward()
    for (name, a), b in zip(nets[0].named_parameters(), nets[1].parameters(), strict=True):
        assert torch.equal(a.grad, b.grad), name
    for ours, theirs in zip(nets[0].banks(), nets[1].banks(), strict=True):
        assert torch.equal(ours.pull, theirs.pull)
    assert nets[0].channel_gates.pull.abs().min() > 0
    assert torch.equal(nets[0].pressure, torch.full((3,), 0.125 * forwards, dtype=torch.float64))
    assert torch.equal(nets[1].pressure, nets[0].pressure)
    for net in nets:
        sbs.after_step(net)
    torch.testing.assert_close(nets[0].activation_gates.statistic, nets[1].activation_gates.statistic)


def test_passes_before_a_step_add_up_to_what_they_say_of_the_gates():
    nets = [_searching() for _ in range(3)]
    first, second = _images(8).split(4)
    for net, batches in zip(nets, ((first, second), (first,), (second,)), strict=True):
        for batch in batches:
            F.cross_entropy(net(batch), torch.arange(4)).backward()
    for both, one, other in zip(*(net.banks() for net in nets), strict=True):
        assert one.pull.any()
        torch.testing.assert_close(both.pull, one.pull + other.pull)


def test_other_passes_between_forward_and_backward_change_nothing():
    """An evaluation without gradients, and a count of costs at another size."""
    nets = [_searching(), _searching()]
    for net, disturbed in zip(nets, (False, True), strict=True):
        net.model.forgets = True
        loss = net(_images()).square().mean()
        if disturbed:
            net.eval()
            with torch.no_grad():
                net(2 * _images())
            net.train()
            assert sbs.cost(net, (3, 16, 16)).macs > sbs.cost(net, (3, 8, 8)).macs
        loss.backward()
        sbs.after_step(net)
    for (name, a), b in zip(nets[0].named_parameters(), nets[1].parameters(), strict=True):
        assert (a.grad is None) == (b.grad is None)
        assert a.grad is None or torch.equal(a.grad, b.grad), name
    for (name, a), b in zip(nets[0].state_dict().items(), nets[1].state_dict().values(), strict=True):
        assert torch.equal(a, b), name


def test_a_part_of_a_super_network_called_by_itself_is_refused():
    """It would compute at the highest bits, with every channel."""
    net = _searching().eval()
    with torch.no_grad():
        net(_images())
        with pytest.raises(sbs.SbsError, match=r"outside the network's forward\(\).*not its `model`"):
            net.model(_images())
    net.train()
    net(_images()).sum().backward()
    sbs.after_step(net)
    with pytest.raises(sbs.SbsError, match=r"outside the network's forward\(\)"):
        net.model.body(torch.zeros(1, 8, 6, 6))
    assert sbs.compress(net, sbs.freeze(net)).body(torch.zeros(1, 8, 6, 6)).shape == (1, 8, 2, 2)


def test_copies_between_forward_and_backward_are_sound():
    net = _searching()
    loss = net(_images()).square().mean()
    other = copy.deepcopy(net)
    assert all(layer.context is None for _, layer in other.layers())
    loss.backward()
    other(_images()).square().mean().backward()
    for a, b in zip(net.parameters(), other.parameters(), strict=True):
        assert (a.grad is None) == (b.grad is None)
        assert a.grad is None or torch.equal(a.grad, b.grad)


def test_buffers_may_be_written_between_forward_and_backward():
    """As an averaged model or a broadcast may do; the gradient is that of the pass that was."""
    nets = [_searching(), _searching()]
    for net, disturbed in zip(nets, (False, True), strict=True):
        loss = net(_images()).square().mean() + sbs.bop_penalty(net)
        if disturbed:
            with torch.no_grad():
                for bank in (net.weight_gates, net.activation_gates, net.channel_gates):
                    bank.statistic.add_(0.5)
        loss.backward()
    for a, b in zip(nets[0].parameters(), nets[1].parameters(), strict=True):
        assert a.grad is None or torch.equal(a.grad, b.grad)
    for ours, theirs in zip(nets[0].banks(), nets[1].banks(), strict=True):
        assert torch.equal(ours.pull, theirs.pull)
        assert ours.pull.any()


@pytest.mark.filterwarnings("error")
def test_training_without_a_start_is_warned_of_once():
    net = sbs.prepare(Checkpointed(), sbs.SearchSpace(), _images())
    with torch.no_grad():
        net.train()(_images())
    with pytest.warns(UserWarning, match=r"call sbs\.calibrate") as caught:
        net(_images())
    assert [Path(each.filename).name for each in caught] == ["test_contexts.py"]
    net(_images())
    loaded = sbs.prepare(Checkpointed(), sbs.SearchSpace(group_size=2), _images())
    loaded.load_state_dict(_searching().state_dict())
    loaded.train()(_images())
