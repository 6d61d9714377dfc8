"""Convolutions in 8-bit integers: exact against wider types, equal to floating point to the bit, refused elsewhere.

Exact arithmetic also stands in for the one call that needs the instructions: all around it is tested on any CPU.
"""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

import sbs
from sbs import integer
from sbs.integer import Geometry
from tests.numerics import networks, states

SIZE = 24
needs_instructions = pytest.mark.skipif(not integer.available(), reason="this CPU has no VNNI instructions")


def _exactly(x: torch.Tensor, w: torch.Tensor, geometry: Geometry, factor: float = 1.0) -> torch.Tensor:
    """What oneDNN computes for a uint8 and an int8 tensor; float64 holds every sum."""
    assert (x.dtype, w.dtype) == (torch.uint8, torch.int8)
    y = F.conv2d(x.double(), w.double(), None, *geometry)
    return (factor * y.float()).contiguous(memory_format=torch.channels_last)


@pytest.fixture(params=[pytest.param("oneDNN", marks=needs_instructions), "stand-in"])
def multiplier(request: pytest.FixtureRequest) -> Iterator[None]:
    """Who multiplies the bytes: one test at a time, so that those without it have the machine's own way."""
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "stand-in":
            patch.setattr(integer, "_convolve", _exactly)
            patch.setattr(integer, "available", lambda: True)
        yield


with_bytes = pytest.mark.usefixtures("multiplier")


def _codes(shape: tuple[int, ...], levels: int, generator: torch.Generator) -> torch.Tensor:
    return torch.randint(0, levels + 1, shape, generator=generator)


@st.composite
def geometries(draw) -> tuple[Geometry, tuple[int, int]]:
    """A geometry and the size of its window."""
    pairs = st.lists(st.integers(1, 3), min_size=2, max_size=2)
    window = tuple(draw(pairs))
    padding = draw(st.lists(st.integers(0, 2), min_size=2, max_size=2))
    return Geometry(draw(pairs), padding, draw(pairs), 1), window


@with_bytes
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    chosen=geometries(),
    levels=st.sampled_from([1, 3, 7, 15, 63, 127, 255]),
    widths=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    extreme=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_convolution_of_codes_is_exact(chosen, levels, widths, extreme, seed):
    """Against float64, which holds every sum exactly; also where all codes are as large as they can be."""
    (geometry, window), (channels, outputs) = chosen, widths
    generator = torch.Generator().manual_seed(seed)
    x = _codes((2, channels, 9, 11), 255, generator)
    w = 2 * _codes((outputs, channels, *window), levels, generator) - levels
    if extreme:
        x, w = torch.full_like(x, 255), torch.where(w > 0, levels, -levels)
    expected = F.conv2d(x.double(), w.double(), None, *geometry)
    found = integer.convolve(
        x.to(torch.uint8).contiguous(memory_format=torch.channels_last), w.float(), levels, geometry
    )
    assert found.dtype == torch.float32
    assert torch.equal(found.double(), expected)


@needs_instructions
@pytest.mark.parametrize("levels", [127, 255])
def test_sums_beyond_float32_are_rounded_once_or_twice(levels):
    """512 channels under 3 x 3: 150 and 300 million, which float32 holds to 16 or 32."""
    x = torch.full((1, 512, 3, 3), 255, dtype=torch.uint8).contiguous(memory_format=torch.channels_last)
    w = torch.full((16, 512, 3, 3), float(levels))
    exact = 512 * 9 * 255 * levels
    found = integer.convolve(x, w, levels, Geometry([1, 1], [0, 0], [1, 1], 1))
    assert (found.double() - exact).abs().max() <= exact * 2.0**-23


def _run(net, x) -> list[torch.Tensor]:
    """The logits and every gradient, statistics and buffers included."""
    net.zero_grad()
    logits = net(x)
    loss = F.cross_entropy(logits, torch.arange(len(x)) % 5)
    if net.training:
        loss = loss + 0.1 * sbs.bop_penalty(net)
    loss.backward()
    if net.training:
        sbs.after_step(net)
    return [logits.detach(), *(p.grad for p in net.parameters() if p.grad is not None), *net.buffers()]


