"""Keeps an actor on every node of the job's Ray cluster busy until the file STOP appears. `ray_stay.py STOP`."""

import sys
import time
from pathlib import Path

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy


@ray.remote(num_cpus=1)
class Worker:
    def beat(self) -> float:
        return time.time()


ray.init(log_to_driver=False)
nodes = [node["NodeID"] for node in ray.nodes() if node["Alive"]]
here = [Worker.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)).remote() for node in nodes]
print(f"{len(ray.get([worker.beat.remote() for worker in here]))} workers are busy", flush=True)
own = here[nodes.index(ray.get_runtime_context().get_node_id())]
while not Path(sys.argv[1]).exists():
    ray.get(own.beat.remote())
    time.sleep(0.2)
print("stopped as asked", flush=True)
