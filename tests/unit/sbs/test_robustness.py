"""What must not change a result in silence: names of modules, wrappers, broken batches, exceptions, samples."""

import copy
import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

import sbs
from sbs.graph import analyze
from sbs.memory import spread


def _image(batch: int = 8) -> torch.Tensor:
    return torch.randn(batch, 3, 8, 8, generator=torch.Generator().manual_seed(1))


class Leaky(nn.Module):
    """Its activation is called `relu`, and is none."""

    def __init__(self) -> None:
        super().__init__()
        self.conv_a, self.relu, self.conv_b = nn.Conv2d(3, 8, 3), nn.LeakyReLU(), nn.Conv2d(8, 8, 3)
        self.pool, self.fc = nn.AdaptiveAvgPool2d(1), nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.pool(self.conv_b(self.relu(self.conv_a(x)))).flatten(1))


class Shifted(Leaky):
    """A non-negative value plus a negative constant."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.pool(self.conv_b(torch.relu(self.conv_a(x)) + (-1.0))).flatten(1))


@pytest.mark.parametrize("kind", [Leaky, Shifted])
def test_a_name_or_a_constant_does_not_hide_a_sign(kind: type[nn.Module]):
    assert analyze(kind(), _image()).layer("conv_b").signed


class Augmented(Leaky):
    """Adds in place by a name that torch.fx does not see: it records a sum of its own."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = z = torch.relu(self.conv_a(x))
        z += -1.0
        return self.fc(self.pool(self.conv_b(y)).flatten(1))


def test_a_sign_that_the_graph_does_not_show_shows_in_calibration():
    net = sbs.prepare(Augmented(), sbs.SearchSpace(), _image())
    message = r"module 'conv_b' gets negative values.*y = y \+ z"
    with pytest.raises(sbs.SbsError, match=message):
        sbs.calibrate(net, [_image()])
    in_floats = sbs.SearchSpace(activation_bits=(32,))
    sbs.calibrate(sbs.prepare(Augmented(), in_floats, _image()), [_image()])  # where no sign matters
    for absorb_relus in (False, True):
        sbs.calibrate(sbs.prepare(Leaky(), sbs.SearchSpace(), _image(), absorb_relus=absorb_relus), [_image()])


