"""What is decided by the graph of a user's own network: groups, signs, and what cannot be handled."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import sbs
from sbs.errors import SbsError
from tests.numerics import networks, states
from tests.numerics.chain_networks import CHAINS

SIZE = 8
pytestmark = pytest.mark.filterwarnings("ignore:Body does not call 'b'")


@pytest.mark.parametrize("kind", CHAINS)
def test_groups_and_signs_of_the_small_networks(kind):
    """As derived by hand for the chains of the numerics tests."""
    hand = CHAINS[kind]
    graph = sbs.prepare(networks.USER_NETWORKS[kind](), sbs.SearchSpace(), torch.zeros(1, 3, SIZE, SIZE)).graph
    assert tuple(layer.name for layer in graph.layers) == hand.order
    assert {layer.name for layer in graph.layers if layer.signed} == hand.signed
    assert {g.root: (g.root, *g.followers) for g in graph.groups} == hand.groups
    consumers = {(c, g.root) for g in graph.groups for c in g.consumers}
    assert consumers == {(c, r) for c, r in hand.sources.items() if c not in hand.groups[r]}


class Body(nn.Module):
    """conv a -> `middle` -> mean over the pixels -> linear; each test puts one thing in the middle."""

    def __init__(
        self, middle: Callable[[Body, Tensor], Tensor], features: int = 8, *, flat: bool = False, **modules: nn.Module
    ):
        super().__init__()
        self.flat = flat  # whether the middle ends in features instead of maps
        self.a, self.b, self.middle = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1), middle
        self.fc = nn.Linear(features, 5)
        for name, module in modules.items():
            self.add_module(name, module)

    def forward(self, x: Tensor) -> Tensor:
        x = self.middle(self, F.relu(self.a(x)))
        return self.fc(x if self.flat else x.mean((2, 3)))


def _control(_: Body, x: Tensor) -> Tensor:
    return x if x.sum() > 0 else -x


REFUSED = {
    "transposed": (Body(lambda s, x: s.up(x), up=nn.ConvTranspose2d(8, 8, 2, 2)), r"'up' \(ConvTranspose2d\)"),
    "recurrent": (Body(lambda s, x: s.rnn(x.mean((2, 3)))[0], flat=True, rnn=nn.LSTM(8, 8)), r"'rnn' \(LSTM\)"),
    "layer norm": (Body(lambda s, x: s.norm(x), norm=nn.LayerNorm([8, SIZE, SIZE])), r"'norm' \(LayerNorm\)"),
    "functional": (Body(lambda s, x: F.conv2d(x, s.b.weight)), r"conv2d"),
    "concatenation": (Body(lambda s, x: torch.cat([x, s.b(x)], 1), 16), r"cat"),
    "matrix product": (Body(lambda s, x: x @ x), r"matmul"),
    "shared": (Body(lambda s, x: s.b(F.relu(s.b(x)))), r"'b' \(Conv2d\).*more than once"),
    "circular": (Body(lambda s, x: s.c(x), c=nn.Conv2d(8, 8, 3, padding=1, padding_mode="circular")), r"'c'.*circular"),
    "control flow": (Body(_control), r"Body.*control flow"),
    "padding in a word": (Body(lambda s, x: s.c(x), c=nn.Conv2d(8, 8, 3, padding="same")), r"'c'.*padding='same'"),
    "linear over maps": (Body(lambda s, x: s.c(x), c=nn.Linear(SIZE, SIZE)), r"'c' \(Linear\).*flatten it"),
    "shared norm": (Body(lambda s, x: s.n(s.b(s.n(x))), n=nn.BatchNorm2d(8, affine=False)), r"'n'.*more than once"),
    "indices": (Body(lambda s, x: s.p(x)[0], p=nn.MaxPool2d(2, return_indices=True)), r"'p' \(MaxPool2d\).*several"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_handled_is_refused_by_name_and_reason(case):
    model, named = REFUSED[case]
    with pytest.raises(SbsError, match=f"(?s){named}"):
        sbs.prepare(model, sbs.SearchSpace(), torch.zeros(2, 3, SIZE, SIZE))


def test_a_network_without_layers_is_refused():
    with pytest.raises(SbsError, match="Sequential"):
        sbs.prepare(nn.Sequential(nn.Flatten(), nn.ReLU()), sbs.SearchSpace(), torch.zeros(2, 3, SIZE, SIZE))


def _flat(width: int) -> nn.Linear:
    return nn.Linear(width, 8)


# what stands in the middle, and whether the channels of `a` may be pruned (None: either answer is right)
ACCEPTED = {
    "consumer": (Body(lambda s, x: F.relu(s.b(x))), True),
    "two consumers": (Body(lambda s, x: F.relu(s.b(x) + s.c(x)), c=nn.Conv2d(8, 8, 1)), True),
    "residual": (Body(lambda s, x: F.relu(s.b(x) + x)), False),
    "in-place residual": (Body(lambda s, x: F.relu(s.b(x).add_(x))), False),
    "group norm": (Body(lambda s, x: s.norm(x), norm=nn.GroupNorm(2, 8)), False),
    "grouped": (Body(lambda s, x: F.relu(s.c(x)), c=nn.Conv2d(8, 8, 3, padding=1, groups=2)), False),
    "depth-wise": (Body(lambda s, x: F.relu(s.c(x)), c=nn.Conv2d(8, 8, 3, padding=1, groups=8)), True),
    "depth-wise twice": (
        Body(
            lambda s, x: F.relu(s.d(s.c(x))),
            c=nn.Conv2d(8, 8, 3, padding=1, groups=8),
            d=nn.Conv2d(8, 8, 3, padding=1, groups=8),
        ),
        True,
    ),
    "multiplier": (Body(lambda s, x: F.relu(s.c(x)), 16, c=nn.Conv2d(8, 16, 3, padding=1, groups=8)), False),
    "gated product": (Body(lambda s, x: x * torch.sigmoid(s.b(x))), False),
    "flatten": (Body(lambda s, x: F.relu(s.c(torch.flatten(x, 1))), flat=True, c=_flat(512)), True),
    "view": (Body(lambda s, x: F.relu(s.c(x.view(x.size(0), -1))), flat=True, c=_flat(512)), True),
    "view in figures": (Body(lambda s, x: F.relu(s.c(x.view(-1, 512))), flat=True, c=_flat(512)), None),
    "mean over channels": (Body(lambda s, x: F.relu(s.c(x.mean(1).flatten(1))), flat=True, c=_flat(64)), False),
    "mean over rows": (Body(lambda s, x: F.relu(s.c(x.mean(2).flatten(1))), flat=True, c=_flat(64)), True),
    "slice": (Body(lambda s, x: F.relu(s.c(x[:, :4])), c=nn.Conv2d(4, 8, 1)), False),
    "reshaped channels": (Body(lambda s, x: F.relu(s.c(x.view(x.size(0), 4, 16, 8))), c=nn.Conv2d(4, 8, 1)), False),
    "norm behind the activation": (Body(lambda s, x: F.relu(s.b(s.norm(x))), norm=nn.BatchNorm2d(8)), True),
    "pooling": (Body(lambda s, x: F.relu(s.b(F.max_pool2d(F.avg_pool2d(x, 2), 2)))), True),
    "dropout": (Body(lambda s, x: F.relu(s.b(F.dropout(x, 0.5, s.training)))), True),
    "silu": (Body(lambda s, x: s.act(s.b(s.act(x))), act=nn.SiLU()), True),
    "squeeze and excitation": (
        Body(lambda s, x: F.relu(s.b(torch.mul(x, torch.sigmoid(s.c(x.mean((2, 3), True)))))), c=nn.Conv2d(8, 8, 1)),
        False,
    ),
    "norm of flat maps": (
        Body(lambda s, x: F.relu(s.c(s.n(x.flatten(1)))), flat=True, c=_flat(512), n=nn.BatchNorm1d(512)),
        False,
    ),
    "halves of images": (
        Body(lambda s, x: F.relu(s.c(x.view(x.size(0) * 2, -1)).view(x.size(0), -1)), 16, flat=True, c=_flat(256)),
        False,
    ),
}


@pytest.mark.parametrize("case", ACCEPTED)
def test_pruning_follows_the_graph_and_the_compressed_network_computes_the_same(case):
    model, prunable = ACCEPTED[case]
    net = states.searched(model, SIZE, seed=11, group_size=2, max_prune_share=0.8)
    if prunable is not None:
        assert ("a" in {g.root for g in net.graph.groups}) is prunable
    x = networks.images(4, SIZE, 3)
    with torch.no_grad():
        want, got = net.eval()(x), sbs.compress(net, sbs.freeze(net)).eval()(x)
    assert torch.equal(want, got)


def test_every_consumer_of_a_possibly_negative_value_is_signed():
    signs = {
        "relu": (Body(lambda s, x: F.relu(s.b(x))), False),
        "norm": (Body(lambda s, x: F.relu(s.b(s.norm(x))), norm=nn.BatchNorm2d(8)), True),
        "sum with a signed value": (Body(lambda s, x: F.relu(s.b(x + s.c(x))), c=nn.Conv2d(8, 8, 1)), True),
        "sum of two relus": (Body(lambda s, x: F.relu(s.b(x + F.relu(s.c(x)))), c=nn.Conv2d(8, 8, 1)), False),
        "pooled relu": (Body(lambda s, x: F.relu(s.b(F.avg_pool2d(x, 2)))), False),
        "silu": (Body(lambda s, x: F.relu(s.b(F.silu(s.c(x)))), c=nn.Conv2d(8, 8, 1)), True),
        "sigmoid": (Body(lambda s, x: F.relu(s.b(torch.sigmoid(s.c(x)))), c=nn.Conv2d(8, 8, 1)), False),
        "product": (Body(lambda s, x: F.relu(s.b(x * torch.sigmoid(s.c(x)))), c=nn.Conv2d(8, 8, 1)), False),
        "product with a signed value": (Body(lambda s, x: F.relu(s.b(x * s.c(x))), c=nn.Conv2d(8, 8, 1)), True),
        "negated": (Body(lambda s, x: F.relu(s.b(x * -1.0))), True),
        "added to in place": (Body(lambda s, x: (x.add_(s.c(x)), F.relu(s.b(x)))[1], c=nn.Conv2d(8, 8, 1)), True),
        "a view added to in place": (
            Body(lambda s, x: (x.flatten(1).add_(s.c(x).flatten(1)), F.relu(s.b(x)))[1], c=nn.Conv2d(8, 8, 1)),
            True,
        ),
    }
    for case, (model, signed) in signs.items():
        net = sbs.prepare(model, sbs.SearchSpace(), torch.zeros(2, 3, SIZE, SIZE))
        assert net.graph.layer("b").signed is signed, case
        assert net.graph.layer("a").signed, "an image has negative values"


def test_a_norm_of_the_image_leaves_the_first_layer_the_first():
    model = nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU())
    model.extend([nn.Flatten(), nn.Linear(8 * (SIZE - 4) ** 2, 5)])
    net = sbs.prepare(model, sbs.SearchSpace(), torch.zeros(2, 3, SIZE, SIZE))
    assert net.searched == ("3",)
    assert net.graph.layer("1").signed


@pytest.mark.parametrize("example", [torch.zeros(3, SIZE, SIZE), (1, 3, SIZE, SIZE), torch.zeros(())], ids=str)
def test_an_example_that_is_no_batch_is_refused(example):
    with pytest.raises(SbsError, match=r"example_input is .*give a batch of images, a tensor \(N, C, H, W\)"):
        sbs.prepare(Body(lambda s, x: F.relu(s.b(x))), sbs.SearchSpace(), example)


def test_an_example_that_does_not_fit_is_refused_with_torchs_reason_alone(capfd):
    with pytest.raises(SbsError, match="expected input.*to have 3 channels, but got 5 channels instead") as refused:
        sbs.prepare(Body(lambda s, x: F.relu(s.b(x))), sbs.SearchSpace(), torch.zeros(2, 5, SIZE, SIZE))
    assert "ShapeProp" not in str(refused.value)
    assert capfd.readouterr().err == ""


class Headless(nn.Module):
    """Three residual blocks, the second with a projection; each test ends it in its own way."""

    def __init__(self, end: Callable[[Headless, Tensor], Tensor | tuple[Tensor, ...]], **modules: nn.Module):
        super().__init__()
        self.end = end
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        for i in range(3):
            self.add_module(f"a{i}", nn.Conv2d(8, 8, 3, padding=1))
            self.add_module(f"b{i}", nn.Conv2d(8, 8, 3, padding=1))
        self.short = nn.Conv2d(8, 8, 1)
        for name, module in modules.items():
            self.add_module(name, module)

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, ...]:
        x = F.relu(self.stem(x))
        x = F.relu(x + self.b0(F.relu(self.a0(x))))
        x = F.relu(self.short(x) + self.b1(F.relu(self.a1(x))))
        x = F.relu(x + self.b2(F.relu(self.a2(x))))
        return self.end(self, x)


ENDS = {
    "maps": (Headless(lambda s, x: x), {"b2"}),
    "pooled": (Headless(lambda s, x: x.mean((2, 3))), {"b2"}),
    "projection at the end": (
        Headless(lambda s, x: F.relu(s.c(x) + s.d(x)), c=nn.Conv2d(8, 8, 1), d=nn.Conv2d(8, 8, 3, padding=1)),
        {"c", "d"},
    ),
    "classifier": (Headless(lambda s, x: s.fc(x.mean((2, 3))), fc=nn.Linear(8, 5)), {"fc"}),
    "two heads": (
        Headless(lambda s, x: (s.c(x), s.fc(x.mean((2, 3)))), c=nn.Conv2d(8, 8, 1), fc=nn.Linear(8, 5)),
        {"c", "fc"},
    ),
    "a head that another one reads": (
        Headless(lambda s, x: (y := s.c(x), s.d(F.relu(y))), c=nn.Conv2d(8, 8, 1), d=nn.Conv2d(8, 8, 1)),
        {"c", "d"},
    ),
    "plus a constant": (Headless(lambda s, x: s.c(x) + 1.0, c=nn.Conv2d(8, 8, 1)), {"c"}),
}


@pytest.mark.parametrize("case", ENDS)
def test_last_are_the_layers_that_end_a_path_not_all_that_add_to_the_result(case):
    """By hand: in a residual network without a classifier every block adds to the result, one ends it."""
    model, last = ENDS[case]
    net = sbs.prepare(model, sbs.SearchSpace(), torch.zeros(2, 3, SIZE, SIZE))
    assert {layer.name for layer in net.graph.layers if layer.edge} == {"stem"} | last
    assert set(net.searched) == {layer.name for layer in net.graph.layers} - {"stem"} - last
    assert not {g.root for g in net.graph.groups} & last  # channels that reach the result are never pruned
