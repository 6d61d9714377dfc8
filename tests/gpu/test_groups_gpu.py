"""The kernels over all weights on a CUDA device, and whole steps as a CUDA graph: the eager results, bit for bit."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import sbs
from sbs import compiled, weights
from tests.numerics import group_cases, networks, states

pytestmark = pytest.mark.gpu
SIZE, BATCH, STEPS = 8, 6, 3
Step = Callable[[], None]


@pytest.fixture(autouse=True)
def _compiled_kernels() -> Iterator[None]:
    before = sbs.use_compiled(True)
    with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True):
        yield
    failures = compiled.failures()
    sbs.use_compiled(before)
    assert not failures


@pytest.mark.timeout(300)
def test_all_weights_at_once_are_the_batched_calls():
    from sbs import triton_groups

    group_cases.compare(triton_groups, group_cases.LARGE, "cuda")


def test_a_table_is_made_again_when_a_weight_has_moved():
    given = group_cases.weights(group_cases.SMALL, "cuda")
    first = weights.moments(given)
    given[1] = given[1].contiguous() + 1
    second = weights.moments(given)
    want = weights._moments.eager(given, [()] * len(given))
    assert not torch.equal(first[0], second[0])
    assert all(torch.equal(a, b) for a, b in zip(second, want, strict=True))


def _network(kind: str) -> nn.Module:
    """On the device, always the same: a search with gates of every kind closed in part, or what it is compressed to."""
    torch.manual_seed(0)
    net = states.searched(networks.Inverted(), SIZE, seed=5, group_size=2)
    net = sbs.compress(net, sbs.freeze(net)) if kind == "fixed bits" else net
    return net.to("cuda", memory_format=torch.channels_last).train()


def _step(net: nn.Module, x: Tensor, autocast: bool) -> Step:
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)
    labels = torch.arange(BATCH, device="cuda") % 5

    def step() -> None:
        optimizer.zero_grad()
        with torch.autocast("cuda", dtype=torch.bfloat16, enabled=autocast):
            logits = net(x)
        loss = F.cross_entropy(logits.float(), labels)
        if isinstance(net, sbs.SuperNet):
            loss = loss + 0.3 * sbs.bop_penalty(net)
        loss.backward()
        optimizer.step()
        sbs.after_step(net, 4 * STEPS)

    return step


def _captured(step: Step) -> Step:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def _run(kind: str, autocast: bool, *, graph: bool) -> dict[str, Tensor]:
    """The state after as many steps with every second image batch another one, the last of them as a graph."""
    net = _network(kind)
    x = torch.empty(BATCH, 3, SIZE, SIZE, device="cuda").contiguous(memory_format=torch.channels_last)
    step = _step(net, x, autocast)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for seed in range(STEPS):
            x.copy_(networks.images(BATCH, SIZE, seed, torch.float32))
            step()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    step = _captured(step) if graph else step
    for seed in range(STEPS, 2 * STEPS):
        x.copy_(networks.images(BATCH, SIZE, seed, torch.float32))
        step()
    torch.cuda.synchronize()
    state = {name: value.clone() for name, value in net.state_dict().items()}
    with torch.no_grad():
        state["logits"] = net.eval()(x)
    return state


@pytest.mark.timeout(300)
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("kind", ["search", "fixed bits"])
def test_a_captured_step_replays_to_the_same_network(kind, autocast):
    want, again, got = (_run(kind, autocast, graph=graph) for graph in (False, False, True))
    start = _network(kind).state_dict()
    assert any(not torch.equal(start[name], value) for name, value in want.items() if name.endswith("weight"))
    for name, value in want.items():
        assert torch.equal(again[name], value), f"{name} of a second run"
        assert torch.equal(got[name], value), f"{name} of a captured step"


def test_a_step_waits_for_nothing():
    """No copy to the host, no decision there, once tables and momenta are made."""
    for kind in ("search", "fixed bits"):
        net = _network(kind)
        step = _step(net, networks.images(BATCH, SIZE, 1, torch.float32).to("cuda"), autocast=True)
        step()
        step()
        torch.cuda.set_sync_debug_mode("error")
        try:
            step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
