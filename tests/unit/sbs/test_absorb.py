"""Which ReLUs the layers behind them compute, which stay, and that nobody can tell the difference."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import sbs
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
    """What is before the ReLU is changed in place before the layer behind it runs."""

    def middle(self, x: Tensor) -> Tensor:
        y = self.relu(x)
        x += 1
        return self.b(y) + self.c(x)


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


class Counting(Body):
    """Leaves traces of being run, in training above all."""

    def __init__(self) -> None:
        super().__init__(nn.ReLU())
        self.calls, self.seen = 0, None

    def middle(self, x: Tensor) -> Tensor:
        self.calls += self.training
        self.seen = x
        return super().middle(x)


def _hooked(register: str) -> nn.Module:
    relu = nn.ReLU()
    getattr(relu, register)(lambda *_: None)
    return relu


HOOKS = (
    "register_forward_hook", "register_forward_pre_hook", "register_full_backward_hook",
    "register_full_backward_pre_hook",
)  # fmt: skip


LEFT = {
    "called twice": Twice(nn.ReLU()),
    "two readers": Branch(nn.ReLU()),
    "in place of what is read": Before(nn.ReLU(inplace=True)),
    "of what changes in place": Before(nn.ReLU()),
    "training reads it": Head(nn.ReLU()),
    "behind a sum": Sum(nn.ReLU(inplace=True)),
    "a function": Function(nn.ReLU()),
    **{register: Body(_hooked(register)) for register in HOOKS},
    "of another class": Body(nn.LeakyReLU()),
    "of its own": Body(Own()),
}


@pytest.mark.parametrize("kind", LEFT)
def test_a_relu_that_something_else_depends_on_stays(kind):
    assert absorbable(LEFT[kind]) == {}


@pytest.mark.parametrize(("model", "limit"), [(Body(nn.ReLU()), math.inf), (Body(nn.ReLU6(inplace=True)), 6.0)])
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
    net = sbs.prepare(model, sbs.SearchSpace(), torch.zeros(1, 3, 32, 32), absorb_relus=True)
    assert sum(isinstance(m, AbsorbedReLU) for m in net.modules()) == count
    assert net.model.state_dict().keys() >= model.state_dict().keys()


def test_activations_in_full_precision_keep_their_relus():
    space = sbs.SearchSpace(weight_bits=(32,), activation_bits=(32,))
    net = sbs.prepare(networks.Inverted(), space, IMAGE, absorb_relus=True)
    absorbed = [name for name, m in net.model.named_modules() if isinstance(m, AbsorbedReLU)]
    assert absorbed == [], "first and last layers have 8 bits, but no ReLU of theirs is read by them alone"
    assert all(layer.settings.relu is None for _, layer in net.layers())


def _step(net: nn.Module, x: Tensor) -> dict[str, Tensor]:
    F.cross_entropy(net(x), torch.arange(len(x)) % 5).backward()
    grads = {name: p.grad.clone() for name, p in net.named_parameters() if p.grad is not None}
    sbs.after_step(net)
    return grads | {name: b.clone() for name, b in net.named_buffers()}


@pytest.mark.parametrize("kind", ["inverted", "residual"])
def test_calibration_search_and_compression_are_the_same_without(kind):
    """To the last bits of float64, statistics of calibration and of the step included."""
    nets = []
    for absorbs in (True, False):
        torch.manual_seed(0)
        model = networks.USER_NETWORKS[kind]()
        net = states.searched(model, 8, seed=3, dtype=torch.float64, absorb_relus=absorbs, group_size=2)
        nets.append(net.train())
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


def test_a_hook_that_comes_later_sees_what_the_relu_gives():
    net = sbs.prepare(Body(nn.ReLU()), sbs.SearchSpace(), IMAGE, absorb_relus=True)
    sbs.calibrate(net, [networks.images(4, 8, 1)])
    x, seen = networks.images(4, 8, 2), []
    want = net.eval()(x)
    net.model.relu.register_forward_hook(lambda _module, _inputs, output: seen.append(output))
    assert torch.equal(net(x), want)
    assert seen[0].min() == 0


def test_the_model_itself_is_not_run():
    model = Counting().eval()
    assert absorbable(model) == {"b": ("relu", math.inf)}
    assert (model.calls, model.seen, model.training) == (0, None, False)
