"""Numbers that the host knows, on a device: sent there once, for as long as they stay the same."""

from collections import OrderedDict

import torch
from torch import Tensor

_MOST = 256
_sent: OrderedDict[tuple[object, ...], Tensor] = OrderedDict()
_captured: dict[tuple[object, ...], Tensor] = {}
"""What CUDA graphs read, wherever they are."""


def constant(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor | None:
    """`values` as a tensor that nobody may write to; no wait for the device.

    None while a CUDA graph is captured that needs numbers not sent before: it would send them at every replay, from
    memory that is gone by then.
    """
    key = (values, dtype, device)
    captures = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
    found = _sent.get(key)
    if found is None and not captures:
        with torch.inference_mode(False):  # whose tensors serve nothing else
            made = torch.tensor(values, dtype=dtype)
            made = made.pin_memory() if device.type == "cuda" else made
            found = _sent[key] = made.to(device, non_blocking=True)
        if len(_sent) > _MOST:
            _sent.popitem(last=False)
    elif found is not None:
        _sent.move_to_end(key)
        if captures:
            _captured[key] = found
    return found
