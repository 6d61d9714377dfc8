"""Start values: clips from what reaches a layer, batch norms as under a plain pass, one network after any order."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import sbs
from sbs.errors import SbsError
from tests.numerics import networks, oracle

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


def test_passes_before_a_calibration_are_no_part_of_it(batches):
    """A training pass leaves sums for after_step, which a check of shapes never calls."""
    nets = [sbs.prepare(networks.randomise(networks.Residual(), 1), sbs.SearchSpace(), batches[0]) for _ in range(2)]
    nets[0].load_state_dict(nets[1].state_dict())
    with torch.no_grad():
        nets[0].train()(100 * batches[1])
    nets[0].load_state_dict(nets[1].state_dict())
    for net in nets:
        sbs.calibrate(net, batches)
    assert torch.equal(nets[0].activation_gates.statistic, nets[1].activation_gates.statistic)


def test_gate_statistics_start_from_the_batches(batches):
    """Those of one layer's input by the oracle."""
    net = sbs.prepare(networks.randomise(networks.Residual(), 1), sbs.SearchSpace(), batches[0])
    sbs.calibrate(net, batches)
    again, seen = copy.deepcopy(net).train(), []
    layer = again.model.conv_c
    clip = layer.activation_clip.detach()
    layer.register_forward_pre_hook(lambda _, x: seen.append(oracle.normalise(x[0].detach(), clip, False)))
    for x in batches:
        again(x)
    row = net.searched.index("conv_c")
    want = oracle.residual_statistics(torch.cat(seen), (2, 4, 8))
    torch.testing.assert_close(net.activation_gates.statistic[row], want, rtol=1e-4, atol=1e-4)


def test_the_clip_of_a_signed_input_heeds_its_negative_tail(batches):
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1), nn.Flatten(), nn.Linear(8 * SIZE**2, 5))
    with torch.no_grad():
        model[0].bias.fill_(-50.0)
    net = sbs.prepare(model, sbs.SearchSpace(), batches[0])
    sbs.calibrate(net, batches)
    assert net.graph.layer("1").signed
    assert 45 < net.model[1].activation_clip.item() < 60


def test_floors_of_clips_come_along_when_a_search_is_compressed(batches):
    net = sbs.prepare(networks.randomise(networks.Residual(), 1), sbs.SearchSpace(), batches[0])
    sbs.calibrate(net, batches)
    small = sbs.compress(net, sbs.freeze(net))
    start = {n: p.detach().clone() for n, p in small.named_parameters() if n.endswith("_clip")}
    assert start
    with torch.no_grad():
        for name in start:
            small.get_parameter(name).fill_(-1.0)
    sbs.after_step(small)
    for name, clip in start.items():
        torch.testing.assert_close(small.get_parameter(name).detach(), 1e-3 * clip)


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
