"""Which bit-widths may share one path: valid sets are accepted and nest exactly, every other is refused by name."""

from __future__ import annotations

import itertools
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn

import sbs
from sbs.errors import SbsError
from sbs.layers import QuantSettings, from_float
from tests.numerics import oracle

WIDTHS = range(1, 17)


def _chains() -> list[tuple[int, ...]]:
    """All sets of two to five widths up to 16 in which every width divides the next."""
    sets = [c for n in range(2, 6) for c in itertools.combinations(WIDTHS, n)]
    return [c for c in sets if oracle.first_pair_that_does_not_nest(c) is None]


VALID = _chains()


def test_the_documented_sets_are_among_the_valid_ones():
    assert {(2, 4, 8), (1, 2, 4, 8), (4, 8), (2, 4, 8, 16)} <= set(VALID)
    assert (2, 3) not in VALID


@pytest.mark.parametrize("side", ["weight_bits", "activation_bits"])
def test_every_valid_set_is_accepted(side):
    for bits in VALID:
        assert getattr(sbs.SearchSpace(**{side: bits}), side) == bits


@pytest.mark.parametrize("side", ["weight_bits", "activation_bits"])
def test_every_pair_that_does_not_nest_is_refused_and_named(side):
    refused = [p for p in itertools.product(WIDTHS, WIDTHS) if oracle.first_pair_that_does_not_nest(p) is not None]
    assert len(refused) > 200
    for low, high in refused:
        with pytest.raises(SbsError) as caught:
            sbs.SearchSpace(**{side: (low, high)})
        message = str(caught.value)
        assert side in message
        assert str(low) in message
        assert str(high) in message


@settings(max_examples=200, deadline=None)
@given(bits=st.lists(st.sampled_from(WIDTHS), min_size=3, max_size=5))
def test_longer_sets_are_refused_for_their_first_offending_pair(bits):
    pair = oracle.first_pair_that_does_not_nest(bits)
    if pair is None:
        assert sbs.SearchSpace(weight_bits=tuple(bits)).weight_bits == tuple(bits)
        return
    with pytest.raises(SbsError, match=rf"\b{pair[0]}\b.*\b{pair[1]}\b"):
        sbs.SearchSpace(weight_bits=tuple(bits))


@pytest.mark.parametrize("bits", [(), (0, 2), (2, 4.0), (-2,), (True, 2), (2, 64), (8, 32), ("2", 4)], ids=str)
def test_what_is_no_bit_width_is_refused(bits):
    with pytest.raises(SbsError, match="weight_bits"):
        sbs.SearchSpace(weight_bits=bits)


def _product_grids(z: np.ndarray, bits: tuple[int, ...]) -> list[torch.Tensor]:
    """D(z, s_b) for every b as the product computes it: a linear layer with the identity for weights and clip 1."""
    identity = nn.Linear(len(z), len(z), bias=False, dtype=torch.float64)
    with torch.no_grad():
        identity.weight.copy_(torch.eye(len(z)))
        layers = [from_float(identity, QuantSettings((32,), (b,), signed=False)) for b in bits]
        return [layer(torch.tensor(z)[None])[0] for layer in layers]


@settings(max_examples=150, deadline=None)
@given(bits=st.sampled_from(VALID), seed=st.integers(0, 2**31))
def test_grids_of_the_product_nest(bits, seed):
    """z_b built by re-assignment offsets equals D(z, s_b), and both equal the exact rationals."""
    z = np.random.default_rng(seed).integers(0, 10**6, size=40) / 10**6
    z = z[oracle.distance_to_tie(z, bits) > 1e-9]
    assume(len(z))
    grids = _product_grids(z, bits)
    total = grids[0]
    for width, grid in zip(bits[1:], grids[1:], strict=True):
        total = total + oracle.quantise(torch.tensor(z) - total, width)
        torch.testing.assert_close(total, grid, rtol=0, atol=1e-12)
    for i, value in enumerate(z):
        exact = oracle.exact_nested(Fraction(round(value * 10**6), 10**6), bits)
        assert [float(e) for e in exact] == pytest.approx([g[i].item() for g in grids], abs=1e-12)


def test_rounding_is_half_to_even():
    """z = 1/6, 3/6 and 5/6 are ties of the 2-bit grid (n = 3); all three are exact after multiplication."""
    z = np.array([1 / 6, 3 / 6, 5 / 6])
    assert (z * 3 % 1 == 0.5).all()
    assert (_product_grids(z, (2,))[0] * 3).tolist() == [0.0, 2.0, 2.0]
