"""`python -m harness cost`: what it prints under a policy, and what it refuses, in words that name the file."""

import json
import math
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


@pytest.mark.parametrize("convention", ["mac_product", "uniq"])
def test_a_policy_is_what_is_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str], convention: str):
    """ResNet-20 at 4/4 bits, first and last layers at 8/8, by its published 40,818,944 MACs."""
    file = tmp_path / "policy.json"
    sbs.Policy.uniform(sbs.models.build("resnet20", 100), torch.zeros(1, 3, 32, 32), 4, 4).save(file)
    options = {"convention": convention, "classes": None, "image_size": None, "explain": False}
    cost("resnet20", file, **options, as_json=True)
    told = json.loads(capsys.readouterr().out)
    edges = 32 * 32 * 27 * 16 + 64 * 100
    assert told["convention"] == convention
    assert told["macs"] == sum(layer["macs"] for layer in told["layers"]) == 40_818_944
    if convention == "mac_product":
        assert told["bops"] == (40_818_944 - edges) * 16 + edges * 64
        assert told["bop_reduction"] == pytest.approx(40_818_944 * 1024 / told["bops"])
    else:
        assert told["bops"] > (40_818_944 - edges) * (16 + 8 + math.log2(16)) + edges * 80
    cost("resnet20", file, **options, as_json=False)
    text = capsys.readouterr().out
    assert f"{told['gbops']:,.4f} GBOPs" in text
    assert f"convention {convention}, all 22 convolution and linear layers counted" in text
    assert "4/4" in text
