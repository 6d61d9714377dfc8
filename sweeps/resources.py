"""What a trial asks for, what the nodes can ever give, and how many trials that lets run at once. Pure arithmetic."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from harness.config import Recipe
from harness.errors import UserError
from harness.ray_cluster import Node


@dataclass(frozen=True)
class Demand:
    """`workers` processes (at least; an elastic trial may take more), each with this many CPUs and GPUs on one node."""

    workers: int
    cpus_per_worker: float
    gpus_per_worker: float

    @classmethod
    def of(cls, recipe: Recipe) -> "Demand":
        """What a trial of this recipe needs before it can start."""
        return cls(recipe.run.min_workers, recipe.run.cpus_per_worker, recipe.run.gpus_per_worker)

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
