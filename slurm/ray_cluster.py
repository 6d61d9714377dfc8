"""One node of a job's own Ray cluster: `ray start` in the foreground, on free ports, watched, and ended in order.

Nothing here calls `ray stop`, which would end the same user's other clusters on the node as well, and nothing imports
ray: the launcher must outlive whatever Ray does.
"""

import json
import re
import shutil
import signal
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from subprocess import Popen

from slurm.node import Place, address, free_port, interfaces, ray_memory_bytes
from slurm.processes import Scratch, exit_status, kill_group, spawn, stop
from slurm.profile import Profile
from slurm.rendezvous import Rendezvous

STOP_LIMIT_S = 3.0
_START_TRIES = 3
_LOG_LIMIT_BYTES = 4 << 20
_STARTED = "Ray runtime started"
_DASHBOARD = re.compile(r"RAY_API_SERVER_ADDRESS='(http[^']+)'")
_SETTINGS = {
    "RAY_AUTH_MODE": "token",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_gcs_rpc_server_reconnect_timeout_s": "10",  # else a node waits 60 s for a head that has gone
    "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0",  # else the end takes 30 s, which is all that SLURM grants
}


class RayStartError(Exception):
    """Ray did not come up on this node; the message ends with what it said."""


@dataclass
class RayNode:
    """Ray on this node, for one life of one job."""

    profile: Profile
    place: Place
    scratch: Scratch
    rendezvous: Rendezvous
    environ: Mapping[str, str]
    workdir: Path
    interrupted: Callable[[], bool]
    process: "Popen[bytes] | None" = field(default=None, init=False)

    def __post_init__(self) -> None:
        self.ip = address(self.place, self.profile.node.interface)
        self.python = self.profile.node.python or sys.executable
        self.log = self.rendezvous.folder / f"ray-start-{self.place.rank}.log"

    def env(self) -> dict[str, str]:
        """The environment of everything that belongs to this cluster, on this node."""
        own = {k: v for k, v in self.environ.items() if k not in {"RAY_ADDRESS", "RAY_HEAD_IP", "RAY_AUTH_TOKEN"}}
        own |= _SETTINGS | {"RAY_AUTH_TOKEN_PATH": str(self.rendezvous.token_file)}
        by_ip = {ip: name for name, ip in interfaces().items()}
        if self.place.world > 1 and self.ip in by_ip:
            own.setdefault("GLOO_SOCKET_IFNAME", by_ip[self.ip])
        if self.profile.node.interface:
            own["NCCL_SOCKET_IFNAME"] = self.profile.node.interface
        return own

    def start_head(self) -> dict[str, str]:
        """Start the head and return its address and dashboard; raises `RayStartError`."""

        def options() -> list[str]:
            # 0 lets Ray take a free port itself; only the client server cannot, and would take 10001 unasked
            client = f"--ray-client-server-port={free_port(self.ip)}"
            return ["--head", "--port=0", f"--dashboard-host={self.ip}", "--dashboard-port=0", client]

        self._start(options)
        found = _DASHBOARD.search(self._said())
        return {"address": self._address(), "dashboard": found[1] if found else ""}

    def start_worker(self, head: Mapping[str, str]) -> None:
        """Join the cluster of `head`; returns once this node is registered; raises `RayStartError`."""
        self._start(lambda: [f"--address={head['address']}"])

    def alive(self) -> bool:
        """Whether Ray's processes on this node all run: `ray start --block` leaves when one of them dies."""
        return self.process is not None and self.process.poll() is None

    def stop(self, *, keep_logs: bool) -> None:
        """End Ray on this node. Nothing it has is needed any more: it gets time only to complete its logs."""
        if self.process is None:
            return
        stop(self.process, STOP_LIMIT_S if keep_logs else 0.0)
        if keep_logs:
            self._copy_logs()

    def command_line(self) -> list[str]:
        """`ray start` with what both kinds of node have in common."""
        store_gb = self.profile.ray.object_store_gb
        asked = None if store_gb is None else int(store_gb * (1 << 30))
        memory, store = ray_memory_bytes(self.place.memory_mib, asked)
        # -P: a folder named `ray` in the working directory must not be taken for the package
        command = [*self.profile.node.container, self.python, "-P", "-m", "ray.scripts.scripts", "start", "--block"]
        command += [f"--node-ip-address={self.ip}", f"--temp-dir={self.scratch.folder}"]
        command += ["--dashboard-agent-listen-port=0", "--min-worker-port=0", "--max-worker-port=0"]
        command += [f"--num-cpus={self.place.cpus}", f"--num-gpus={self.place.gpus}", "--disable-usage-stats"]
        command += ["--resources", json.dumps({f"slurm_node_{self.place.rank}": 1})]
        command += [] if memory is None else [f"--memory={memory}"]
        command += [] if store is None else [f"--object-store-memory={store}"]
        return command

    def _start(self, options: Callable[[], list[str]]) -> None:
        """Try a few times: a port that was free may be taken by the time Ray binds it."""
        end, state = time.monotonic() + self.profile.ray.start_limit_s, ""
        for _ in range(_START_TRIES):
            command = [*self.command_line(), *options()]
            try:
                with self.log.open("ab") as output:
                    output.truncate(0)
                    self.process = process = spawn(command, self.env(), output=output, cwd=self.workdir)
            except OSError as error:  # it names what does not exist here: the program, or the working directory
                raise RayStartError(f"cannot start {command[0]!r} on {self.place.node_name}: {error}") from None
            while process.poll() is None and time.monotonic() < end and not self.interrupted():
                if _STARTED in self._said():
                    return
                time.sleep(0.1)
            if process.poll() is None:
                state = "was not ready in time"
                break
            state = f"ended with {exit_status(process)}"
            kill_group(process, signal.SIGKILL)
        raise RayStartError(f"`ray start` on {self.place.node_name} {state}. It said:\n{self._said()[-3000:]}")

    def _said(self) -> str:
        return self.log.read_text(encoding="utf-8", errors="replace")

    def _address(self) -> str:
        """What the head wrote down for those who look for it in its folder."""
        path = self.scratch.folder / "ray_current_cluster"
        while not path.exists():  # written right after "started" was said
            if not self.alive():
                raise RayStartError(f"the Ray head on {self.place.node_name} ended at once:\n{self._said()[-3000:]}")
            time.sleep(0.05)
        return path.read_text(encoding="utf-8").strip()

    def _copy_logs(self) -> None:
        target = self.rendezvous.folder / f"ray-logs-{self.place.rank}"
        for logs in self.scratch.folder.glob("session_2*/logs"):
            for source in logs.rglob("*"):
                if source.is_file() and 0 < source.stat().st_size <= _LOG_LIMIT_BYTES:
                    copy = target / source.relative_to(logs)
                    copy.parent.mkdir(parents=True, exist_ok=True)
                    shutil.copyfile(source, copy)
