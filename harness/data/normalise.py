"""Bytes to normalised numbers on a device, by a look into a table.

A byte has 256 values, so a table of three rows holds every number that can come out, made in float64 and rounded once.
The CPU's loaders use the same table: all devices, and both roads here, deliver the same bits.

The Triton kernel reads a byte and writes a number, 3 bytes of traffic a value in bfloat16 and 5 in float32, in a single
launch; the table stays in the first-level cache. Arithmetic would move as many bytes. The plain road, for a torch
without Triton or a machine without a C compiler, takes two launches and 19 or 21 bytes: its index has 8.
"""

import functools
import logging
from collections.abc import Callable

import torch
from torch import Tensor

log = logging.getLogger(__name__)

Normalise = Callable[[Tensor, Tensor, Tensor], None]


def normalise(levels: Tensor, table: Tensor, out: Tensor) -> None:
    """out[..., c] = table[c, levels[..., c]]: levels uint8, table (3, 256), out of the table's type; contiguous."""
    road = plain if levels.device.type == "cpu" else _fast()
    road(levels, table, out)


def plain(levels: Tensor, table: Tensor, out: Tensor) -> None:
    """`normalise` in operations that any torch has on any device."""
    rows = torch.arange(0, table.numel(), table.shape[1], device=levels.device)
    torch.take(table, torch.add(levels, rows), out=out)


@functools.cache
def _fast() -> Normalise:
    """The Triton kernel if it can be built here, else the plain road; tried once."""
    try:
        from harness.data.normalise_triton import launch

        levels = torch.zeros(3, dtype=torch.uint8, device="cuda")
        table = torch.zeros(3, 256, device="cuda")
        launch(levels, table, torch.empty(3, device="cuda"))
    except Exception as error:  # noqa: BLE001 - a compiler that is missing or fails; the plain road gives the same
        log.warning("images are normalised without Triton: %s: %s", type(error).__name__, error)
        return plain
    return launch
