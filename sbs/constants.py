"""Numbers that the host knows, on a device: sent there once, for as long as they stay the same."""

from collections import OrderedDict

import torch
from torch import Tensor

_MOST = 256
_sent: OrderedDict[tuple[object, ...], Tensor] = OrderedDict()


def constant(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor | None:
    """`values` as a tensor that nobody may write to; no wait for the device.

    None while a CUDA graph is captured that needs numbers not sent before: it would send them at every replay, from
    memory that is gone by then.
    """
    key = (values, dtype, device)
    found = _sent.get(key)
    if found is not None:
        _sent.move_to_end(key)
        return found
    made = torch.tensor(values, dtype=dtype)
    if device.type == "cuda":
        if torch.cuda.is_current_stream_capturing():
            return None
        made = made.pin_memory()
    made = made.to(device, non_blocking=True)
    _sent[key] = made
    if len(_sent) > _MOST:
        _sent.popitem(last=False)
    return made
