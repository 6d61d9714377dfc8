"""Where this process stands among its peers: plain process, torchrun or Ray Train, seen alike by the loop."""

import io
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from harness.config import RunConfig
from harness.errors import UserError

# Collectives of the control group wait through the slowest thing a healthy peer may do between two of them
# (compiling, writing data); a peer that is really stuck is found by the watchdog, which names it.
_COLLECTIVE_LIMIT = timedelta(minutes=60)


@dataclass(frozen=True)
class Ranks:
    """This process (`rank` of `world`), its device, and small collectives on the CPU beside the gradient's group."""

    rank: int
    world: int
    device: torch.device
    backend: str
    launcher: str
    control: "dist.ProcessGroup | None" = None

    @property
    def main(self) -> bool:
        """Whether this is rank 0, the one that writes."""
        return self.rank == 0

    def begin_max(self, value: int) -> Callable[[], int]:
        """Start to find the largest `value` of all ranks; the returned function waits for it."""
        if self.world == 1:
            return lambda: value
        flag = torch.tensor([value])
        work = dist.all_reduce(flag, op=dist.ReduceOp.MAX, group=self.control, async_op=True)

        def result() -> int:
            work.wait()
            return int(flag.item())

        return result

    def max(self, value: int) -> int:
        """Largest `value` of all ranks."""
        return self.begin_max(value)()

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """Sum over ranks of a small tensor, on the CPU in float64."""
        total = values.detach().to("cpu", torch.float64, copy=True)
        if self.world > 1:
            dist.all_reduce(total, group=self.control)
        return total

    def share(self, value: Any) -> Any:
        """Rank 0's `value` on every rank; tensors and plain containers only (`weights_only`)."""
        if self.world == 1:
            return value
        buffer = io.BytesIO()
        if self.main:
            torch.save(value, buffer)
        size = torch.tensor([buffer.tell()])
        dist.broadcast(size, 0, group=self.control)
        content = torch.empty(int(size.item()), dtype=torch.uint8)
        if self.main:
            content = torch.frombuffer(bytearray(buffer.getvalue()), dtype=torch.uint8)
        dist.broadcast(content, 0, group=self.control)
        return value if self.main else torch.load(io.BytesIO(content.numpy().tobytes()), weights_only=True)

    def strings(self, text: str) -> list[str]:
        """Every rank's `text`, in the order of ranks."""
        texts: list[str] = [text]
        if self.world > 1:
            texts *= self.world
            dist.all_gather_object(texts, text, group=self.control)
        return texts

    def gather(self, values: torch.Tensor) -> list[torch.Tensor]:
        """Every rank's equally long vector, on the CPU, in the order of ranks."""
        own = values.detach().cpu()
        if self.world == 1:
            return [own]
        parts = [torch.empty_like(own) for _ in range(self.world)]
        dist.all_gather(parts, own, group=self.control)
        return parts

    def average_norms(self, net: nn.Module) -> None:
        """Give every rank the mean of the ranks' batch-norm statistics: each has seen other images."""
        flat = norm_statistics(net)
        if self.world > 1 and flat.numel():
            set_norm_statistics(net, (self.sum(flat) / self.world).to(flat))


def norm_statistics(net: nn.Module) -> torch.Tensor:
    """Running means and variances of all batch norms, as one vector: the buffers that differ from rank to rank."""
    buffers = list(_norm_buffers(net))
    return torch.cat([buffer.reshape(-1) for buffer in buffers]) if buffers else torch.empty(0)


def set_norm_statistics(net: nn.Module, flat: torch.Tensor) -> None:
    """The inverse of `norm_statistics`."""
    for buffer in _norm_buffers(net):
        buffer.copy_(flat[: buffer.numel()].view_as(buffer))
        flat = flat[buffer.numel() :]


def _norm_buffers(net: nn.Module) -> Iterator[torch.Tensor]:
    for module in net.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):  # noqa: SLF001 - the base of all batch norms has no other name
            yield from (b for b in (module.running_mean, module.running_var) if b is not None)


@contextmanager
def joined(run: RunConfig, *, device: torch.device | None = None, launcher: str | None = None) -> Iterator[Ranks]:
    """Join the peers of this process: an initialised group (Ray Train), torchrun's variables, or none.

    Raises `UserError` when the recipe wants GPUs and there are none.
    """
    device = device or _device(run)
    backend = "nccl" if device.type == "cuda" else "gloo"
    started = False
    if not dist.is_initialized() and "WORLD_SIZE" in os.environ and "RANK" in os.environ:
        dist.init_process_group(backend, timeout=_COLLECTIVE_LIMIT)
        started = True
        launcher = launcher or f"torchrun {torch.__version__}"
    if not dist.is_initialized():
        yield Ranks(0, 1, device, "none", launcher or "process")
        return
    try:
        control = dist.new_group(backend="gloo", timeout=_COLLECTIVE_LIMIT)
        yield Ranks(
            dist.get_rank(), dist.get_world_size(), device, dist.get_backend(), launcher or "torch.distributed", control
        )
    finally:
        if started:
            dist.destroy_process_group()


def seed_step(seed: int, rank: int, step: int) -> None:
    """Make every random draw of a step a function of (seed, rank, step): a resume needs no generator states."""
    mixed = (seed * 0x9E3779B97F4A7C15 + rank * 0xBF58476D1CE4E5B9 + step * 0x94D049BB133111EB) % 2**63
    torch.manual_seed(mixed)


def _device(run: RunConfig) -> torch.device:
    if not run.gpus_per_worker:
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise UserError(
            f"run.gpus_per_worker = {run.gpus_per_worker:g}, but this machine shows no CUDA device. "
            "Set run.gpus_per_worker=0 to train on CPU."
        )
    here, devices = int(os.environ.get("LOCAL_WORLD_SIZE", "1")), torch.cuda.device_count()
    if here > devices:
        raise UserError(
            f"{here} ranks were started on this machine, which shows {devices} CUDA device(s), and NCCL refuses two "
            "ranks on one. Start as many ranks as devices (torchrun --nproc-per-node), or set run.gpus_per_worker=0 to "
            "train on CPU."
        )
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    torch.cuda.set_device(device)
    return device
