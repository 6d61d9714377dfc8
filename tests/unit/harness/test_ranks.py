import pytest
import torch
from torch import nn

from harness.config import RunConfig
from harness.errors import UserError
from harness.ranks import joined, norm_statistics, seed_step, set_norm_statistics


def draws(seed: int, rank: int, step: int) -> list[float]:
    seed_step(seed, rank, step)
    return torch.rand(4).tolist()


def test_random_draws_are_a_function_of_seed_rank_and_step():
    places = [(0, 0, 0), (0, 0, 1), (0, 1, 0), (1, 0, 0), (1, 1, 1), (7, 3, 10**6)]
    first = [draws(*place) for place in places]
    assert [draws(*place) for place in reversed(places)] == first[::-1]
    assert len({tuple(each) for each in first}) == len(places)


def test_batch_norm_statistics_go_out_and_come_back():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Sequential(nn.BatchNorm2d(4)), nn.GroupNorm(2, 4))
    net(torch.randn(2, 3, 8, 8))
    told = norm_statistics(net)
    assert told.shape == (16,)
    assert told[:4].equal(net[1].running_mean)
    set_norm_statistics(net, torch.arange(16.0))
    assert net[2][0].running_var.tolist() == [12, 13, 14, 15]
    assert norm_statistics(net).tolist() == list(range(16))
    assert norm_statistics(nn.Linear(2, 2)).numel() == 0


def test_a_process_of_its_own_is_the_only_rank(monkeypatch: pytest.MonkeyPatch):
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    with joined(RunConfig()) as ranks:
        assert (ranks.rank, ranks.world, ranks.backend, ranks.main) == (0, 1, "none", True)
        assert ranks.max(3) == 3
        assert ranks.share({"a": [1, None]}) == {"a": [1, None]}
        assert ranks.strings("x") == ["x"]
        assert ranks.sum(torch.tensor([1, 2])).tolist() == [1.0, 2.0]


def test_gpus_that_are_not_there_are_a_mistake_of_the_recipe(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with (
        pytest.raises(UserError, match=r"run.gpus_per_worker = 1, but .* no CUDA device"),
        joined(RunConfig(gpus_per_worker=1)),
    ):
        pass


def test_more_ranks_than_devices_are_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    with (
        pytest.raises(UserError, match=r"4 ranks were started .* shows 2 CUDA device.*--nproc-per-node"),
        joined(RunConfig(workers=4, gpus_per_worker=1)),
    ):
        pass
