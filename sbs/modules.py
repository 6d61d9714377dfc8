"""Trees of modules: what wrappers hold, and putting a module in another's place."""

from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

from sbs.errors import SbsError

_WRAPPERS = (DataParallel, DistributedDataParallel, AveragedModel)


def unwrapped(net: nn.Module) -> nn.Module:
    """The network itself, out of DDP, torch.compile or an averaged model; SbsError for what is no module."""
    while isinstance(net, nn.Module):
        if isinstance(net, _WRAPPERS):
            net = net.module
        elif type(net).__name__ == "OptimizedModule":  # torch.compile's, which takes seconds to import
            net = net.get_submodule("_orig_mod")
        else:
            return net
    raise SbsError(f"a network (torch.nn.Module) is wanted here, not a {type(net).__name__}")


def first_parameter(model: nn.Module) -> nn.Parameter:
    """A parameter that tells the network's device and type; SbsError for a network without any."""
    parameter = next(model.parameters(), None)
    if parameter is None:
        raise SbsError(f"{type(model).__name__} has no parameters: there is nothing to compress")
    return parameter


def put(net: nn.Module, name: str, new: nn.Module) -> None:
    """Put `new` in the place of the submodule of that name, under every name that this one has in `net`."""
    old = net.get_submodule(name)
    for place in [n for n, m in net.named_modules(remove_duplicate=False) if m is old]:
        net.set_submodule(place, new)
