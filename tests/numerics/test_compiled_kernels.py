"""The compiled kernels compute what the eager ones do, with few graphs, under autocast, or not at all."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from torch.nn import functional as F

import sbs
from tests.numerics import networks, states

SIZE = 8


def _step(net, x, *, autocast: bool = False) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    net.zero_grad()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        loss = F.cross_entropy(net(x).float(), torch.arange(len(x)) % 5)
    (loss + 0.1 * sbs.bop_penalty(net)).backward()
    return loss.detach(), {name: p.grad.clone() for name, p in net.named_parameters() if p.grad is not None}


def _net(kind: str, seed: int):
    net = states.searched(networks.USER_NETWORKS[kind](), SIZE, seed=seed, group_size=2).train()
    return net.to(memory_format=torch.channels_last)


def _difference(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    """Largest difference of any gradient, relative to the largest entry of that tensor."""
    assert a.keys() == b.keys()
    return max(((a[n] - b[n]).abs().max() / a[n].abs().max().clamp_min(1e-6)).item() for n in a if a[n].numel())


@pytest.mark.timeout(400)
def test_compiled_kernels_equal_eager_ones_with_few_graphs():
    nets = {kind: _net(kind, 21) for kind in ("inverted", "signed", "residual")}
    x = networks.images(6, SIZE, 4).contiguous(memory_format=torch.channels_last)
    eager = {kind: _step(net, x) for kind, net in nets.items()}
    eager_bf16 = {kind: _step(net, x, autocast=True) for kind, net in nets.items()}
    sbs.use_compiled(True)
    counter = torch._dynamo.utils.counters["stats"]
    graphs = []
    for kind, net in nets.items():
        loss, gradients = _step(net, x)
        torch.testing.assert_close(loss, eager[kind][0], rtol=1e-4, atol=1e-5)
        assert _difference(gradients, eager[kind][1]) < 2e-3, kind
        loss, gradients = _step(net, x, autocast=True)
        torch.testing.assert_close(loss, eager_bf16[kind][0], rtol=2e-2, atol=2e-2)
        graphs.append(counter["unique_graphs"])
    assert sbs.use_compiled(True), "compilation must not have given up on the way"
    # 4 kernels x 6 kinds of tensor x 2 types; the compiler splits again at reductions of 4,096 elements
    assert 0 < graphs[-1] <= 48
    _step(nets["residual"], networks.images(3, 12, 5))  # another batch, another image size: every kind has been seen
    assert counter["unique_graphs"] == graphs[-1]


SCRIPT = """
import warnings, torch, sbs
from tests.numerics import networks, states
sbs.use_compiled(False)
net = states.searched(networks.Residual(), 8, seed=22, group_size=2)
x = networks.images(6, 8, 4)
want = net(x)
sbs.use_compiled(True)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    got = [net(x) for _ in range(2)]
    got[-1].sum().backward()
assert all(torch.equal(g, want) for g in got)
ours = [str(w.message) for w in caught if "torch.compile failed" in str(w.message)]
print(len(ours), sbs.use_compiled(True))
"""


def test_without_a_compiler_the_kernels_run_eagerly_after_one_warning(tmp_path):
    environment = os.environ | {"CXX": str(tmp_path / "no-such-compiler"), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-c", SCRIPT]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split() == ["1", "False"]
