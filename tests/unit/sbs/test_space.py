"""What a search space accepts beside its bit-widths (those are tested in numerics/test_search_space.py)."""

from __future__ import annotations

import pytest

import sbs
from sbs.errors import SbsError


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("group_size", 0),
        ("group_size", -4),
        ("group_size", 2.5),
        ("max_prune_share", 1.0),
        ("max_prune_share", -0.1),
        ("edge_bits", 0),
        ("edge_bits", 99),
    ],
)
def test_what_makes_no_sense_is_refused_with_its_key_and_value(key, value):
    with pytest.raises(SbsError, match=f"{key}.*{value}"):
        sbs.SearchSpace(**{key: value})


def test_a_space_is_frozen_and_comparable():
    assert sbs.SearchSpace() == sbs.SearchSpace(weight_bits=(2, 4, 8), activation_bits=(2, 4, 8), prune=True)
    with pytest.raises(AttributeError):
        sbs.SearchSpace().prune = False
