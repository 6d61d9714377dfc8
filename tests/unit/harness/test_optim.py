import copy

import pytest
import torch
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import sbs
from harness.config import SearchConfig, TrainConfig, load_recipe
from harness.optim import averaged, build_optimizer, lr_factor, set_lr


def stage(**values: object) -> TrainConfig:
    return TrainConfig.model_validate({"epochs": 4, "lr": 0.1} | values)


def supernet() -> sbs.SuperNet:
    return sbs.prepare(sbs.models.build("resnet20", 10), sbs.SearchSpace(), torch.zeros(1, 3, 8, 8))


def test_every_trainable_parameter_is_in_one_group_and_only_weights_decay():
    net = supernet()
    search = load_recipe("digits_resnet20", ["search.weight_decay=0.01"]).search
    groups = {group["name"]: group for group in build_optimizer(net, search, 64).param_groups}
    counted = [id(p) for group in groups.values() for p in group["params"]]
    assert sorted(counted) == sorted(id(p) for p in net.parameters() if p.requires_grad and p.numel())
    assert {name: group["weight_decay"] for name, group in groups.items() if group["weight_decay"]} == {"decay": 0.01}
    assert all(p.dim() > 1 for p in groups["decay"]["params"])


def test_clips_have_a_learning_rate_of_their_own_that_does_not_scale_and_thresholds_have_none():
    search = load_recipe("digits_resnet20").search.model_copy(update={"lr": 0.1, "lr_batch_size": 32, "clip_lr": 0.02})
    net = supernet()
    groups = build_optimizer(net, search, 64).param_groups
    assert {g["name"]: g["lr"] for g in groups} == {"decay": 0.2, "no_decay": 0.2, "clips": 0.02}
    moved = {p.data_ptr() for g in groups for p in g["params"]}
    assert not moved & {bank.thresholds.data_ptr() for bank in net.banks()}


def test_clips_follow_the_weights_unless_told_otherwise():
    rates = {
        g["name"]: g["lr"]
        for g in build_optimizer(supernet(), SearchConfig(epochs=1, lr=0.3, **{"lambda": 0}), 1).param_groups
    }
    assert rates["clips"] == 0.3


@pytest.mark.parametrize(("name", "kind"), [("sgd", torch.optim.SGD), ("adamw", torch.optim.AdamW)])
def test_optimizers(name: str, kind: type):
    optimizer = build_optimizer(sbs.models.build("resnet20", 10), stage(optimizer=name, weight_decay=0.1), 64)
    assert type(optimizer) is kind
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]


# 10 steps an epoch, 4 epochs
@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"schedule": "constant"}, {0: 1.0, 39: 1.0}),
        ({"schedule": "cosine"}, {0: 1.0, 10: 0.8535533906, 20: 0.5, 30: 0.1464466094}),
        ({"schedule": "cosine", "final_lr_share": 0.1}, {0: 1.0, 20: 0.55, 40: 0.1}),
        ({"schedule": "cosine", "warmup_epochs": 1}, {0: 0.1, 4: 0.5, 9: 1.0, 10: 1.0, 25: 0.5, 40: 0.0}),
        ({"schedule": "step", "step_epochs": [2, 3]}, {0: 1.0, 19: 1.0, 20: 0.1, 29: 0.1, 30: 0.01}),
        ({"schedule": "step", "step_epochs": [2], "step_factor": 0.5, "warmup_epochs": 0.5}, {0: 0.2, 5: 1.0, 20: 0.5}),
        ({"schedule": "one_cycle", "warmup_epochs": 2}, {0: 0.05, 19: 1.0, 20: 1.0, 30: 0.5, 40: 0.0}),
    ],
)
def test_schedules(values: dict[str, object], expected: dict[int, float]):
    found = {step: lr_factor(stage(**values), step, 10) for step in expected}
    assert found == pytest.approx(expected, abs=1e-9)


def test_set_lr_is_relative_to_each_groups_peak():
    optimizer = build_optimizer(supernet(), load_recipe("digits_resnet20").search, 64)
    set_lr(optimizer, 0.5)
    assert all(group["lr"] == group["peak_lr"] / 2 for group in optimizer.param_groups)


def test_averaged_weights_against_a_loop_by_hand():
    net = torch.nn.Linear(3, 2)
    average = averaged(net, 0.9)
    by_hand = None
    for value in [1.0, 2.0, 4.0]:
        with torch.no_grad():
            net.weight.fill_(value)
        average.update_parameters(net)
        by_hand = value if by_hand is None else 0.9 * by_hand + 0.1 * value
    assert average.module.weight.unique().tolist() == pytest.approx([by_hand])


def test_averaging_is_torchs_to_the_bit_also_after_a_resume():
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.Linear(2, 2).double())
    theirs = AveragedModel(net, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    ours = averaged(net, 0.9)
    for step in range(5):
        if step == 3:
            saved, ours = ours.state_dict(), averaged(net, 0.9)
            ours.load_state_dict(saved)
        for tensor in (*net.parameters(), *net.buffers()):
            tensor.data = (tensor + torch.randn(tensor.shape)).to(tensor.dtype)
        ours.update_parameters(net)
        theirs.update_parameters(net)
        assert ours.state_dict().keys() == theirs.state_dict().keys()
        for name, value in theirs.state_dict().items():
            assert torch.equal(ours.state_dict()[name], value), (step, name)


def test_averaged_networks_take_over_buffers():
    net = torch.nn.BatchNorm1d(2)
    average = averaged(copy.deepcopy(net), 0.9)
    net.running_mean.fill_(7)
    average.update_parameters(net)
    assert average.module.running_mean.tolist() == [7, 7]
