import mmap
import subprocess
import sys
import time

import torch

from harness.machine import Sampler

# In a process of its own: threads and freed memory of other tests would count.
IDLE_THEN_BUSY = """
import time, torch
from harness.machine import Sampler
sampler = Sampler(torch.device("cpu"))
time.sleep(0.2)
idle = sampler.sample()
busy_until = time.process_time() + 0.3
begin = time.monotonic()
while time.process_time() < busy_until:
    pass
busy = sampler.sample()
print(idle["system/cpu_percent"], busy["system/cpu_percent"] / 100 * (time.monotonic() - begin))
"""


def test_work_shows_in_processor_time():
    done = subprocess.run(
        [sys.executable, "-c", IDLE_THEN_BUSY], capture_output=True, text=True, check=True, timeout=60
    )
    idle_percent, busy_s = map(float, done.stdout.split())
    assert idle_percent < 50, "sleeping is not work"
    assert 0.25 <= busy_s < 0.6


def test_memory_in_use_shows():
    sampler = Sampler(torch.device("cpu"))
    before = sampler.sample()
    with mmap.mmap(-1, 64 * 2**20) as block:
        block.write(b"\1" * len(block))
        used = sampler.sample()
    assert 0.04 < used["system/rss_gib"] - before["system/rss_gib"] < 0.2
    assert "system/gpu_memory_gib" not in used


def test_a_sample_counts_from_the_one_before():
    sampler = Sampler(torch.device("cpu"))
    sampler._before = (time.monotonic() - 100.0, sampler._before[1])
    assert sampler.sample()["system/cpu_percent"] < 10
    sampler._before = (sampler._before[0], sampler._before[1] - 50.0)
    assert sampler.sample()["system/cpu_percent"] > 1000
