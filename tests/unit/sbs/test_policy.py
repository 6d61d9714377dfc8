"""Policies on disk: they come back as they were, and what does not fit is refused by name."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

import sbs
from sbs.errors import SbsError
from tests.numerics import networks, states

X = torch.zeros(1, 3, 8, 8)


@pytest.fixture
def document() -> dict[str, Any]:
    """A valid policy of networks.Residual as plain data."""
    return sbs.Policy.uniform(networks.Residual(), X, 4, 2).to_json()


def _load(document: Any, tmp_path) -> sbs.Policy:
    path = tmp_path / "policy.json"
    path.write_text(document if isinstance(document, str) else json.dumps(document))
    return sbs.Policy.load(path)


def test_saved_and_loaded_policies_are_equal(tmp_path, document):
    document["layers"][1]["kept"] = [0, 3, 5]
    policy = _load(document, tmp_path)
    assert policy.layer("conv_a").kept == (0, 3, 5)
    policy.save(tmp_path / "again.json")
    assert sbs.Policy.load(tmp_path / "again.json") == policy
    on_disk = json.loads((tmp_path / "again.json").read_text())
    assert on_disk["version"] == 1
    expected = {"name": "conv_a", "weight_bits": 4, "activation_bits": 2, "channels": 8, "window": "3x3"}
    assert on_disk["layers"][1] == expected | {"kept": [0, 3, 5]}
    assert on_disk["layers"][-1] == {"name": "fc", "weight_bits": 8, "activation_bits": 8, "window": "linear"}
    assert sbs.Policy.from_json(policy.to_json()) == policy


def test_a_policy_knows_the_channels_that_it_judged(tmp_path):
    """The same names and indices would fit a wider network, whose other channels nobody judged."""
    torch.manual_seed(0)
    net = states.searched(networks.Residual(), 8, seed=2, group_size=2)
    sbs.freeze(net).save(tmp_path / "policy.json")
    policy = sbs.Policy.load(tmp_path / "policy.json")
    assert policy == sbs.freeze(net)
    assert any(layer.kept for layer in policy.layers)
    known = {"stem": 8, "conv_a": 8, "conv_b": 8, "conv_c": 16, "conv_d": 16, "short": 16, "fc": None}
    assert {layer.name: layer.channels for layer in policy.layers} == known
    unpruned = sbs.Policy.uniform(networks.Residual(), X, 4, 4)
    for each in (policy, unpruned):
        assert sbs.compress(networks.Residual(num_classes=9), each).fc.out_features == 9


def _with(**changes: Any) -> networks.Residual:
    net = networks.Residual()
    for name, conv in changes.items():
        setattr(net, name, conv)
    return net


@pytest.mark.parametrize(
    ("other", "named"),
    [
        (networks.Residual(width=16), "layer 'stem' has 8 output channels, this network's has 16"),
        (
            _with(conv_c=torch.nn.Conv2d(8, 16, 5, 2, 2)),
            "layer 'conv_c' is '3x3 stride 2', this network's '5x5 stride 2'",
        ),
        (_with(stem=torch.nn.Conv2d(3, 8, 3)), "layer 'stem' is '3x3', this network's '3x3 padding 0'"),
        (
            _with(stem=torch.nn.Conv2d(3, 8, 3, dilation=2, padding=2)),
            "'stem' is '3x3', this network's '3x3 dilation 2'",
        ),
        (
            _with(conv_b=torch.nn.Conv2d(8, 8, 3, padding=1, groups=4)),
            "'conv_b' is '3x3', this network's '3x3 groups 4'",
        ),
        (
            _with(conv_b=torch.nn.Conv2d(8, 8, 3, padding=1, groups=8)),
            "'conv_b' is '3x3', this network's '3x3 depthwise'",
        ),
    ],
    ids=["width", "kernel", "padding", "dilation", "groups", "depthwise"],
)
def test_a_network_with_the_same_names_is_refused_by_its_first_other_layer(other, named):
    policy = sbs.Policy.uniform(networks.Residual(), X, 4, 4)
    for call in (lambda: sbs.compress(other, policy), lambda: sbs.cost(other, (3, 8, 8), policy)):
        with pytest.raises(SbsError, match=f"of Residual.* is of another network: .*{named}"):
            call()


class _Heads(torch.nn.Module):
    """Two heads, whose results are added, or returned as they are."""

    def __init__(self, classes: int, added: bool) -> None:
        super().__init__()
        self.body, self.first = torch.nn.Conv2d(3, 8, 3), torch.nn.Linear(8, classes)
        self.second, self.added = torch.nn.Linear(8, classes), added

    def forward(self, x: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        x = torch.relu(self.body(x)).mean((2, 3))
        return self.first(x) + self.second(x) if self.added else (self.first(x), self.second(x))


@pytest.mark.parametrize("added", [True, False])
def test_other_classes_are_no_other_network(added: bool):
    policy = sbs.Policy.uniform(_Heads(10, added), X, 4, 4)
    assert [layer.channels for layer in policy.layers] == [8, None, None]
    small = sbs.compress(_Heads(7, added), policy)
    assert (small.first.out_features, small.second.out_features) == (7, 7)


def test_a_linear_layer_is_no_convolution():
    ours, theirs = (torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3, 4), torch.nn.Linear(4, 2)) for _ in "ab")
    policy = sbs.Policy.uniform(ours, torch.zeros(1, 3, 1, 1), 4, 4)
    theirs[0], theirs[1], theirs[2] = torch.nn.Identity(), torch.nn.Conv2d(3, 4, 1), torch.nn.Conv2d(4, 2, 1)
    with pytest.raises(SbsError, match="layer '1' is 'linear', this network's '1x1'"):
        sbs.compress(theirs, policy)


def test_variants_of_a_model_refuse_each_others_policies():
    """Of the same class, with the same names and channels: only strides tell them apart."""
    ours, theirs = (sbs.models.build(name, 10) for name in ("mobilenetv2_cifar", "mobilenetv2"))
    policy = sbs.Policy.uniform(theirs, torch.zeros(1, 3, 64, 64), 4, 4)
    with pytest.raises(SbsError, match=r"features\.0\.0' is '3x3 stride 2', this network's '3x3'"):
        sbs.cost(ours, (3, 32, 32), policy)
    assert sbs.cost(theirs, (3, 96, 96), policy).mean_weight_bits == 4


def test_images_of_other_channels_are_of_another_network():
    policy = sbs.Policy.uniform(networks.Residual(), X, 4, 4)
    grey = _with(stem=torch.nn.Conv2d(1, 8, 3, padding=1, bias=False))
    with pytest.raises(SbsError, match=r"for inputs of \(3, 8, 8\).*this network's are \(1, 8, 8\)"):
        sbs.cost(grey, (1, 8, 8), policy)


def test_policies_by_hand_need_not_tell_the_network(tmp_path, document):
    """Channels and windows may be missing, or null; what is there must fit."""
    short = [{k: e[k] for k in ("name", "weight_bits", "activation_bits")} for e in document["layers"]]
    assert sbs.compress(networks.Residual(width=4), _load(document | {"layers": short}, tmp_path)).fc.in_features == 8
    document["layers"][1] |= {"kept": None, "channels": None, "window": None}
    assert _load(document, tmp_path).layer("conv_a").channels is None
    document["layers"][1]["channels"] = 9
    with pytest.raises(SbsError, match="layer 'conv_a' has 9 output channels"):
        sbs.cost(networks.Residual(), (3, 8, 8), _load(document, tmp_path))


def test_first_and_last_layers_of_a_uniform_policy_have_8_bits(document):
    bits = [(e["weight_bits"], e["activation_bits"]) for e in document["layers"]]
    assert bits == [(8, 8), *[(4, 2)] * 5, (8, 8)]


def test_a_uniform_policy_of_32_bits_is_full_precision_throughout():
    bits = {(c.weight_bits, c.activation_bits) for c in sbs.Policy.uniform(networks.Residual(), X, 32, 32).layers}
    assert bits == {(32, 32)}
    edges = sbs.Policy.uniform(networks.Residual(), X, 32, 32, edge_bits=8).layers
    assert (edges[0].weight_bits, edges[-1].activation_bits) == (8, 8)
    assert sbs.Policy.uniform(networks.Residual(), X, 32, 4).layers[0].weight_bits == 8


def test_policy_of_another_network_is_refused_by_name(document):
    policy = sbs.Policy.uniform(sbs.models.build("resnet20", 10), torch.zeros(1, 3, 32, 32), 4, 4)
    for call in (
        lambda: sbs.compress(networks.Residual(), policy),
        lambda: sbs.cost(networks.Residual(), (3, 8, 8), policy),
    ):
        with pytest.raises(SbsError, match=r"(?s)CifarResNet.*another network.*conv_a"):
            call()


def test_another_version_is_refused_by_number(tmp_path, document):
    document["version"] = 7
    with pytest.raises(SbsError, match=r"policy\.json.*version 7.*version 1"):
        _load(document, tmp_path)


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("{", "policy.json"),
        ("[]", "policy.json"),
        ('{"layers": []}', "format"),
        ('{"format": "sbs-policy", "version": 1, "model": "m", "input_shape": [3]}', "layers"),
    ],
)
def test_what_is_no_policy_is_refused(tmp_path, text, named):
    with pytest.raises(SbsError, match=named):
        _load(text, tmp_path)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(SbsError, match=r"nowhere\.json"):
        sbs.Policy.load(tmp_path / "nowhere.json")


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"weight_bits": 0}, r"conv_a.*weight_bits=0"),
        ({"activation_bits": 99}, r"conv_a.*activation_bits=99"),
        ({"weight_bits": "4"}, r"conv_a.*weight_bits"),
        ({"weight_bits": True}, r"conv_a.*weight_bits"),
        ({"kept": []}, r"conv_a.*kept"),
        ({"kept": [3, 1]}, r"conv_a.*kept"),
        ({"kept": [1, 1]}, r"conv_a.*kept"),
        ({"kept": [0, 8]}, r"conv_a.*8"),
        ({"kept": [-1, 2]}, r"conv_a"),
        ({"kept": [1.5]}, r"conv_a.*kept"),
        ({"kept": 3}, r"kept|conv_a"),
        ({"bits": 4}, r"conv_a.*bits"),
        ({"window": 3}, r"conv_a.*window=3"),
        ({"name": "conv_x"}, r"conv_a.*conv_x"),
    ],
    ids=str,
)
def test_a_wrong_entry_is_refused_with_its_layer(tmp_path, document, change, named):
    document["layers"][1] |= change
    with pytest.raises(SbsError, match=f"(?s){named}"):
        sbs.compress(networks.Residual(), _load(document, tmp_path))


@pytest.mark.parametrize("layers", [["conv_a"], {"conv_a": {"weight_bits": 4}}, None, 3], ids=str)
def test_layers_of_the_wrong_form_are_refused(tmp_path, document, layers):
    document["layers"] = layers
    with pytest.raises(SbsError, match=r"policy\.json"):
        _load(document, tmp_path)


def test_a_missing_key_is_named(tmp_path, document):
    del document["layers"][2]["weight_bits"]
    with pytest.raises(SbsError, match="weight_bits"):
        _load(document, tmp_path)


def test_a_missing_layer_and_a_doubled_one_are_refused_by_name(tmp_path, document):
    first = document["layers"][0]
    cases = [
        (document["layers"][1:], r"without a policy: stem;"),
        ([first, *document["layers"]], r"more than one entry for stem: leave one"),
        ([*document["layers"][1:], document["layers"][2]], r"more than one entry for conv_b"),
    ]
    for layers, named in cases:
        with pytest.raises(SbsError, match=named):
            sbs.compress(networks.Residual(), _load(document | {"layers": layers}, tmp_path))


def test_channels_of_a_residual_sum_cannot_be_dropped(tmp_path, document):
    entry = next(e for e in document["layers"] if e["name"] == "conv_b")
    entry["kept"] = [0, 1]
    with pytest.raises(SbsError, match=r"conv_b.*addition"):
        sbs.compress(networks.Residual(), _load(document, tmp_path))


def test_a_depthwise_follower_keeps_what_its_producer_keeps(tmp_path):
    document = sbs.Policy.uniform(networks.Inverted(), X, 4, 4).to_json()
    entries = {e["name"]: e for e in document["layers"]}
    entries["expand.0"]["kept"] = [0, 1, 5]
    small = sbs.compress(networks.Inverted(), _load(document, tmp_path))
    assert small.depthwise[0].weight.shape == (3, 1, 3, 3)
    assert small.depthwise[0].groups == 3
    assert small.project[0].weight.shape == (8, 3, 1, 1)
    assert small.depthwise[1].num_features == small.expand[1].num_features == 3
    entries["depthwise.0"]["kept"] = [0, 1, 2]
    with pytest.raises(SbsError, match=r"depthwise\.0.*expand\.0"):
        sbs.compress(networks.Inverted(), _load(document, tmp_path))
