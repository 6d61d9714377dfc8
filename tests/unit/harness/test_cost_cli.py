"""`python -m harness cost`: what it refuses, in words that name the file."""

from pathlib import Path

import pytest
import torch

import sbs
from harness.cost_cli import cost
from harness.errors import UserError


def test_a_policy_of_another_network_is_refused_by_file(tmp_path: Path):
    file = tmp_path / "policy.json"
    sbs.Policy.uniform(sbs.models.build("resnet20", 10), torch.zeros(1, 3, 32, 32), 4, 4).save(file)
    options = {"convention": "mac_product", "classes": 10, "image_size": None, "explain": False, "as_json": True}
    cost("resnet20", file, **options)
    with pytest.raises(UserError, match=r"policy\.json: .*--policy takes one of resnet32 with as many classes"):
        cost("resnet32", file, **options)
