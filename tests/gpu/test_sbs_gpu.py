"""The method on a CUDA device: the same gates, codes and networks as on the CPU, in whatever arithmetic is fast there.

Every check takes its device and runs on the CPU, too, where it says little about sbs, but keeps the check itself sound.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

import sbs
from sbs import compiled
from tests.numerics import networks, states

SIZE, BATCH = 8, 6
SEARCH = 200  # steps of a whole search: thresholds move by a few hundredths in each
CUDA = pytest.param("cuda", marks=pytest.mark.gpu)
KINDS = ("residual", "inverted", "signed")


@pytest.fixture(params=["cpu", CUDA])
def device(request: pytest.FixtureRequest) -> str:
    """Where the network under test lies; its twin stays on the CPU."""
    return str(request.param)


@pytest.fixture(autouse=True)
def _eager_kernels() -> Iterator[None]:
    before = sbs.use_compiled(False)
    yield
    sbs.use_compiled(before)


def _searched(kind: str, dtype: torch.dtype = torch.float32, **space: object) -> nn.Module:
    """On the CPU, always the same, with gates of every kind closed in part."""
    torch.manual_seed(0)
    return states.searched(networks.USER_NETWORKS[kind](), SIZE, seed=5, dtype=dtype, group_size=2, **space)


def _images(seed: int, device: str, dtype: torch.dtype = torch.float32) -> Tensor:
    return networks.images(BATCH, SIZE, seed, dtype).to(device)


def _logits(net: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return net.eval()(x)


def _loss(net: nn.Module, x: Tensor, autocast: torch.dtype | None = None) -> Tensor:
    with torch.autocast(x.device.type, dtype=autocast, enabled=autocast is not None):
        logits = net(x)
    loss = F.cross_entropy(logits.float() if autocast else logits, torch.arange(BATCH, device=x.device) % 5)
    return loss + 0.1 * sbs.bop_penalty(net)


def _train(net: nn.Module, steps: int, device: str, dtype: torch.dtype, autocast: torch.dtype | None = None) -> float:
    optimizer = torch.optim.SGD(net.train().parameters(), lr=0.05, momentum=0.9)
    losses = []
    for step in range(steps):
        optimizer.zero_grad()
        x = _images(10 + step, device, dtype)
        if autocast is not None:
            x = x.contiguous(memory_format=torch.channels_last)
        loss = _loss(net, x, autocast)
        loss.backward()
        optimizer.step()
        sbs.after_step(net, steps=SEARCH)
        losses.append(float(loss.detach()))
    return losses[-1]


def _where(net: nn.Module) -> set[str]:
    return {t.device.type for t in itertools.chain(net.parameters(), net.buffers())}


def _far(a: Tensor, b: Tensor) -> float:
    """Largest difference relative to the largest entry."""
    a, b = a.detach().cpu().double(), b.detach().cpu().double()
    return float((a - b).abs().max() / b.abs().max())


@pytest.mark.parametrize("kind", KINDS)
def test_search_steps_are_those_of_the_cpu(device, kind):
    """In float64, where no rounding flips a code: losses, weights, clips, thresholds, statistics and gates."""
    here = _searched(kind, torch.float64).to(device)
    there = _searched(kind, torch.float64)
    assert _train(here, 3, device, torch.float64) == pytest.approx(_train(there, 3, "cpu", torch.float64), rel=1e-9)
    assert _where(here) == {device}
    for (name, a), b in zip(here.state_dict().items(), there.state_dict().values(), strict=True):
        torch.testing.assert_close(a.cpu(), b, rtol=1e-6, atol=1e-8, msg=lambda m, n=name: f"{n}: {m}")
        if name.endswith((".open", ".flips")):
            assert torch.equal(a.cpu(), b), name
    assert sbs.freeze(here) == sbs.freeze(there)
    for key, value in sbs.telemetry(there).items():
        assert sbs.telemetry(here)[key] == pytest.approx(value, abs=1e-6), key


@pytest.mark.parametrize("kind", KINDS)
def test_searched_and_compressed_networks_agree(device, kind):
    """To the bit where sums of integers are plain sums; cuDNN may transform (Winograd, FFT), which rounds them."""
    net = _searched(kind).to(device)
    small = sbs.compress(net, sbs.freeze(net))
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in net.model.parameters())
    assert _where(small) == {device}
    x = _images(3, device)
    with torch.backends.cudnn.flags(enabled=False):
        assert torch.equal(_logits(net, x), _logits(small, x))
    assert _far(_logits(small, x), _logits(net, x)) < 0.02
    double = _far(_logits(small.double(), x.double()), _logits(net.double(), x.double()))
    assert double < 1e-9


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_uniform_networks_equal_the_super_network_of_one_candidate(device, dtype):
    """The same shapes on both sides, so the same library kernels: equal to the bit in any arithmetic."""
    net = _searched("residual", weight_bits=(4,), activation_bits=(4,), prune=False).to(device)
    small = sbs.compress(net, sbs.freeze(net))
    x = _images(3, device).contiguous(memory_format=torch.channels_last)
    with torch.autocast(device, dtype=torch.bfloat16, enabled=dtype is torch.bfloat16):
        assert torch.equal(_logits(net, x), _logits(small, x))


def test_wide_codes_are_not_rounded_to_tf32(device):
    """TF32 has 11 significant bits: measured with codes rounded to those 4e-4 to 6e-4, with whole ones 2e-5 to 5e-5."""
    torch.manual_seed(0)
    net = sbs.prepare(networks.Residual(), sbs.SearchSpace((16,), (16,), edge_bits=16), torch.zeros(1, 3, SIZE, SIZE))
    sbs.calibrate(net, [_images(1, "cpu")])
    net.to(device)
    x = _images(2, device)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=True):
            single = _logits(net, x)
            assert torch.backends.cudnn.allow_tf32
    finally:
        torch.set_float32_matmul_precision(before)
    assert _far(single, _logits(net.double(), x.double())) < 1.5e-4


@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16])
def test_a_step_under_autocast_in_channels_last_has_the_gates_of_a_whole_one(device, low):
    fast = _searched("inverted").to(device, memory_format=torch.channels_last)
    whole = _searched("inverted").to(device)
    loss = _train(fast, 1, device, torch.float32, autocast=low)
    assert loss == pytest.approx(_train(whole, 1, device, torch.float32), rel=0.1)
    assert all(p.grad.isfinite().all() for p in fast.parameters() if p.grad is not None)
    assert all(p.grad is not None for p in fast.parameters() if p.numel())
    for side in ("weight", "activation", "channel"):
        ours, theirs = (getattr(net, f"{side}_gates") for net in (fast, whole))
        # thresholds start at least 0.05 from their statistic, and a step moves neither that far
        torch.testing.assert_close(ours.statistic, theirs.statistic, rtol=0, atol=0.03)
        assert torch.equal(ours.open, theirs.open)
    assert sbs.freeze(fast) == sbs.freeze(whole)


@pytest.mark.parametrize("compressed", [False, True])
def test_a_move_takes_everything_along(device, compressed):
    net = _searched("inverted")
    net = sbs.compress(net, sbs.freeze(net)) if compressed else net
    net.train()(_images(4, "cpu"))  # what it left for after_step has to move, too
    net.to(device)
    assert _where(net) == {device}
    sbs.after_step(net)
    want = _logits(net.to("cpu"), _images(3, "cpu"))
    assert _where(net) == {"cpu"}
    assert _far(_logits(net.to(device), _images(3, device)), want) < 0.05
    state = {name: value.clone() for name, value in net.state_dict().items()}
    there_and_back = net.cpu().to(device).state_dict()
    for name, value in there_and_back.items():
        assert torch.equal(value, state[name]), name
        assert value.device.type == device or name == "_extra_state"


def test_a_checkpoint_of_the_device_loads_on_the_cpu(device, tmp_path):
    net = _searched("inverted").to(device)
    _train(net, 2, device, torch.float32)
    torch.save(net.state_dict(), tmp_path / "net.pt")
    again = sbs.prepare(networks.Inverted(), net.space, torch.zeros(1, 3, SIZE, SIZE))
    again.load_state_dict(torch.load(tmp_path / "net.pt", weights_only=True, map_location="cpu"))
    assert _where(again) == {"cpu"}
    assert sbs.freeze(again) == sbs.freeze(net)
    assert _far(_logits(again, _images(3, "cpu")), _logits(net, _images(3, device))) < 0.05
    assert torch.equal(_logits(again, _images(3, "cpu")), _logits(net.cpu(), _images(3, "cpu")))


def test_an_export_of_the_device_loads_on_the_cpu(device, tmp_path):
    net = _searched("inverted").to(device)
    small = sbs.compress(net, sbs.freeze(net)).eval()
    sbs.export(small, tmp_path / "net.sbs")
    again = sbs.load_exported(tmp_path / "net.sbs", networks.Inverted(), torch.zeros(1, 3, SIZE, SIZE))
    assert _where(again) == {"cpu"}
    assert _far(_logits(again, _images(3, "cpu")), _logits(small, _images(3, device))) < 0.05


def test_a_step_in_a_process_group_of_the_device_is_the_same_step(device, tmp_path):
    """NCCL on a GPU: the all-reduce of the statistics takes place where they lie. Float64, or a code might flip."""
    # made before there is a group: calibration on the CPU would average over one that knows GPUs alone
    alone, grouped = (_searched("residual", torch.float64).to(device) for _ in range(2))
    _train(alone, 2, device, torch.float64)
    backend = "nccl" if device == "cuda" else "gloo"
    dist.init_process_group(backend, init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    try:
        _train(grouped, 2, device, torch.float64)
    finally:
        dist.destroy_process_group()
    assert sbs.freeze(grouped) == sbs.freeze(alone)
    for (name, a), b in zip(grouped.state_dict().items(), alone.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-8, msg=lambda m, n=name: f"{n}: {m}")


def compare_compiled_step(device: str) -> None:
    """Loss and gradients of a step, float32 and bfloat16 autocast; then both networks of a freeze, to the bit."""
    net = _searched("inverted").to(device, memory_format=torch.channels_last).train()
    x = _images(4, device).contiguous(memory_format=torch.channels_last)
    for autocast, tolerance in ((None, 2e-3), (torch.bfloat16, 5e-2)):
        results = []
        for enabled in (False, True):
            sbs.use_compiled(enabled)
            net.zero_grad()
            loss = _loss(net, x, autocast)
            loss.backward()
            results.append((loss.detach(), {n: p.grad.clone() for n, p in net.named_parameters() if p.numel()}))
        (loss, gradients), (ours, our_gradients) = results
        torch.testing.assert_close(ours, loss, rtol=tolerance, atol=tolerance)
        together = [torch.cat([g[n].flatten() for n in gradients]) for g in (our_gradients, gradients)]
        assert torch.linalg.norm(together[0] - together[1]) < tolerance * torch.linalg.norm(together[1])
    small = sbs.compress(net, sbs.freeze(net))
    with torch.backends.cudnn.flags(enabled=False):
        assert torch.equal(_logits(net, x), _logits(small, x))
    assert not compiled.failures()


@pytest.mark.gpu
@pytest.mark.timeout(600)
def test_a_compiled_step_is_the_eager_one():
    compare_compiled_step("cuda")