def _searched(train: bool):
    net = states.searched(networks.Inverted(), SIZE, seed=5, group_size=2, absorb_relus=True)
    return net.train(train).to(memory_format=torch.channels_last)


@pytest.fixture
def convolutions(monkeypatch) -> list[int]:
    """The levels of the weights that go through integers."""
    seen: list[int] = []
    convolve = integer.convolve
    monkeypatch.setattr(
        integer, "convolve", lambda x, w, levels, geometry: seen.append(levels) or convolve(x, w, levels, geometry)
    )
    return seen


@with_bytes
@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("compiled", [True, False])
def test_networks_compute_the_same_in_integers_and_in_floats(convolutions, monkeypatch, train, compiled):
    """To the bit: logits, gradients, statistics."""
    x = networks.images(4, SIZE, 3).contiguous(memory_format=torch.channels_last)
    sbs.use_compiled(compiled)
    net = _searched(train)
    other = copy.deepcopy(net)
    found = _run(net, x)
    assert len(convolutions) >= 2
    monkeypatch.setattr(integer, "available", lambda: False)
    expected = _run(other, x)
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)


@with_bytes
@pytest.mark.parametrize("train", [True, False])
def test_what_is_not_a_number_stays_so(train):
    """Integers have no NaN: one pixel of one image must not come out as a code."""
    net = _searched(train)
    x = networks.images(4, SIZE, 3).contiguous(memory_format=torch.channels_last)
    x[1, 0, 3, 3] = float("nan")
    with torch.no_grad():
        logits = net(x)
    assert logits[1].isnan().all()
    if not train:
        assert logits[[0, 2, 3]].isfinite().all()


def _layer(channels: int = 8, **options):
    module = torch.nn.Sequential(
        torch.nn.Conv2d(3, channels, 1), torch.nn.ReLU(), torch.nn.Conv2d(channels, channels, 3, **options)
    )
    return sbs.compress(module, sbs.Policy.uniform(module, torch.zeros(1, 3, SIZE, SIZE), 4, 4))


@with_bytes
@pytest.mark.parametrize(
    ("case", "count"),
    [
        ("channels_last", 1),
        ("contiguous", 0),
        ("few pixels", 0),
        ("depth-wise", 0),
        ("float64", 0),
        ("autocast", 0),
        ("without oneDNN", 0),
    ],
)
def test_integers_serve_where_they_gain(convolutions, monkeypatch, case, count):
    """The rest is left to floating point."""
    net = _layer(groups=8 if case == "depth-wise" else 1)
    x = networks.images(1 if case == "few pixels" else 4, SIZE // 2, 3)
    if case != "contiguous":
        x = x.contiguous(memory_format=torch.channels_last)
    if case == "float64":
        net, x = net.double(), x.double()
    monkeypatch.setattr(torch.backends.mkldnn, "enabled", case != "without oneDNN")
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16, enabled=case == "autocast"):
        net(x)
    assert len(convolutions) == count


@needs_instructions
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_defaults_of_a_program_change_nothing(device):
    """Neither its default type nor its default device."""
    net, x = _layer(), networks.images(4, SIZE // 2, 3).contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        expected = net(x)
        torch.set_default_dtype(torch.float64)
        try:
            with torch.device(device):
                assert integer.available.__wrapped__()
                assert torch.equal(net(x), expected)
        finally:
            torch.set_default_dtype(torch.float32)


@needs_instructions
def test_instructions_that_saturate_are_not_used():
    """oneDNN held to an older instruction set adds pairs of products in 16 bits."""
    program = "from sbs import integer; print(integer.available())"
    given = os.environ | {"ONEDNN_MAX_CPU_ISA": "AVX2"}
    found = subprocess.check_output([sys.executable, "-c", program], env=given, text=True, timeout=120)
    assert found.strip() == "False"
