import time

import torch

from harness.machine import Sampler


def test_work_and_memory_show():
    sampler = Sampler(torch.device("cpu"))
    idle_from = time.monotonic()
    time.sleep(0.2)
    idle = sampler.sample()
    assert idle["system/cpu_percent"] < 100, "sleeping is not work"
    busy_until = time.process_time() + 0.3
    while time.process_time() < busy_until:
        pass
    kept = torch.ones(64 * 2**20 // 4)
    busy = sampler.sample()
    share = (time.monotonic() - idle_from) * busy["system/cpu_percent"] / 100
    assert share >= 0.25
    assert busy["system/rss_gib"] - idle["system/rss_gib"] > 0.05
    assert kept.numel()
    assert "system/gpu_memory_gib" not in busy
