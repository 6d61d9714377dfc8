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
DEPTHS = ("resnet20", "resnet32")


def _step(net, x, *, autocast: bool = False) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    net.zero_grad()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        loss = F.cross_entropy(net(x).float(), torch.arange(len(x)) % 5)
    (loss + 0.1 * sbs.bop_penalty(net)).backward()
    return loss.detach(), {name: p.grad.clone() for name, p in net.named_parameters() if p.grad is not None}


def _difference(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    """Largest difference of any gradient, relative to the largest entry of that tensor."""
    assert a.keys() == b.keys()
    return max(((a[n] - b[n]).abs().max() / a[n].abs().max().clamp_min(1e-6)).item() for n in a if a[n].numel())


def _graphs() -> int:
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


@pytest.mark.timeout(400)
def test_compiled_kernels_equal_eager_ones():
    """Signed and unsigned inputs, all gate modes, channels_last, float32 and bfloat16 autocast."""
    net = (
        states.searched(networks.Inverted(), SIZE, seed=21, group_size=2).train().to(memory_format=torch.channels_last)
    )
    x = networks.images(6, SIZE, 4).contiguous(memory_format=torch.channels_last)
    loss, gradients = _step(net, x)
    loss_bf16, gradients_bf16 = _step(net, x, autocast=True)
    sbs.use_compiled(True)
    before = _graphs()
    compiled, compiled_gradients = _step(net, x)
    torch.testing.assert_close(compiled, loss, rtol=1e-4, atol=1e-5)
    assert _difference(compiled_gradients, gradients) < 2e-3
    compiled, compiled_gradients = _step(net, x, autocast=True)
    torch.testing.assert_close(compiled, loss_bf16, rtol=2e-2, atol=2e-2)
    assert compiled_gradients.keys() == gradients_bf16.keys()
    assert all(g.isfinite().all() for g in compiled_gradients.values())
    assert _graphs() > before
    small = sbs.compress(net, sbs.freeze(net)).eval()
    with torch.no_grad():
        assert torch.equal(net.eval()(x), small(x))
    assert sbs.use_compiled(True), "compilation has given up on the way"


@pytest.mark.timeout(400)
def test_graphs_are_made_per_kind_of_tensor_and_not_per_shape():
    """22 layers x 2 operands x 2 passes of ResNet-20 share a handful; other depths, batches and sizes add none."""
    torch._dynamo.reset()
    nets = {
        name: sbs.prepare(sbs.models.build(name, 5), sbs.SearchSpace(), torch.zeros(1, 3, 16, 16)) for name in DEPTHS
    }
    sbs.use_compiled(True)
    counts = []
    for (name, net), (batch, size) in zip(nets.items(), [(6, 16), (4, 20)], strict=True):
        before = _graphs()
        for _ in range(2):
            _step(net.train(), networks.images(batch, size, 1))
            sbs.after_step(net)
        counts.append(_graphs() - before)
        assert sbs.use_compiled(True), name
    assert 0 < counts[0] <= 16
    assert counts[1] == 0


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
