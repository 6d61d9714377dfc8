"""Which ReLUs the layers behind them compute, which stay, and that nobody can tell the difference."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import sbs
from sbs import supernet
from sbs.absorb import absorbable
from sbs.layers import AbsorbedReLU
from tests.numerics import networks, states

IMAGE = torch.zeros(1, 3, 8, 8)


class Body(nn.Module):
    """conv a -> norm -> ReLU -> conv b -> mean -> linear; the variants read the ReLU or what is before it elsewhere."""

    def __init__(self, relu: nn.Module) -> None:
        super().__init__()
        self.a, self.norm, self.relu = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), relu
        self.b, self.c, self.fc = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 1), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.middle(self.norm(self.a(x))).mean((2, 3)))

    def middle(self, x: Tensor) -> Tensor:
        return self.c(self.b(self.relu(x)))


class Twice(Body):
    def middle(self, x: Tensor) -> Tensor:
        return self.c(self.relu(self.b(self.relu(x))))


class Branch(Body):
    def middle(self, x: Tensor) -> Tensor:
        x = self.relu(x)
        return self.b(x) + self.c(x)


class Before(Body):
    """What is before the ReLU is read as well: where that works in place, it is read behind it."""

    def middle(self, x: Tensor) -> Tensor:
        return self.b(self.relu(x)) + self.c(x)


class Head(Body):
    """A head that only training calls."""

    def middle(self, x: Tensor) -> Tensor:
        x = self.relu(x)
        return self.b(x) + self.c(x) if self.training else self.b(x)


class Sum(Body):
    def middle(self, x: Tensor) -> Tensor:
        return self.b(self.relu(x + self.c(x)))


class Function(Body):
    def middle(self, x: Tensor) -> Tensor:
        return self.c(self.b(F.relu(x)))


class Own(nn.ReLU):
    def forward(self, x: Tensor) -> Tensor:
        return x.clamp_min(0) + 0.1


def _hooked() -> nn.Module:
    relu = nn.ReLU()
    relu.register_forward_hook(lambda *_: None)
    return relu


LEFT = {
    "called twice": Twice(nn.ReLU()),
    "two readers": Branch(nn.ReLU()),
    "in place of what is read": Before(nn.ReLU(inplace=True)),
    "training reads it": Head(nn.ReLU()),
    "behind a sum": Sum(nn.ReLU(inplace=True)),
    "a function": Function(nn.ReLU()),
    "hooked": Body(_hooked()),
    "of another class": Body(nn.LeakyReLU()),
    "of its own": Body(Own()),
}


@pytest.mark.parametrize("kind", LEFT)
def test_a_relu_that_something_else_depends_on_stays(kind):
    assert absorbable(LEFT[kind]) == {}


@pytest.mark.parametrize(
    ("model", "limit"),
    [(Body(nn.ReLU()), math.inf), (Body(nn.ReLU6(inplace=True)), 6.0), (Before(nn.ReLU()), math.inf)],
)
def test_a_relu_that_one_layer_alone_reads_is_absorbed(model, limit):
    model.norm.eval()
    assert absorbable(model) == {"b": ("relu", limit)}
    assert (model.training, model.norm.training) == (True, False)


@pytest.mark.parametrize(
    ("name", "count"), [("resnet20", 9), ("resnet18", 8), ("resnet50", 32), ("mobilenetv2", 34), ("resnet56", 27)]
)
def test_relus_of_the_zoo(name, count):
    """One in a basic block, two in a bottleneck; all of MobileNetV2 but the one before the pooling."""
    model = sbs.models.build(name, 10)
    assert len(absorbable(model)) == count
    net = sbs.prepare(model, sbs.SearchSpace(), torch.zeros(1, 3, 32, 32))
    assert sum(isinstance(m, AbsorbedReLU) for m in net.modules()) == count
    assert net.model.state_dict().keys() >= model.state_dict().keys()


def test_activations_in_full_precision_keep_their_relus():
    space = sbs.SearchSpace(weight_bits=(32,), activation_bits=(32,))
    net = sbs.prepare(networks.Inverted(), space, IMAGE)
    absorbed = [name for name, m in net.model.named_modules() if isinstance(m, AbsorbedReLU)]
    assert absorbed == [], "first and last layers have 8 bits, but no ReLU of theirs is read by them alone"
    assert all(layer.settings.relu is None for _, layer in net.layers())


def _step(net: nn.Module, x: Tensor) -> dict[str, Tensor]:
    F.cross_entropy(net(x), torch.arange(len(x)) % 5).backward()
    grads = {name: p.grad.clone() for name, p in net.named_parameters() if p.grad is not None}
    sbs.after_step(net)
    return grads | {name: b.clone() for name, b in net.named_buffers()}


@pytest.mark.parametrize("kind", ["inverted", "residual"])
def test_calibration_search_and_compression_are_the_same_without(kind, monkeypatch):
    """To the last bits of float64, statistics of calibration and of the step included."""
    nets = []
    for relus in (absorbable, lambda _: {}):
        monkeypatch.setattr(supernet, "absorbable", relus)
        torch.manual_seed(0)
        model = networks.USER_NETWORKS[kind]()
        nets.append(states.searched(model, 8, seed=3, dtype=torch.float64, group_size=2).train())
    ours, plain = nets
    assert any(isinstance(m, AbsorbedReLU) for m in ours.modules())
    assert not any(isinstance(m, AbsorbedReLU) for m in plain.modules())
    x = networks.images(4, 8, 5, torch.float64)
    got, want = _step(ours, x), _step(plain, x)
    assert got.keys() == want.keys()
    for name, value in want.items():
        torch.testing.assert_close(got[name], value, rtol=1e-10, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")
    assert sbs.cost(ours, (3, 8, 8)) == sbs.cost(plain, (3, 8, 8))
    small = sbs.compress(copy.deepcopy(ours), sbs.freeze(ours)).eval()
    assert not any(isinstance(m, AbsorbedReLU) for m in small.modules())
    with torch.no_grad():
        assert torch.equal(ours.eval()(x), plain.eval()(x))
        torch.testing.assert_close(small(x), ours(x), rtol=1e-9, atol=1e-9)
