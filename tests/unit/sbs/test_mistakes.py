"""What a person can get wrong in a call is answered with what is wanted."""

from typing import Any

import pytest
import torch
from torch import nn

import sbs
from tests.unit.sbs.test_robustness import Leaky
from tests.unit.sbs.test_robustness import _image as image
from tests.unit.sbs.test_robustness import _searching as searching

MISTAKES: dict[str, tuple[Any, str]] = {
    "freeze": (lambda net: sbs.freeze(Leaky()), r"freeze\(\) takes the super-network.*not a Leaky"),
    "telemetry": (lambda net: sbs.telemetry(Leaky()), r"telemetry\(\) takes the super-network.*not a Leaky"),
    "land": (lambda net: sbs.land(Leaky(), 1e6), r"land\(\) takes the super-network.*not a Leaky"),
    "penalty": (lambda net: sbs.bop_penalty(Leaky()), r"bop_penalty\(\) takes the super-network.*not a Leaky"),
    "no network": (lambda net: sbs.freeze({}), "a network .* is wanted here, not a dict"),
    "policy's file": (lambda net: sbs.compress(net, "p.json"), r"takes a Policy, not 'p\.json'.*Policy\.load"),
    "no space": (lambda net: sbs.prepare(Leaky(), None, image()), r"takes a SearchSpace.*not None"),
    "prepared twice": (lambda net: sbs.prepare(net, sbs.SearchSpace(), image()), "is a super-network already"),
    "nothing to count": (lambda net: sbs.cost(nn.Identity(), (3, 8, 8)), "Identity has no parameters"),
    "a layer for a network": (
        lambda _: sbs.prepare(nn.Linear(3, 2), sbs.SearchSpace(), torch.zeros(1, 3)),
        "lone Linear",
    ),
    "nothing to compress": (lambda net: sbs.compress(nn.Identity(), sbs.freeze(net)), "Identity has no parameters"),
    "one size": (lambda net: sbs.cost(Leaky(), 16), r"input_shape=16: give \(channels, height, width\)"),
    "a share in words": (lambda net: sbs.SearchSpace(max_prune_share="half"), "max_prune_share='half'"),
    "half bits": (lambda net: sbs.Policy.uniform(Leaky(), image(), 2.5, 4), r"weight_bits=2\.5; use an int, 1 to 16"),
    "bits that are true": (lambda net: sbs.Policy.uniform(Leaky(), image(), 4, True), "activation_bits=True"),
    "images and labels": (lambda net: sbs.calibrate(net, [(image(), 1)]), "got a tuple: of a loader .* for images"),
    "one tensor": (lambda net: sbs.calibrate(net, image()), r"list of batches.*\[images\]"),
    "whole numbers": (
        lambda net: net((9 * image()).to(torch.uint8)),
        r"input of torch\.uint8: give images as float",
    ),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_mistakes_are_answered_with_what_is_wanted(case: str):
    call, message = MISTAKES[case]
    with pytest.raises(sbs.SbsError, match=message):
        call(searching())
