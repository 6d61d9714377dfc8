"""ReLUs that the quantiser behind them computes as well: a pass over the feature map less in each direction (ours).

The quantiser clips anyway: it can clip at the ReLU's limits first, and leave out of its gradient what the ReLU would.
In a super-network such a ReLU lets its input through, and the layer behind it knows of it.
"""

import copy
import math
from collections import Counter

from torch import fx, nn

from sbs.graph import NORMS
from sbs.layers import AbsorbedReLU, is_hooked
from sbs.modules import put
from sbs.tracing import Tracer

_LIMITS: dict[type[nn.Module], float] = {nn.ReLU: math.inf, nn.ReLU6: 6.0}
# what these return is a tensor of its own: no other name leads to its memory
_FRESH = (nn.Conv2d, nn.Linear, nn.GroupNorm, *NORMS)


def absorbable(model: nn.Module) -> dict[str, tuple[str, float]]:
    """Layers of a float model by name, each with the ReLU in front of it that nothing else reads, and its limit.

    A copy of the model is followed in evaluation and in training, as heads that only training calls may read more.
    ReLUs called as functions, called twice, or with hooks are left alone. What torch.fx does not see cannot be heeded:
    a feature map that forward() keeps in an attribute, a hook on the block around the ReLU.
    """
    evaluation, training = (_pairs(copy.deepcopy(model).train(mode)) for mode in (False, True))
    return {layer: relu for layer, relu in evaluation.items() if training.get(layer) == relu}


def _pairs(model: nn.Module) -> dict[str, tuple[str, float]]:
    try:
        graph = Tracer().trace(model)
    except Exception:  # noqa: BLE001 - control flow that cannot be followed, in training alone: no ReLU is absorbed
        return {}
    calls = Counter(node.target for node in graph.nodes if node.op == "call_module")
    found = {}
    for node in graph.nodes:
        relu = _module(model, node)
        if relu is None or type(relu) not in _LIMITS or calls[node.target] != 1 or is_hooked(relu):
            continue
        before, readers = node.all_input_nodes[0], list(node.users)
        layer = _module(model, readers[0]) if len(readers) == 1 else None
        # read by others, what is before the ReLU could change in place before the layer reads it
        fresh = isinstance(_module(model, before), _FRESH) and len(before.users) == 1
        if isinstance(layer, nn.Conv2d | nn.Linear) and fresh:
            found[str(readers[0].target)] = (str(node.target), _LIMITS[type(relu)])
    return found


def _module(model: nn.Module, node: fx.Node) -> nn.Module | None:
    return model.get_submodule(str(node.target)) if node.op == "call_module" else None


def absorb(net: nn.Module, relu: str) -> None:
    """Let the ReLU of that name pass its input on; the layer behind it must compute it (`QuantSettings.relu`)."""
    put(net, relu, AbsorbedReLU(net.get_submodule(relu)))


def restore(net: nn.Module) -> None:
    """Put back, in place, every ReLU that was absorbed."""
    for name, m in list(net.named_modules()):
        if isinstance(m, AbsorbedReLU):
            put(net, name, m.original)
