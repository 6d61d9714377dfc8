"""What a trial asks for, what the nodes can ever give, and how many trials that lets run at once. Pure arithmetic."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from harness.config import Recipe
from harness.errors import UserError
from harness.ray_cluster import Node


@dataclass(frozen=True)
class Demand:
    """`workers` processes (an elastic trial takes up to `most_workers`), each with these CPUs and GPUs of one node."""

    workers: int
    cpus_per_worker: float
    gpus_per_worker: float
    most_workers: int = 0

    @classmethod
    def of(cls, recipe: Recipe) -> "Demand":
        """What a trial of this recipe needs before it can start."""
        run = recipe.run
        most = run.max_workers if run.max_workers > run.min_workers else 0
        return cls(run.min_workers, run.cpus_per_worker, run.gpus_per_worker, most)

    def __str__(self) -> str:
        gpus = f" + {self.gpus_per_worker:g} GPU" if self.gpus_per_worker else ""
        return f"{self.workers} x ({self.cpus_per_worker:g} CPU{gpus})"


def places(demand: Demand, node: Node) -> int:
    """How many workers of this kind fit on one node (a worker does not span nodes)."""
    fits = [math.floor(node.cpus / demand.cpus_per_worker + 1e-9)]
    if demand.gpus_per_worker:
        fits.append(math.floor(node.gpus / demand.gpus_per_worker + 1e-9))
    return min(fits)


def concurrency(demand: Demand, nodes: Sequence[Node], name: str, limit: int | None = None) -> int:
    """How many trials can run at once. Raises `UserError` with the arithmetic if not even one ever can."""
    found = [places(demand, node) for node in nodes]
    if sum(found) >= demand.workers:
        possible = sum(found) // demand.workers
        return possible if limit is None else min(possible, limit)
    sizes = ", ".join(f"{node.cpus:g} CPU{f' + {node.gpus:g} GPU' if node.gpus else ''}" for node in nodes) or "none"
    nodes_word = "machine" if len(nodes) == 1 else f"{len(nodes)} nodes"
    remedies = [f"lower run.workers to {sum(found)}" if sum(found) else "", "lower run.cpus_per_worker"]
    remedies += ["lower run.gpus_per_worker or run where there are GPUs"] if demand.gpus_per_worker else []
    raise UserError(
        f"sweep {name!r} can never start: a trial wants run.workers x (run.cpus_per_worker, run.gpus_per_worker) = "
        f"{demand}, and the {nodes_word} ({sizes}) "
        f"{'has' if len(nodes) == 1 else 'have'} room for {sum(found)} such worker{'' if sum(found) == 1 else 's'}. "
        f"{', or '.join(filter(None, remedies)).capitalize()}."
    )


def idle_gpus(demand: Demand, nodes: Sequence[Node], limit: int | None = None) -> str | None:
    """Words for GPUs that no trial of this kind will ever use, with the arithmetic; None where all work.

    `limit`: the most trials at once. The nodes have room for one trial at least (`concurrency`).
    """
    total = sum(math.floor(node.gpus) for node in nodes)
    if not demand.gpus_per_worker or not total:
        return None
    found = [places(demand, node) for node in nodes]
    fitting = sum(found) // demand.workers
    trials = fitting if limit is None else min(fitting, limit)
    ranks = min(sum(found), trials * max(demand.workers, demand.most_workers))
    idle = math.floor(total - ranks * demand.gpus_per_worker + 1e-9)
    if idle < max(1.0, demand.gpus_per_worker):
        return None
    node, most = max(zip(nodes, found, strict=True), key=lambda pair: pair[0].gpus)
    text = (
        f"{idle} of {total} GPUs will stay idle: a trial wants {demand}; a node with {node.cpus:g} CPU + {node.gpus:g} "
        f"GPU has room for {most} such workers, all {len(nodes)} for {sum(found)}, which is {fitting} trial(s) at once"
    )
    remedies = [] if fitting == trials else [f"raise max_concurrent = {limit}"]
    by_gpus = math.floor(node.gpus / demand.gpus_per_worker + 1e-9)
    if most < by_gpus:
        share = node.cpus / by_gpus
        share = math.floor(share) if share > 1 else share
        remedies.append(f"lower run.cpus_per_worker from {demand.cpus_per_worker:g} to {share:g}")
    elif fitting == trials:
        remedies.append("choose run.workers so that whole trials fill the nodes, or let it be a range [min, max]")
    return f"{text}. To use them, {' and '.join(remedies)}."
