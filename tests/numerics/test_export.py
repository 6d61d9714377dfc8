"""An exported network really is small, comes back with identical logits, and damaged files are refused."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import sbs
from sbs.errors import SbsError
from sbs.export import pack, unpack
from tests.numerics import networks, states

ZOO = {"resnet20": 16, "resnet18": 32, "mobilenetv2": 32}


def _small(name: str, bits: tuple[int, ...] = (2, 4, 8)) -> tuple[torch.nn.Module, torch.nn.Module, int]:
    size = ZOO[name]
    torch.manual_seed(0)
    model = sbs.models.build(name, 10)
    net = states.searched(model, size, seed=31, weight_bits=bits, activation_bits=bits, group_size=8)
    return sbs.compress(net, sbs.freeze(net)).eval(), sbs.models.build(name, 10), size


def _bytes_by_hand(small: torch.nn.Module) -> float:
    """Weights at their bits; all other numbers (biases, norms, clips) at four bytes."""
    layers = [m for m in small.modules() if isinstance(m, torch.nn.Conv2d | torch.nn.Linear)]
    codes = sum(m.weight.numel() * m.settings.weight_bits[-1] / 8 for m in layers)
    weights = {id(m.weight) for m in layers}
    others = [p for p in small.parameters() if id(p) not in weights]
    others += [b for n, b in small.named_buffers() if "running_" in n]
    return codes + 4 * sum(t.numel() for t in others)


@pytest.mark.parametrize("name", ZOO)
def test_file_has_the_size_of_the_cost_report_and_identical_logits(name, tmp_path):
    small, fresh, size = _small(name)
    path = tmp_path / "net.sbs"
    sbs.export(small, path)
    promised = sbs.cost(small, (3, size, size)).bytes
    assert path.stat().st_size == pytest.approx(promised, rel=0.05)
    assert promised == pytest.approx(_bytes_by_hand(small), rel=0.05)
    x = networks.images(4, size, 1)
    again = sbs.load_exported(path, fresh, torch.zeros(1, 3, size, size)).eval()
    with torch.no_grad():
        assert torch.equal(again(x), small(x))


def test_a_lower_policy_is_a_smaller_file(tmp_path):
    model = networks.randomise(sbs.models.build("resnet20", 10), 1)
    x = networks.images(4, 16, 1)
    sizes = {}
    for bits in (2, 4, 8):
        small = sbs.compress(model, sbs.Policy.uniform(model, x, bits, bits), example_input=x, calibration=[x])
        sbs.export(small, tmp_path / f"{bits}.sbs")
        sizes[bits] = (tmp_path / f"{bits}.sbs").stat().st_size
    full = sum(p.numel() for p in model.parameters()) * 4
    assert sizes[2] < sizes[4] < sizes[8] < full / 3
    assert sizes[8] - sizes[4] == pytest.approx(full / 8, rel=0.1)  # half a byte per weight


@settings(max_examples=150, deadline=None)
@given(bits=st.integers(1, 16), values=st.lists(st.integers(0, 2**16 - 1), min_size=1, max_size=70))
def test_packing_is_dense_and_reversible(bits, values):
    values = torch.tensor([v % 2**bits for v in values], dtype=torch.int64)
    data = pack(values, bits)
    assert len(data) == -(-len(values) * bits // 8)
    assert torch.equal(unpack(data, bits, len(values)), values)


def test_three_bit_codes_by_hand():
    """5, 1, 6 -> 101 001 110 read from the lowest bit up: byte 0 is 10001101, byte 1 the ninth bit."""
    assert pack(torch.tensor([5, 1, 6]), 3) == bytes([0b10001101, 0b1])


@pytest.fixture
def exported(tmp_path):
    small, _, size = _small("resnet20")
    path = tmp_path / "net.sbs"
    sbs.export(small, path)
    return path, size


@pytest.mark.parametrize("keep", [0, 5, 40, -1])
def test_a_file_cut_off_is_refused_by_name(exported, keep):
    path, size = exported
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(SbsError, match=r"net\.sbs"):
        sbs.load_exported(path, sbs.models.build("resnet20", 10), torch.zeros(1, 3, size, size))


def test_a_file_of_another_network_or_of_another_kind_is_refused(exported, tmp_path):
    path, size = exported
    with pytest.raises(SbsError):
        sbs.load_exported(path, sbs.models.build("resnet32", 10), torch.zeros(1, 3, size, size))
    (tmp_path / "other.sbs").write_text("not a network of ours, but long enough to have a header")
    with pytest.raises(SbsError, match=r"other\.sbs"):
        sbs.load_exported(tmp_path / "other.sbs", sbs.models.build("resnet20", 10), torch.zeros(1, 3, size, size))


class Around(torch.nn.Module):
    """Two branches and what is between them, of which a variant has one thing changed."""

    def __init__(self, kind: str = ""):
        super().__init__()
        self.kind = kind
        wide = 2 if kind == "dilation" else 1
        self.a = torch.nn.Conv2d(3, 8, 3, padding=wide, dilation=wide)
        self.b, self.c = torch.nn.Conv2d(8, 8, 1), torch.nn.Conv2d(8, 8, 1)
        self.norm = torch.nn.BatchNorm2d(8, eps=0.1 if kind == "eps" else 1e-5)
        if kind == "synchronised":
            self.norm = torch.nn.SyncBatchNorm(8)
        self.relu = torch.nn.ReLU6() if kind == "activation" else torch.nn.ReLU()
        self.leaky = torch.nn.LeakyReLU(0.5 if kind == "slope" else 0.01)
        self.drop = torch.nn.Identity() if kind == "no dropout" else torch.nn.Dropout(0.1)
        self.pool = torch.nn.MaxPool2d(3, 2, 1) if kind == "pool" else torch.nn.MaxPool2d(2, 2)
        self.fc = torch.nn.Linear(8, 5)

    def forward(self, x):
        before = self.norm(self.a(x if self.kind != "constant" else x + 0.5))
        y = torch.relu(before) if self.kind == "function" else self.relu(before)
        z = self.leaky(self.b(y))
        z = self.c(z) + (before if self.kind == "wiring" else y)
        return self.fc(self.drop(self.pool(z)).mean((2, 3)))


SAME = ("same", "synchronised", "function", "no dropout")
OTHER = ("dilation", "eps", "activation", "slope", "pool", "constant", "wiring")


@pytest.mark.parametrize("kind", [*SAME, *OTHER])
def test_a_network_that_computes_something_else_around_its_layers_is_refused(kind, tmp_path):
    net = states.searched(Around(), 8, seed=3, group_size=2)
    small = sbs.compress(net, sbs.freeze(net)).eval()
    sbs.export(small, tmp_path / "net.sbs")
    x = networks.images(4, 8, 1)
    if kind in OTHER:
        with pytest.raises(SbsError, match=r"net\.sbs: the network that was exported computes something else"):
            sbs.load_exported(tmp_path / "net.sbs", Around(kind), x)
    else:
        assert torch.equal(sbs.load_exported(tmp_path / "net.sbs", Around(kind), x)(x), small(x))


def test_what_cannot_be_traced_is_exported_all_the_same(tmp_path):
    """A network in whose block somebody looks at values, say."""
    net = states.searched(networks.Plain(), 8, seed=3, group_size=2)
    small = sbs.compress(net, sbs.freeze(net)).eval()
    hook = small.features.register_forward_hook(lambda _, x, y: float(y.sum()) and None)
    with pytest.warns(UserWarning, match="what Plain does around its layers goes unchecked"):
        sbs.export(small, tmp_path / "net.sbs")
    hook.remove()
    x = networks.images(4, 8, 1)
    assert torch.equal(sbs.load_exported(tmp_path / "net.sbs", networks.Plain(), x)(x), small(x))


def test_a_loaded_network_is_for_inference_until_other_weights_are_loaded(tmp_path):
    net = states.searched(networks.Residual(), 8, seed=3, group_size=2)
    policy = sbs.freeze(net)
    small = sbs.compress(net, policy).eval()
    sbs.export(small, tmp_path / "net.sbs")
    x = networks.images(4, 8, 1)
    loaded = sbs.load_exported(tmp_path / "net.sbs", networks.Residual(), x)
    with pytest.raises(SbsError, match="exported file and is for inference alone: take the one"):
        sbs.compress(loaded, policy)
    with pytest.raises(SbsError, match="exported file and is for inference alone: take the one"):
        sbs.prepare(loaded, sbs.SearchSpace(), x)
    loaded.load_state_dict(loaded.state_dict())
    loaded.load_state_dict({"fc.bias": loaded.fc.bias}, strict=False)
    assert torch.equal(loaded(x), small(x))
    loaded.requires_grad_(True)
    with pytest.raises(SbsError, match="exported file and is for inference alone: to go on training"):
        loaded(x)
    with torch.no_grad():
        for p in small.parameters():
            p.mul_(1.1)
        loaded.load_state_dict(small.state_dict())
        assert torch.equal(loaded(x), small(x))
    loaded(x).sum().backward()


def test_buffers_of_whole_numbers_are_exported(tmp_path):
    model = networks.Residual()
    model.register_buffer("seen", torch.tensor([3, -5]))
    model.register_buffer("mask", torch.tensor([True, False, True]))
    x = networks.images(4, 8, 1)
    small = sbs.compress(model, sbs.Policy.uniform(model, x, 4, 4), calibration=[x])
    sbs.export(small, tmp_path / "net.sbs")
    fresh = networks.Residual()
    fresh.register_buffer("seen", torch.zeros(2, dtype=torch.int64))
    fresh.register_buffer("mask", torch.zeros(3, dtype=torch.bool))
    loaded = sbs.load_exported(tmp_path / "net.sbs", fresh, x)
    assert loaded.seen.tolist() == [3, -5]
    assert loaded.mask.tolist() == [True, False, True]


def test_damaged_bytes_never_pass_as_another_error(exported):
    """Bytes of the head and of the payload flipped in turn: refused in our words, or a network all the same."""
    path, size = exported
    data = path.read_bytes()
    model = sbs.models.build("resnet20", 10)
    refused = 0
    for position in [*range(0, 120, 5), len(data) // 2, len(data) - 1]:
        path.write_bytes(data[:position] + bytes([data[position] ^ 0xFF]) + data[position + 1 :])
        try:
            sbs.load_exported(path, model, torch.zeros(1, 3, size, size))
        except SbsError:
            refused += 1
    assert refused >= 20


def test_a_float_network_is_not_exported(tmp_path):
    with pytest.raises(SbsError):
        sbs.export(networks.Residual(), tmp_path / "float.sbs")
