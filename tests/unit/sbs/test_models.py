"""The zoo: parameter names and shapes are torchvision's, so that its ImageNet state dicts load by key."""

from __future__ import annotations

import dataclasses
import functools
import inspect

import pytest
import torch

import sbs
from sbs.errors import SbsError

Shapes = dict[str, tuple[int, ...]]


def _norm(name: str, channels: int) -> Shapes:
    tensors = {f"{name}.{part}": (channels,) for part in ("weight", "bias", "running_mean", "running_var")}
    return tensors | {f"{name}.num_batches_tracked": ()}


def _conv_norm(conv: str, norm: str, *shape: int) -> Shapes:
    return {f"{conv}.weight": shape} | _norm(norm, shape[0])


def _resnet(layers: tuple[int, ...], bottleneck: bool) -> Shapes:
    keys = _conv_norm("conv1", "bn1", 64, 3, 7, 7)
    c_in = 64
    for stage, count in enumerate(layers, start=1):
        width = 64 * 2 ** (stage - 1)
        c_out = 4 * width if bottleneck else width
        for block in range(count):
            at = f"layer{stage}.{block}"
            if bottleneck:
                keys |= _conv_norm(f"{at}.conv1", f"{at}.bn1", width, c_in, 1, 1)
                keys |= _conv_norm(f"{at}.conv2", f"{at}.bn2", width, width, 3, 3)
                keys |= _conv_norm(f"{at}.conv3", f"{at}.bn3", c_out, width, 1, 1)
            else:
                keys |= _conv_norm(f"{at}.conv1", f"{at}.bn1", width, c_in, 3, 3)
                keys |= _conv_norm(f"{at}.conv2", f"{at}.bn2", width, width, 3, 3)
            if block == 0 and c_in != c_out:
                keys |= _conv_norm(f"{at}.downsample.0", f"{at}.downsample.1", c_out, c_in, 1, 1)
            c_in = c_out
    return keys | {"fc.weight": (1000, c_in), "fc.bias": (1000,)}


def _mobilenetv2() -> Shapes:
    keys = _conv_norm("features.0.0", "features.0.1", 32, 3, 3, 3)
    c_in, index = 32, 1
    plan = [(1, 16, 1), (6, 24, 2), (6, 32, 3), (6, 64, 4), (6, 96, 3), (6, 160, 3), (6, 320, 1)]
    for expand, c_out, repeats in plan:
        for _ in range(repeats):
            at, hidden, i = f"features.{index}.conv", c_in * expand, 0
            if expand > 1:
                keys |= _conv_norm(f"{at}.0.0", f"{at}.0.1", hidden, c_in, 1, 1)
                i = 1
            keys |= _conv_norm(f"{at}.{i}.0", f"{at}.{i}.1", hidden, 1, 3, 3)
            keys |= _conv_norm(f"{at}.{i + 1}", f"{at}.{i + 2}", c_out, hidden, 1, 1)
            c_in, index = c_out, index + 1
    keys |= _conv_norm("features.18.0", "features.18.1", 1280, 320, 1, 1)
    return keys | {"classifier.1.weight": (1000, 1280), "classifier.1.bias": (1000,)}


TORCHVISION = {
    "resnet18": _resnet((2, 2, 2, 2), False),
    "resnet34": _resnet((3, 4, 6, 3), False),
    "resnet50": _resnet((3, 4, 6, 3), True),
    "resnet101": _resnet((3, 4, 23, 3), True),
    "mobilenetv2": _mobilenetv2(),
}


@pytest.mark.parametrize("name", TORCHVISION)
def test_names_and_shapes_are_those_of_torchvision(name):
    with torch.device("meta"):
        state = sbs.models.build(name, 1000).state_dict()
    assert {key: tuple(value.shape) for key, value in state.items()} == TORCHVISION[name]


@pytest.mark.parametrize("name", ["resnet20", "resnet32", "resnet56", "mobilenetv2_cifar"])
def test_cifar_networks_see_32_pixels_and_end_at_their_last_resolution(name):
    model = sbs.models.build(name, 100).eval()
    last = {}
    convs = [m for m in model.modules() if isinstance(m, torch.nn.Conv2d)]
    convs[-1].register_forward_hook(lambda _, __, y: last.update(shape=y.shape))
    with torch.no_grad():
        assert model(torch.zeros(2, 3, 32, 32)).shape == (2, 100)
    assert last["shape"][2] == (4 if name == "mobilenetv2_cifar" else 8)


def test_an_unknown_name_is_refused_with_the_known_ones():
    with pytest.raises(SbsError, match=r"(?s)resnet19.*did you mean .resnet1.*resnet18.*mobilenetv2"):
        sbs.models.build("resnet19", 10)


@pytest.mark.parametrize("classes", [0, -3])
def test_too_few_classes_are_refused(classes):
    with pytest.raises(SbsError, match=str(classes)):
        sbs.models.build("resnet20", classes)


SURFACE = {
    "prepare": "model space example_input *absorb_relus",
    "calibrate": "net batches",
    "bop_penalty": "net gradient",
    "param_groups": "net",
    "after_step": "net steps *loss_scale",
    "freeze": "net",
    "compress": "net_or_model policy *example_input *calibration",
    "cost": "net_or_model input_shape policy convention",
    "export": "net path",
    "load_exported": "path model example_input",
    "telemetry": "net",
    "margins": "net",
    "SearchSpace": "weight_bits activation_bits prune group_size max_prune_share edge_bits",
    "models.build": "name num_classes",
    "Policy.load": "path",
    "Policy.save": "self path",
    "Policy.uniform": "model example_input weight_bits activation_bits edge_bits",
}


@pytest.mark.parametrize("name", SURFACE)
def test_users_rely_on_these_names(name):
    """`*` before those that are given by name alone."""
    function = functools.reduce(getattr, name.split("."), sbs)
    parameters = inspect.signature(function).parameters.values()
    assert [f"{'*' * (p.kind is p.KEYWORD_ONLY)}{p.name}" for p in parameters] == SURFACE[name].split()


def test_a_report_of_costs_has_these_figures():
    report = sbs.cost(sbs.models.build("resnet20", 10), (3, 32, 32))
    assert {"macs", "bops", "params", "bytes", "layers"} <= {field.name for field in dataclasses.fields(report)}
