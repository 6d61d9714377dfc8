"""Does a file fit into memory? The memory that this process may use, and the choice between caching and streaming."""

import logging
from pathlib import Path
from typing import Literal

from harness.data.order import Order
from harness.errors import UserError

Memory = Literal["cache", "stream"]
# A file that takes more than this share of the machine pushes itself out of the page cache.
FITTING_SHARE = 0.7
_log = logging.getLogger(__name__)


def memory_bytes(proc: Path = Path("/proc"), cgroups: Path = Path("/sys/fs/cgroup")) -> int:
    """Memory of this machine, or less where a control group (SLURM, Kubernetes, Docker) limits it.

    What is free at the moment plays no part: a resumed run must choose as the first one did.
    """
    words = (proc / "meminfo").read_text(encoding="ascii").split()
    limits = [int(words[words.index("MemTotal:") + 1]) * 1024]
    for line in (proc / "self" / "cgroup").read_text(encoding="utf-8").splitlines():
        _, controllers, group = line.split(":", 2)
        root, name = (cgroups, "memory.max") if not controllers else (cgroups / "memory", "memory.limit_in_bytes")
        if controllers in ("", "memory"):
            here = root / group.lstrip("/")
            limits += [limit for folder in (here, *here.parents) if (limit := _limit(folder / name)) is not None]
    return min(limits)


def _limit(path: Path) -> int | None:
    try:
        text = path.read_text(encoding="ascii").strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None


def choose(
    path: Path, memory: Literal["auto", "cache", "stream"], order: Literal["auto", "random", "quasi_random"]
) -> tuple[Memory, Order]:
    """How a training file is read and in which kind of order; logs the choice and why."""
    file_bytes, available = path.stat().st_size, memory_bytes()
    fits = file_bytes <= FITTING_SHARE * available
    chosen: Memory = ("cache" if fits else "stream") if memory == "auto" else memory
    if chosen == "stream" and order == "random":
        raise UserError(
            f"data.order = 'random' reads {path.name} all over, which streaming cannot keep in memory: "
            "set data.order = 'quasi_random' (or 'auto'), or data.memory = 'cache'"
        )
    kind: Order = ("quasi_random" if chosen == "stream" else "random") if order == "auto" else order
    _log.info(
        "%s: %.1f GiB, memory %.1f GiB%s: %s, %s order",
        path, file_bytes / 2**30, available / 2**30, "" if memory == "auto" else f", data.memory = {memory!r}",
        "cached by the system" if chosen == "cache" else "streamed in pages", kind.replace("_", "-"),
    )  # fmt: skip
    return chosen, kind
