"""Start values: clips from what reaches a layer, batch norms as under a plain pass, one network after any order."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import sbs
from sbs.errors import SbsError
from tests.numerics import networks

SIZE = 8


@pytest.fixture
def batches() -> list[torch.Tensor]:
    """Three batches of images."""
    return [networks.images(16, SIZE, seed) for seed in range(3)]


def _seen(model: nn.Module, layer: str, batches: list[torch.Tensor]) -> torch.Tensor:
    """What reaches a layer of the float network, batch norms on the batches' own statistics."""
    values = []
    model = copy.deepcopy(model).train()
    model.get_submodule(layer).register_forward_pre_hook(lambda _, x: values.append(x[0].detach().flatten()))
    for x in batches:
        model(x)
    return torch.cat(values)


def test_clips_of_a_search_are_high_percentiles_of_activations_and_standardised_weights(batches):
    model = networks.randomise(networks.Inverted(), 1)
    net = sbs.prepare(model, sbs.SearchSpace(), batches[0])
    sbs.calibrate(net, batches)
    for layer, signed in (("down.0", False), ("expand.0", True), ("project.0", False)):
        values = _seen(model, layer, batches)
        values = values.abs() if signed else values.clamp_min(0)
        clip = net.model.get_submodule(layer).activation_clip.item()
        assert torch.quantile(values, 0.99) < clip <= values.max()
        weight = model.get_submodule(layer).weight.detach()
        standard = ((weight - weight.mean()) / weight.std(unbiased=False)).abs().flatten()
        clip = net.model.get_submodule(layer).weight_clip.item()
        assert torch.quantile(standard, 0.99) < clip <= standard.max() * 1.0001


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_clips_of_fixed_bits_have_nearly_the_least_squared_error(batches, bits):
    model = networks.randomise(networks.Inverted(), 1)
    policy = sbs.Policy.uniform(model, batches[0], bits, bits)
    small = sbs.compress(model, policy, example_input=batches[0], calibration=batches)
    values, n = _seen(model, "down.0", batches).clamp_min(0), 2**bits - 1

    def error(clip: float) -> float:
        return ((values.clamp(max=clip) / clip * n).round() / n * clip - values).square().mean().item()

    best = min(error(values.max().item() * i / 200) for i in range(1, 201))
    assert error(small.get_submodule("down.0").activation_clip.item()) <= 1.1 * best


def test_batch_norms_hold_the_average_statistics_of_the_batches(batches):
    """At 16 bits quantisation hardly shows, so the running statistics are those of the float network."""
    model = networks.randomise(networks.Residual(), 2)
    space = sbs.SearchSpace((16,), (16,), prune=False, edge_bits=16)
    net = sbs.prepare(model, space, batches[0])
    sbs.calibrate(net, batches)
    plain = copy.deepcopy(model).train()
    for module in plain.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.reset_running_stats()
            module.momentum = None  # plain average
    with torch.no_grad():
        for conv in ("stem", "conv_a", "conv_b", "conv_c", "conv_d", "short"):
            weight = plain.get_submodule(conv).weight
            weight -= weight.mean()  # the quantiser takes the mean of the weights away
        for x in batches:
            plain(x)
    for name, module in plain.named_modules():
        if isinstance(module, nn.BatchNorm2d):
            ours = net.model.get_submodule(name)
            torch.testing.assert_close(ours.running_mean, module.running_mean, rtol=0.05, atol=0.03)
            torch.testing.assert_close(ours.running_var, module.running_var, rtol=0.05, atol=0.03)
            assert ours.momentum == 0.1


def test_calibrating_twice_is_calibrating_once_and_leaves_weights_and_modes_alone(batches):
    model = networks.randomise(networks.Residual(), 3)
    net = sbs.prepare(model, sbs.SearchSpace(), batches[0])
    net.train()
    net.model.bn_a.eval()
    sbs.calibrate(net, batches)
    assert net.training
    assert not net.model.bn_a.training
    assert net.model.bn_b.training
    for name, value in model.named_parameters():
        assert torch.equal(net.model.get_parameter(name), value), name
    first = {n: v.clone() for n, v in net.state_dict().items()}
    sbs.calibrate(net, iter(batches))
    for name, value in net.state_dict().items():
        assert torch.equal(value, first[name]), name


def test_a_calibrated_8_bit_network_answers_like_the_float_one(batches):
    """Same top-1 and logits near those of the float network whose batch norms saw the same batches."""
    torch.manual_seed(0)
    model = networks.Residual()
    with torch.no_grad():
        for conv in ("stem", "conv_a", "conv_b", "conv_c", "conv_d", "short"):
            model.get_submodule(conv).weight -= model.get_submodule(conv).weight.mean()
        model.fc.weight -= model.fc.weight.mean()
    net = sbs.prepare(model, sbs.SearchSpace(), batches[0])
    sbs.calibrate(net, batches)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None
    with torch.no_grad():
        model.train()
        for x in batches:
            model(x)
        want, got = model.eval()(batches[0]), net.eval()(batches[0])
    assert (want.argmax(1) == got.argmax(1)).float().mean() > 0.9
    assert (want - got).abs().max() < 0.1 * want.abs().max()


def test_calibration_without_a_batch_is_refused(batches):
    net = sbs.prepare(networks.Residual(), sbs.SearchSpace(), batches[0])
    with pytest.raises(SbsError, match="batch"):
        sbs.calibrate(net, [])