class Auxiliary(Leaky):
    """Has a head that only training calls."""

    def __init__(self) -> None:
        super().__init__()
        self.aux = nn.Sequential(nn.Flatten(), nn.Linear(8 * 6 * 6, 5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training:
            return super().forward(x) + self.aux(self.conv_a(x))
        return super().forward(x)


def test_a_layer_that_evaluation_does_not_call_is_named_left_alone_and_not_counted():
    with pytest.warns(UserWarning, match=r"Auxiliary does not call 'aux\.1' in evaluation.*not counted"):
        net = sbs.prepare(Auxiliary(), sbs.SearchSpace(), _image())
    assert type(net.model.aux[1]) is nn.Linear
    with pytest.warns(UserWarning, match="'aux"):
        report = sbs.cost(Auxiliary(), (3, 8, 8))
    assert report.params == sbs.cost(Leaky(), (3, 8, 8)).params
    sbs.calibrate(net, [_image()])
    net.train()(_image()).sum().backward()
    assert net.model.aux[1].weight.grad is not None
    assert torch.equal(net.eval()(_image()), sbs.compress(net, sbs.freeze(net)).eval()(_image()))


class SideHead(Auxiliary):
    """Its head reads a map whose channels might be pruned."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.relu(self.conv_a(x))
        logits = self.fc(self.pool(self.conv_b(y)).flatten(1))
        return logits + self.aux(y) if self.training else logits


def test_channels_that_a_head_for_training_reads_stay():
    with pytest.warns(UserWarning, match="'aux"):
        net = sbs.prepare(SideHead(), sbs.SearchSpace(), _image())
    assert {group.root for group in net.graph.groups} == {"conv_b"}
    with torch.no_grad():
        net.channel_gates.open[0] = 0.0
    small = sbs.compress(net, sbs.freeze(net)).train()
    small(_image()).sum().backward()
    assert small.aux[1].weight.grad is not None


class Branching(SideHead):
    """In training its flow depends on values."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training and x.sum() > 1e9:
            return x
        return super().forward(x)


class SplitNorms(Leaky):
    """One norm for training, another for evaluation."""

    def __init__(self) -> None:
        super().__init__()
        self.clean, self.noisy = nn.BatchNorm2d(8), nn.BatchNorm2d(8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.conv_a(x)
        y = self.relu(self.noisy(y) if self.training else self.clean(y))
        return self.fc(self.pool(self.conv_b(y)).flatten(1))


def test_where_training_cannot_be_followed_no_channel_is_pruned_and_a_warning_says_so():
    with pytest.warns(UserWarning, match="no channel is pruned, as forward"):
        net = sbs.prepare(Branching(), sbs.SearchSpace(), _image())
    assert net.graph.groups == ()


@pytest.mark.filterwarnings("error")
def test_channels_of_a_norm_for_training_stay():
    net = sbs.prepare(SplitNorms(), sbs.SearchSpace(), _image())
    assert {group.root for group in net.graph.groups} == {"conv_b"}


@pytest.mark.filterwarnings("error")
def test_networks_whose_layers_are_all_called_give_no_warning():
    analyze(Leaky(), _image())
    sbs.prepare(sbs.models.build("mobilenetv2_cifar", 10), sbs.SearchSpace(), torch.zeros(1, 3, 32, 32))


class OwnForward(nn.Conv2d):
    """A convolution that does more than convolve."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(x)


def test_what_a_replacement_would_lose_is_refused_by_name():
    own, tied = Leaky(), Leaky()
    own.conv_b = OwnForward(8, 8, 3)
    with pytest.raises(sbs.SbsError, match=r"conv_b.*forward\(\) of its own"):
        analyze(own, _image())
    tied.conv_c = nn.Conv2d(8, 8, 3)
    tied.conv_c.weight = tied.conv_b.weight
    tied.pool = nn.Sequential(tied.conv_c, nn.AdaptiveAvgPool2d(1))
    with pytest.raises(sbs.SbsError, match="share a parameter"):
        analyze(tied, _image())
    hidden = Leaky()
    nn.utils.parametrizations.weight_norm(hidden.conv_b)
    with pytest.raises(sbs.SbsError, match="weight_norm"):
        analyze(hidden, _image())


def _searching() -> sbs.SuperNet:
    torch.manual_seed(0)
    net = sbs.prepare(Leaky(), sbs.SearchSpace(), _image())
    sbs.calibrate(net, [_image()])
    return net.train()


def test_a_wrapped_network_is_stepped_and_grouped_like_the_bare_one():
    net = _searching()
    bare, wrapped = sbs.param_groups(net), sbs.param_groups(nn.Sequential(net))
    assert {k: [id(p) for p in v] for k, v in bare.items()} == {k: [id(p) for p in v] for k, v in wrapped.items()}
    net(_image())
    with torch.no_grad():
        net.weight_gates.thresholds.fill_(2.9)
    sbs.after_step(nn.Sequential(net))
    assert (net.weight_gates.flips == 1).any()


def test_a_batch_that_is_not_finite_leaves_the_statistics_alone():
    net = _searching()
    before = net.activation_gates.statistic.clone()
    net(torch.full_like(_image(), float("nan")))
    sbs.after_step(net)
    torch.testing.assert_close(net.activation_gates.statistic, before)


def test_a_calibration_that_fails_leaves_no_trace():
    net = _searching().eval()
    want = net(_image())
    with pytest.raises(RuntimeError):
        sbs.calibrate(net, [_image(), torch.randn(2, 5, 8, 8)])
    with pytest.raises(sbs.SbsError, match="infinite or no numbers"):
        sbs.calibrate(net, [_image(), torch.full_like(_image(), float("inf"))])
    assert all(layer.observed is None for _, layer in net.layers())
    assert net(_image()).shape == want.shape
    assert all(layer.observed is None for _, layer in net.layers())


def test_constant_weights_give_numbers():
    model = Leaky()
    nn.init.constant_(model.conv_b.weight, 0.1)
    net = sbs.prepare(model, sbs.SearchSpace(), _image())
    sbs.calibrate(net, [_image()])
    assert net.eval()(_image()).isfinite().all()


def test_a_sample_of_a_map_sees_every_column():
    columns = torch.arange(256 * 64 * 32 * 32) % 32
    assert spread(columns, 4096).unique().numel() == 32


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", ["super-network", "compressed"])
def test_half_precision_weights_are_refused_with_the_remedy(kind: str, dtype: torch.dtype):
    with pytest.raises(sbs.SbsError, match=rf"{dtype}.*torch\.autocast"):
        sbs.prepare(Leaky().to(dtype), sbs.SearchSpace(), _image())
    net = _searching()
    net = net if kind == "super-network" else sbs.compress(net, sbs.freeze(net))
    net.to(dtype)
    for x in (_image(), _image().to(dtype)):
        with pytest.raises(sbs.SbsError, match=rf"torch\.autocast\('cpu', dtype={dtype}\)"):
            net(x)
    with pytest.raises(sbs.SbsError, match=r"torch\.autocast"):
        sbs.calibrate(net, [_image()])
    assert net.float()(_image()).isfinite().all()


OTHER_SPACES: dict[str, dict[str, Any]] = {
    "weight_bits=(4, 8, 16)": {"weight_bits": (4, 8, 16)},
    "activation_bits=(1, 4, 8)": {"activation_bits": (1, 4, 8)},
    "group_size=5": {"group_size": 5},  # as many groups of 8 channels as with 4
    "prune=False": {"prune": False},
    "first and last layers at 4 bits": {"edge_bits": 4},
}


@pytest.mark.parametrize("named", OTHER_SPACES)
def test_weights_of_another_search_space_are_refused_by_name_and_nothing_is_loaded(named: str):
    state = _searching().state_dict()
    other = sbs.prepare(Leaky(), sbs.SearchSpace(**OTHER_SPACES[named]), _image())
    before = copy.deepcopy(other.state_dict())
    with pytest.raises(sbs.SbsError, match=rf"weight_bits=\(2, 4, 8\).*group_size=4.*{re.escape(named)}"):
        other.load_state_dict(state)
    for name, value in other.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_the_space_in_a_state_dict_is_a_tensor_and_does_not_disturb_copies(tmp_path: Path):
    net = _searching()
    torch.save(nn.ModuleDict({"wrapped": net}).state_dict(), tmp_path / "net.pt")
    state = torch.load(tmp_path / "net.pt", weights_only=True)
    assert all(isinstance(value, torch.Tensor) for value in state.values())
    fresh = nn.ModuleDict({"wrapped": sbs.prepare(Leaky(), sbs.SearchSpace(max_prune_share=0.25), _image())})
    fresh.load_state_dict(state)
    averaged = AveragedModel(net, use_buffers=True)
    averaged.update_parameters(net)
    for other in (fresh["wrapped"], copy.deepcopy(net), averaged.module):
        assert torch.equal(other.eval()(_image()), net.eval()(_image()))
    AveragedModel(net).load_state_dict(averaged.state_dict())


def test_gates_of_averaged_buffers_are_those_of_most_steps():
    net = _searching()
    averaged = AveragedModel(net, avg_fn=lambda mean, new, _: 0.9 * mean + 0.1 * new, use_buffers=True)
    averaged.update_parameters(net)
    with torch.no_grad():
        for bank in (net.weight_gates, net.activation_gates, net.channel_gates):
            bank.open[0] = 0.0
    averaged.update_parameters(net)
    assert averaged.module.weight_gates.open[0, 0] == pytest.approx(0.9)
    policy = sbs.freeze(averaged)
    assert {(c.weight_bits, c.activation_bits, c.kept) for c in policy.layers} == {(8, 8, None)}
    small = sbs.compress(averaged, policy)
    assert torch.equal(averaged.eval()(_image()), small.eval()(_image()))
    assert sbs.freeze(net) != policy


def test_gates_of_averaged_buffers_are_decided_like_others():
    """Inside the band they stay as most steps had them; and no layer loses more channels than it may."""
    net = _searching()
    with torch.no_grad():
        for bank in (net.weight_gates, net.channel_gates):
            bank.open.fill_(0.4)
            bank.thresholds.copy_(bank.statistic)
    sbs.after_step(net)
    assert not net.weight_gates.open.any()
    policy = sbs.freeze(net)
    assert {len(layer.kept) for layer in policy.layers if layer.kept} == {4}  # of 8, max_prune_share being a half
    sbs.compress(net, policy)


def test_gates_written_through_data_are_seen():
    """As some averaging of weights does it; no version of the tensor tells."""
    net, other = _searching(), _searching().eval()
    with torch.no_grad():
        net.channel_gates.open[0] = 0.0
    other(_image())
    for ours, theirs in zip(other.state_dict().values(), net.state_dict().values(), strict=True):
        ours.data.copy_(theirs)
    assert torch.equal(other(_image()), net.eval()(_image()))
    assert torch.equal(other(_image()), sbs.compress(other, sbs.freeze(other)).eval()(_image()))


def test_inference_mode_leaves_nothing_behind_that_training_trips_over():
    """Nor do masks of closed channels, made there and written when the next gate closes."""
    net = _searching()
    with torch.inference_mode():
        sbs.calibrate(net, [_image()])
        net.channel_gates.thresholds[0] = 3.0
        sbs.after_step(net)
    net(_image()).sum().backward()
    with torch.no_grad():
        net.channel_gates.thresholds[2] = 3.0
    sbs.after_step(net)
    assert net.channel_gates.open.tolist() == [0.0, 1.0, 0.0, 1.0]
    net(_image()).sum().backward()


WRAPPERS = {"averaged": AveragedModel, "data parallel": nn.DataParallel, "compiled": torch.compile}


@pytest.mark.parametrize("kind", WRAPPERS)
def test_what_wraps_a_network_changes_nothing(kind: str, tmp_path: Path):
    net, other = _searching(), _searching()
    wrapped = WRAPPERS[kind](other)
    sbs.calibrate(net, [2 * _image()])
    sbs.calibrate(wrapped, [2 * _image()])
    inside = other if kind != "averaged" else wrapped.module  # which holds a copy
    for (name, ours), theirs in zip(net.state_dict().items(), inside.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs), name
    assert sbs.freeze(wrapped) == sbs.freeze(net)
    assert sbs.cost(wrapped, (3, 8, 8)) == sbs.cost(net, (3, 8, 8))
    assert sbs.telemetry(wrapped) == sbs.telemetry(net)
    assert sbs.bops_of(wrapped) == sbs.bops_of(net)
    assert sbs.bop_penalty(wrapped) == sbs.bop_penalty(net)
    small = sbs.compress(wrapped, sbs.freeze(net))
    sbs.export(WRAPPERS[kind](small), tmp_path / "wrapped.sbs")
    sbs.export(small, tmp_path / "bare.sbs")
    assert (tmp_path / "wrapped.sbs").read_bytes() == (tmp_path / "bare.sbs").read_bytes()
    wrapped_model = WRAPPERS[kind](Leaky())
    assert sbs.Policy.uniform(wrapped_model, _image(), 4, 4) == sbs.Policy.uniform(Leaky(), _image(), 4, 4)
    loaded = sbs.load_exported(tmp_path / "bare.sbs", wrapped_model, _image())
    assert torch.equal(loaded(_image()), small.eval()(_image()))
    assert sbs.prepare(wrapped_model, sbs.SearchSpace(), _image()).graph == net.graph
    assert sbs.margins(wrapped) == sbs.margins(net)


def test_a_mean_that_quantising_takes_away_is_named():
    model = Leaky()
    with torch.no_grad():
        model.conv_b.weight.add_(1.0)
    with pytest.warns(UserWarning, match="weights of 'conv_b' have a mean beyond their standard deviation"):
        sbs.compress(model, sbs.Policy.uniform(model, _image(), 8, 8), calibration=[_image()])
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # weights in floats keep their mean
        sbs.compress(model, sbs.Policy.uniform(model, _image(), 32, 8, edge_bits=32), calibration=[_image()])


@pytest.mark.parametrize("kind", ["super-network", "compressed"])
def test_second_derivatives_are_refused_instead_of_wrong(kind: str):
    """The closed form has first derivatives alone; a gradient penalty would train on something else in silence."""
    net = _searching()
    net = net if kind == "super-network" else sbs.compress(net, sbs.freeze(net))
    loss, parameters = net(_image()).square().sum(), [p for n, p in net.named_parameters() if "conv_b" in n]
    first = torch.autograd.grad(loss, parameters, create_graph=True)
    with pytest.raises(RuntimeError, match="twice"):
        sum(g.square().sum() for g in first).backward()
