"""How busy this process keeps its machine, sampled once an epoch; no package is needed, and no other process."""

import os
import time
from importlib import import_module
from typing import Any

import torch

_GIB = 2.0**30


class Sampler:
    """Figures `system/...` since the last sample, for metrics that MLflow shows under system metrics."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._gpu = _handle(device)
        self._before = (time.monotonic(), _cpu_s())

    def sample(self) -> dict[str, float]:
        """CPU of this process in percent (100 is one core), machine load, memory in GiB; the GPU if there is one.

        `system/gpu_percent` needs the package pynvml (nvidia-ml-py) and is left out without it.
        """
        now, before = (time.monotonic(), _cpu_s()), self._before
        self._before = now
        figures = {
            "system/cpu_percent": 100.0 * (now[1] - before[1]) / max(now[0] - before[0], 1e-9),
            "system/load_1min": os.getloadavg()[0],
            "system/rss_gib": _rss_bytes() / _GIB,
        }
        if self._device.type == "cuda":
            free, total = torch.cuda.mem_get_info(self._device)
            figures["system/gpu_memory_gib"] = (total - free) / _GIB
        if self._gpu is not None:
            library, handle = self._gpu
            figures["system/gpu_percent"] = float(library.nvmlDeviceGetUtilizationRates(handle).gpu)
        return figures


def _cpu_s() -> float:
    """CPU seconds of this process, its threads and the children that have ended."""
    return sum(os.times()[:4])


def _rss_bytes() -> int:
    with open("/proc/self/statm", encoding="ascii") as file:  # noqa: PTH123 - not a file that a Path says more about
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _handle(device: torch.device) -> tuple[Any, Any] | None:
    """NVIDIA's library and its handle of the device, found by its identity: CUDA may number devices otherwise."""
    if device.type != "cuda":
        return None
    try:
        library = import_module("pynvml")
    except ImportError:
        return None
    try:
        library.nvmlInit()
        identity = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
        return library, library.nvmlDeviceGetHandleByUUID(identity.encode())
    except library.NVMLError:
        return None
