"""Launches of a step on a GPU, counted without one: the calls that would launch, with the CPU in the GPU's place.

Views, allocations and what the host does launch nothing; kernels of ours count with what they launch in Triton.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import sbs
from sbs import compiled, integer, quantizer, siblings
from sbs.layers import QuantizedLayer
from sbs.supernet import SuperNet

SIZE, BATCH = 8, 2
LIMIT = 1.6
# of `triton_kernels` and `triton_groups`: a pass, and where there are sums a kernel that adds them up
OWN = {
    "encode": 1,
    "encode_with_sums": 2,
    "backward": 2,
    "backward_with_codes": 2,
    "moments of all weights": 2,
    "encode of all weights": 1,
    "statistics of all weights": 2,
    "importance of all weights": 11,
}
FREE = (
    *("view", "permute", "transpose", "slice", "select", "unbind", "split", "detach", "alias", "expand", "t.", "as_"),
    *("_unsafe_view", "_reshape_alias", "squeeze", "unsqueeze", "set_", "empty", "new_empty", "resize_", "lift_fresh"),
    "profiler",
)
# tensors that one multi-tensor launch takes
MANY = 60


class Launches(TorchDispatchMode):
    """Counts by name of what is called while it is entered."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func).removeprefix("aten.")
        if not name.startswith(FREE):
            self.found[name] += _count(name, args)
        return func(*args, **(kwargs or {}))

    def own(self, name: str, function: Callable[[], Any]) -> Any:
        """What a kernel of ours returns, computed by other means."""
        self.found[name] += OWN[name]
        with torch._C._DisableTorchDispatch():
            return function()


def _count(name: str, args: Any) -> int:
    if name.startswith("convolution_backward"):
        return sum(args[-1])  # a kernel for each gradient that is wanted
    if not name.startswith("_foreach"):
        return 1
    first, *others = [a for a in args if isinstance(a, list | tuple) and a and isinstance(a[0], Tensor)]
    alike = all(a.shape == b.shape for other in others for a, b in zip(first, other, strict=True))
    return len(first) // MANY + 1 if alike else len(first)


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Iterator[Launches]:
    """The CPU takes every turn that a GPU takes."""
    counter = Launches()

    def own(kernel: Any, operand: Any, form: Any, args: Any) -> Any:
        return counter.own(kernel.name, lambda: kernel.eager(operand, form, *args))

    def of_all(function: Any, weights: Any, args: Any) -> Any:
        before = sbs.use_compiled(False)  # what it calls is its own affair
        found = counter.own(function.name, lambda: function.eager(weights, *args))
        sbs.use_compiled(before)
        return [codes.to(args[-1]) for codes in found] if function.kernel == "encode" else found

    monkeypatch.setitem(compiled._ROADS, "cpu", own)
    monkeypatch.setitem(compiled._GROUPED_ROADS, "cpu", of_all)
    monkeypatch.setattr(siblings, "_LAUNCHING", ("cpu",))
    monkeypatch.setattr(integer, "available", lambda: False)
    monkeypatch.setattr(quantizer, "_own", lambda gates: gates.detach())
    monkeypatch.setattr(QuantizedLayer, "keep", lambda self, masks: setattr(self, "kept", masks))
    monkeypatch.setattr(SuperNet, "leave_moments", lambda self, means, stds: None)
    before = sbs.use_compiled(True)
    yield counter
    sbs.use_compiled(before)


def _made(model: str, kind: str) -> nn.Module:
    torch.manual_seed(0)
    net, x = sbs.models.build(model, 10), torch.randn(BATCH, 3, SIZE, SIZE)
    if kind == "search":
        net = sbs.prepare(net, sbs.SearchSpace(), x, absorb_relus=True)
        sbs.calibrate(net, [x])
    elif kind == "fixed bits":
        net = sbs.compress(net, sbs.Policy.uniform(net, x, 4, 4), example_input=x, calibration=[x])
    return net.train()


def _of_a_step(launches: Launches, model: str, kind: str) -> tuple[int, int]:
    """Launches of a third step, before `after_step` and in it."""
    net = _made(model, kind)
    x, labels = torch.randn(BATCH, 3, SIZE, SIZE), torch.arange(BATCH)
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-3, momentum=0.9, foreach=True)

    def step() -> None:
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits = net(x)
        loss = F.cross_entropy(logits.float(), labels)
        if kind == "search":
            loss = loss + 0.1 * sbs.bop_penalty(net)
        loss.backward()
        optimizer.step()

    for _ in range(2):
        step()
        sbs.after_step(net)
    launches.found.clear()
    with launches:
        step()
        before = launches.found.total()
        sbs.after_step(net)
    return before, launches.found.total() - before


@pytest.fixture
def count(launches: Launches) -> Callable[[str, str], tuple[int, int]]:
    return lambda model, kind: _of_a_step(launches, model, kind)


def test_a_step_of_a_fixed_bit_network(count):
    whole = {kind: sum(count("resnet20", kind)) for kind in ("full precision", "fixed bits")}
    assert 200 < whole["full precision"] < 300  # 20 convolutions and norms, thrice, and what is between them
    assert whole["fixed bits"] < LIMIT * whole["full precision"]


def test_layers_of_a_search(count):
    """What a search takes for its gates is the same at any depth; what it takes for a layer has a limit."""
    (plain, _), (search, after) = count("resnet20", "full precision"), count("resnet20", "search")
    (deep_plain, _), (deep_search, deep_after) = count("resnet56", "full precision"), count("resnet56", "search")
    assert deep_search - search < LIMIT * (deep_plain - plain)
    assert deep_after < after + 10  # multi-tensor calls take their tensors in more than one launch
    assert search < plain * LIMIT + 60
