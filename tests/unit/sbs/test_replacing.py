"""A layer that is replaced is replaced wherever it is called from, with what it was told to be, or refused."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import sbs

ONE_BIT = sbs.SearchSpace((1,), (1,), edge_bits=1)


def _images(batch: int = 4) -> Tensor:
    return torch.randn(batch, 3, 8, 8, generator=torch.Generator().manual_seed(1))


class Aliased(nn.Module):
    """The same layers under two names; called by the second."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 3)
        self.body = nn.Sequential(self.a, nn.ReLU(), self.b)

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


class Listed(Aliased):
    """Called from a list that torch does not know."""

    def __init__(self) -> None:
        super().__init__()
        del self.body
        self.todo = [self.a, self.b]

    def forward(self, x: Tensor) -> Tensor:
        return self.todo[1](torch.relu(self.todo[0](x)))


def test_a_layer_of_two_names_is_quantised_under_both():
    torch.manual_seed(0)
    model = Aliased().eval()
    net = sbs.prepare(model, ONE_BIT, _images())
    sbs.calibrate(net, [_images()])
    small = sbs.compress(net, sbs.freeze(net))
    float_logits, logits = model(_images()), net.eval()(_images())
    assert (logits - float_logits).abs().max() > 0.1 * float_logits.abs().max()  # one bit is not 32
    assert torch.equal(logits, small.eval()(_images()))
    for network in (net.model, small):
        assert network.a is network.body[0]
        assert type(network.a) is not nn.Conv2d
    assert sbs.cost(net, (3, 8, 8)).bops == sbs.cost(small, (3, 8, 8)).bops == sbs.cost(model, (3, 8, 8)).macs


def test_a_layer_called_from_a_plain_list_is_refused_with_the_remedy():
    message = r"Listed\.forward\(\) does not call its quantised 'a', 'b'.*nn\.ModuleList"
    with pytest.raises(sbs.SbsError, match=message):
        sbs.prepare(Listed(), ONE_BIT, _images())
    with pytest.raises(sbs.SbsError, match=message):
        sbs.compress(Listed(), sbs.Policy.uniform(Listed(), _images(), 4, 4))


class Standardised(nn.Conv2d):
    """Overrides what nn.Conv2d.forward() calls."""

    def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return super()._conv_forward(x, weight / weight.std(), bias)


def test_a_convolution_of_its_own_is_refused():
    model = Aliased()
    model.b = model.body[2] = Standardised(8, 4, 3)
    with pytest.raises(sbs.SbsError, match=r"'(b|body\.2)' \(Standardised\) has a forward\(\) of its own"):
        sbs.prepare(model, ONE_BIT, _images())


HOOKS: dict[str, Callable[[nn.Module], object]] = {
    "before": lambda m: m.register_forward_pre_hook(lambda _, x: (100 * x[0],)),
    "behind": lambda m: m.register_forward_hook(lambda _, x, y: 2 * y),
    "backward": lambda m: m.register_full_backward_hook(lambda _, dx, dy: None),
    "of the weight": lambda m: m.weight.register_hook(lambda g: 0 * g),
}


@pytest.mark.parametrize("kind", HOOKS)
def test_hooks_are_not_lost_in_silence(kind: str):
    model = Aliased()
    HOOKS[kind](model.b)
    with pytest.raises(sbs.SbsError, match="has hooks, which would be lost.*remove them"):
        sbs.prepare(model, ONE_BIT, _images())
    assert sbs.cost(model, (3, 8, 8)).macs > 0  # counting replaces nothing


def test_hooks_that_watched_a_search_do_not_keep_it_from_being_compressed():
    net = sbs.prepare(Aliased(), ONE_BIT, _images())
    sbs.calibrate(net, [_images()])
    net.model.b.register_forward_hook(lambda *_: None)
    with pytest.warns(
        UserWarning, match=r"'b' \(QuantConv2d\) has hooks, which the layer that takes its place does not"
    ):
        small = sbs.compress(net, sbs.freeze(net))
    assert torch.equal(small.eval()(_images()), net.eval()(_images()))


def test_a_forward_of_one_layer_alone_is_refused():
    """As tools that offload weights put it there."""
    model = Aliased()
    original = model.b.forward
    model.b.forward = lambda x: 100 * original(x)
    with pytest.raises(sbs.SbsError, match=r"has a forward\(\) of its own"):
        sbs.prepare(model, ONE_BIT, _images())


def _frozen() -> nn.Sequential:
    model = nn.Sequential(
        *(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), nn.ReLU()),
        *(nn.Flatten(), nn.Linear(8 * 16, 5)),
    )
    for layer in (model[0], model[1], model[3]):
        layer.requires_grad_(False)
    return model


def test_what_is_frozen_stays_frozen_and_where_it_is():
    torch.manual_seed(0)
    model = _frozen()
    net = sbs.prepare(model, sbs.SearchSpace(group_size=2), _images())
    sbs.calibrate(net, [_images()])
    with torch.no_grad():
        net.channel_gates.open[::2] = 0.0  # so that layers and norms are cut
    net.model[3].weight_clip.requires_grad_(False)
    small = sbs.compress(net, sbs.freeze(net))
    assert small[0].weight.shape[0] == 4
    assert not small[3].weight_clip.requires_grad
    assert small[3].activation_clip.requires_grad
    for network, parts in ((net, net.model), (small, small)):
        frozen = [parts[0].weight, parts[0].bias, *parts[1].parameters(), parts[3].weight, parts[3].bias]
        assert not any(p.requires_grad for p in frozen)
        assert all(p.requires_grad for p in (parts[4].weight, parts[7].weight))
        before = [p.clone() for p in frozen]
        groups = [p for kind in sbs.param_groups(network).values() for p in kind]
        optimizer = torch.optim.SGD(groups, lr=0.1, weight_decay=0.1)
        network.train()(_images()).square().mean().backward()
        optimizer.step()
        sbs.after_step(network)
        assert all(torch.equal(a, b) for a, b in zip(frozen, before, strict=True))
