"""The oracle is checked first: rationals, autograd chain and NumPy closed form must agree with each other."""

from __future__ import annotations

import subprocess
import sys
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.numerics import oracle, tables

VALID_SETS = [(2, 4, 8), (1, 2, 4, 8), (4, 8), (2, 4, 8, 16), (1, 3), (3, 6), (2, 6), (8,)]


@settings(max_examples=150, deadline=None)
@given(
    bits=st.sampled_from(VALID_SETS),
    signed=st.booleans(),
    clip=st.floats(0.05, 3.0),
    seed=st.integers(0, 2**31),
)
def test_autograd_chain_equals_the_closed_form(bits, signed, clip, seed):
    rng = np.random.default_rng(seed)
    x = rng.normal(0, 1.5, size=(3, 4, 5))
    x[0, 0, :3] = 0.0, clip, -clip if signed else clip / 2  # on the closed ends of the interval
    grad = rng.normal(size=x.shape)
    statistics = rng.uniform(0, 3, size=len(bits) - 1)
    thresholds = np.where(rng.random(len(statistics)) < 0.3, statistics, rng.uniform(0, 3, size=len(statistics)))
    want = oracle.closed_form(
        x, grad, clip, thresholds.tolist(), list(bits), statistics=statistics.tolist(), signed=signed
    )

    tx = torch.tensor(x, requires_grad=True)
    tv = torch.tensor(clip, dtype=torch.float64, requires_grad=True)
    ta = torch.tensor(thresholds, requires_grad=True)
    out = oracle.chain_quantiser(tx, tv, ta, torch.tensor(statistics), bits, signed=signed)
    out.backward(torch.tensor(grad))
    np.testing.assert_allclose(out.detach().numpy(), want.value, rtol=0, atol=1e-12)
    np.testing.assert_allclose(tx.grad.numpy(), want.input, rtol=1e-12, atol=1e-12)
    assert tv.grad.item() == pytest.approx(want.clip, rel=1e-10, abs=1e-10)
    if len(bits) > 1:
        np.testing.assert_allclose(ta.grad.numpy(), want.thresholds, rtol=1e-10, atol=1e-12)


@settings(max_examples=200, deadline=None)
@given(bits=st.sampled_from(VALID_SETS), numerator=st.integers(0, 10**6))
def test_float_grids_equal_exact_rationals_away_from_ties(bits, numerator):
    z = Fraction(numerator, 10**6)
    value = np.array([float(z)])
    if oracle.distance_to_tie(value, bits)[0] < 1e-9:
        return
    nested = oracle.exact_nested(z, bits)
    assert nested == [oracle.exact_quantise(z, b) for b in bits]
    for b, exact in zip(bits, nested, strict=True):
        assert float(exact) == pytest.approx(oracle.quantise(torch.tensor(value), b).item(), abs=1e-12)


def test_exact_ties_are_where_direct_and_nested_quantisation_part():
    """Why the nesting test leaves ties out: there half-to-even may pick the other of two equally near grid points."""
    assert oracle.round_half_even(Fraction(1, 2)) == 0
    assert oracle.round_half_even(Fraction(3, 2)) == 2
    for bits in [(2, 4), (4, 8), (1, 2)]:
        ties = [Fraction(2 * i + 1, 2 * oracle.levels(bits[1])) for i in range(oracle.levels(bits[1]))]
        off = [t for t in ties if oracle.exact_nested(t, bits)[-1] != oracle.exact_quantise(t, bits[-1])]
        worst = max((abs(oracle.exact_nested(t, bits)[-1] - t) for t in ties), default=Fraction(0))
        assert worst == Fraction(1, 2 * oracle.levels(bits[1]))  # still a nearest grid point, just the other one
        assert off, bits


def test_a_full_uniform_tensor_has_statistic_one():
    z = torch.linspace(0, 1, 1_000_003, dtype=torch.float64)
    assert oracle.residual_statistics(z, (2, 4, 8)).tolist() == pytest.approx([1.0, 1.0], rel=1e-3)


@pytest.mark.parametrize("reference", tables.REFERENCES, ids=lambda r: r.name)
def test_shape_tables_give_the_published_figures(reference):
    assert sum(row.macs for row in reference.rows) == reference.macs
    assert reference.macs * 1024 / 1e9 == pytest.approx(reference.gbops, abs=reference.gbops_unit / 2)
    if reference.name in tables.PARAMETERS:
        assert sum(row.params for row in reference.rows) == tables.PARAMETERS[reference.name]


def test_effective_bits_takes_the_selected_width_and_hand_computed_slopes():
    gates = torch.tensor([1.0, 0.0], dtype=torch.float64, requires_grad=True)
    bits = oracle.effective_bits(list(gates), (2, 4, 8))
    bits.backward()
    assert bits.item() == 4.0
    assert gates.grad.tolist() == [2.0, 4.0]


def test_the_oracle_shares_no_code_with_the_product():
    command = [
        sys.executable,
        "-c",
        "import sys, tests.numerics.oracle, tests.numerics.tables; print('sbs' in sys.modules)",
    ]
    assert subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout.strip() == "False"
