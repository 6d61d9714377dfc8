"""Tracing a network with torch.fx, and what of its modules is refused or warned of before anything is made of it."""

import warnings

import torch
from torch import Tensor, fx, nn
from torch.fx.passes.shape_prop import ShapeProp

from sbs.errors import SbsError
from sbs.layers import AbsorbedReLU, QuantConv2d, QuantLinear

SUPPORTED = (
    "networks are made of Conv2d, Linear, batch or group norm, element-wise activations, pooling, dropout, "
    "flatten and addition. Replace it, or keep that part outside the compressed network"
)


class Tracer(fx.Tracer):
    """Takes layers, of torch or ours, as the leaves of the graph."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Whether the graph has one node for `m`."""
        return isinstance(m, nn.Conv2d | nn.Linear | AbsorbedReLU) or super().is_leaf_module(m, module_qualified_name)


def trace(model: nn.Module, example_input: Tensor) -> fx.GraphModule:
    """The traced network in evaluation mode, with the shape of every tensor; SbsError where that is not possible."""
    training = {m: m.training for m in model.modules()}
    model.eval()
    try:
        graph = Tracer().trace(model)
        traced = fx.GraphModule(model, graph)
        with torch.no_grad():
            ShapeProp(traced).propagate(example_input)
    except SbsError:
        raise
    except Exception as error:
        raise SbsError(
            f"{type(model).__name__} cannot be traced with torch.fx on an input of shape {tuple(example_input.shape)}: "
            f"{error}. The input must fit the network, and control flow that depends on values cannot be in forward()"
        ) from error
    finally:
        for m, mode in training.items():
            m.training = mode
    return traced


def check_plain(name: str, m: nn.Conv2d | nn.Linear) -> None:
    """Refuse what replacing the module would lose: a forward() of its own, a reparametrised weight."""
    plain = (nn.Conv2d.forward, nn.Linear.forward, QuantConv2d.forward, QuantLinear.forward)
    if type(m).forward not in plain:
        raise SbsError(f"module {name!r} ({type(m).__name__}) has a forward() of its own: use a plain Conv2d or Linear")
    if "weight" not in m._parameters:  # noqa: SLF001  a parametrisation hides it there
        raise SbsError(
            f"module {name!r} ({type(m).__name__}) computes its weight (weight_norm or the like): remove that"
        )


def check_conv(name: str, m: nn.Conv2d) -> None:
    """Refuse paddings that the quantised convolution does not know."""
    if m.padding_mode != "zeros":
        raise SbsError(f"module {name!r} (Conv2d) pads with {m.padding_mode!r}: only zero padding is supported")
    if isinstance(m.padding, str):
        raise SbsError(f"module {name!r} (Conv2d) has padding={m.padding!r}: give the number of pixels instead")


def warn_of_idle_layers(model: nn.Module, called: set[str]) -> None:
    """Not refused: a head that only training calls is no part of the network that will be used."""
    layers = [name for name, m in model.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    idle = [repr(name) for name in layers if name not in called]
    if idle:
        warnings.warn(
            f"{type(model).__name__} does not call {', '.join(idle)} in evaluation: such layers stay in full "
            "precision and are not counted. If they are left over, delete them from the network",
            stacklevel=5,  # whoever called prepare()
        )
