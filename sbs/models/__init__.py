"""The networks that the project reports on, built by name."""

import difflib

from torch import nn

from sbs.errors import SbsError
from sbs.models import mobilenetv2, resnet

_BUILDERS = {**resnet.BUILDERS, **mobilenetv2.BUILDERS}
NAMES = tuple(_BUILDERS)


def build(name: str, num_classes: int) -> nn.Module:
    """Build a freshly initialised network. Raises SbsError for an unknown name or fewer than one class."""
    if name not in _BUILDERS:
        close = difflib.get_close_matches(name, NAMES, n=1)
        hint = f"did you mean {close[0]!r}? " if close else ""
        raise SbsError(f"model {name!r} is unknown; {hint}known models: {', '.join(NAMES)}")
    if num_classes < 1:
        raise SbsError(f"num_classes={num_classes}: a classifier has at least one class")
    return _BUILDERS[name](num_classes)
