"""What SLURM's environment variables say about this process's place in the job, and this node's address. Torch-free."""

import fcntl
import os
import socket
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

from harness.errors import UserError

_SIOCGIFADDR = 0x8915
_LEAVE_FOR_SYSTEM_MIB = 256


@dataclass(frozen=True)
class Place:
    """One process of a job: which of how many, in which life of the job, with how much of its node."""

    job_id: str
    restart: int
    rank: int
    world: int
    node_name: str
    cpus: int
    gpus: int
    memory_mib: int | None
    under_slurm: bool

    @property
    def life(self) -> str:
        """A name no other life of any job has: a requeued job must not read what its last life wrote."""
        return f"{self.job_id}.{self.restart}"

    @classmethod
    def from_environ(cls, environ: Mapping[str, str], *, lives_before: int = 0) -> Self:
        """Read `SLURM_*`, or submitit's own variables when the job runs on this machine without SLURM."""
        if "SLURM_JOB_ID" not in environ:
            return cls(
                job_id=environ.get("SUBMITIT_LOCAL_JOB_ID", str(os.getpid())),
                restart=lives_before,
                rank=0,
                world=1,
                node_name=socket.gethostname(),
                cpus=os.cpu_count() or 1,
                gpus=len([gpu for gpu in environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if gpu]),
                memory_mib=None,
                under_slurm=False,
            )
        # never the plain id of an array's task: one of them has the id of the whole array
        array = environ.get("SLURM_ARRAY_JOB_ID")
        cpus = environ.get("SLURM_CPUS_PER_TASK") or environ.get("SLURM_CPUS_ON_NODE") or "1"
        return cls(
            job_id=f"{array}_{environ['SLURM_ARRAY_TASK_ID']}" if array else environ["SLURM_JOB_ID"],
            restart=int(environ.get("SLURM_RESTART_COUNT", "0")),
            rank=int(environ.get("SLURM_PROCID", "0")),
            world=int(environ.get("SLURM_STEP_NUM_TASKS") or environ.get("SLURM_NTASKS") or "1"),
            node_name=environ.get("SLURMD_NODENAME") or socket.gethostname(),
            cpus=int(cpus),
            gpus=_gpus(environ),
            memory_mib=_memory_mib(environ, int(cpus)),
            under_slurm=True,
        )


def _gpus(environ: Mapping[str, str]) -> int:
    """`SLURM_GPUS_ON_NODE` is a number, or `kind:number`; without it the list of devices says how many."""
    text = environ.get("SLURM_GPUS_ON_NODE", "")
    if text:
        return sum(int(part.rsplit(":", 1)[-1]) for part in text.split(","))
    return len([gpu for gpu in environ.get("SLURM_STEP_GPUS", environ.get("SLURM_JOB_GPUS", "")).split(",") if gpu])


def _memory_mib(environ: Mapping[str, str], cpus: int) -> int | None:
    """The job's share of the node's memory; None if the site does not manage memory (or gave all of it: 0)."""
    if per_node := int(environ.get("SLURM_MEM_PER_NODE", "0")):
        return per_node
    if per_cpu := int(environ.get("SLURM_MEM_PER_CPU", "0")):
        return per_cpu * int(environ.get("SLURM_CPUS_ON_NODE", cpus))
    return None


def ray_memory_bytes(memory_mib: int | None, object_store_bytes: int | None) -> tuple[int | None, int | None]:
    """Split a job's memory into Ray's `--memory` and `--object-store-memory`; None leaves the choice to Ray.

    Without it Ray takes the whole machine's memory for its own, which on a shared node belongs to others too.
    """
    if memory_mib is None:
        return None, object_store_bytes
    total = memory_mib << 20
    store = object_store_bytes if object_store_bytes is not None else min(total * 3 // 10, 200 << 30)
    usable = total - store - (_LEAVE_FOR_SYSTEM_MIB << 20)
    if usable < 100 << 20:
        raise UserError(
            f"the job has {memory_mib} MiB of each node (node.memory_gb, else what the site gives unasked); with "
            f"{store >> 20} MiB of it for Ray's object store too little is left for the work. Set a larger "
            "node.memory_gb or a smaller ray.object_store_gb."
        )
    return usable, store


def address(place: Place, interface: str | None) -> str:
    """This node's IPv4 address for its peers: of `interface`, else of the node's name, else of the default route."""
    if interface is not None:
        found = interfaces().get(interface)
        if found is None:
            known = ", ".join(f"{name} ({ip})" for name, ip in sorted(interfaces().items()))
            raise UserError(
                f"node.interface = {interface!r} has no IPv4 address on {place.node_name}, which has {known}"
            )
        return found
    if place.world == 1 and not place.under_slurm:
        return "127.0.0.1"
    try:
        entries = socket.getaddrinfo(place.node_name, None, socket.AF_INET, socket.SOCK_STREAM)
    except socket.gaierror:
        entries = []
    for entry in entries:
        if not str(entry[4][0]).startswith("127."):
            return str(entry[4][0])
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect(("192.0.2.1", 9))  # a datagram socket only looks the route up: nothing is sent
        return str(probe.getsockname()[0])


def interfaces() -> dict[str, str]:
    """The IPv4 address of each network interface that has one."""
    found = {}
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            request = struct.pack("256s", name[:15].encode())
            try:
                found[name] = socket.inet_ntoa(fcntl.ioctl(probe.fileno(), _SIOCGIFADDR, request)[20:24])
            except OSError:
                continue
    return found


def free_port(ip: str) -> int:
    """A TCP port on `ip` that nobody listens on at this moment."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.bind((ip, 0))
        return int(probe.getsockname()[1])
