"""A real SLURM cluster on one machine: controller, accounting and nodes, each a set of namespaces. Needs root.

    python -m tests.slurm.cluster bash        a shell on its login node; the cluster goes when the shell ends

Every node has its own network, hostname, process numbers, /tmp and /dev/shm; everything else of the file system is what
they share. The network exists inside the namespaces only. CPUs and memory are book-keeping: nothing confines a job.
"""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
PROGRAMS = ("slurmctld", "slurmd", "slurmdbd", "sbatch", "munged", "mariadbd", "mariadb-install-db", "ip", "nsenter")
_PATH = os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"])

# Runs as process 1 of a node: hides what is the machine's own, keeps what the nodes share, then reaps orphans.
_NODE = r"""
set -e; name=$1 etc=$2 shared=$3
hostname "$name"
mount --bind "$etc/hosts" /etc/hosts
mount --bind "$etc/empty" /etc/resolv.conf
mount -t tmpfs -o mode=1777 tmpfs /dev/shm
kept=$(mktemp -d /var/tmp/kept.XXXXXX); mount -t tmpfs tmpfs "$kept"
IFS=:; number=0
for folder in $shared; do mkdir "$kept/$number"; mount --bind "$folder" "$kept/$number"; number=$((number + 1)); done
mount -t tmpfs -o mode=1777 tmpfs /tmp; number=0
for folder in $shared; do mkdir -p "$folder"; mount --move "$kept/$number" "$folder"; number=$((number + 1)); done
unset IFS; umount "$kept"; rmdir "$kept"
slurmd -D -N "$name" &
daemon=$!; trap 'kill $daemon' TERM INT
wait $daemon || true; wait $daemon || true
"""


def obstacle() -> str | None:
    """Why there can be no cluster on this machine; None if there can."""
    if os.geteuid() != 0:
        return "namespaces and mounts need root"
    missing = [program for program in PROGRAMS if shutil.which(program, path=_PATH) is None]
    if missing:
        return f"missing programs: {', '.join(missing)} (make services)"
    flags = ["--net", "--mount", "--uts", "--ipc", "--pid", "--fork", "--mount-proc"]
    probe = (
        "mount -t tmpfs tmpfs /mnt && ip link add probe0 type veth peer name probe1 && ip link add probe2 type bridge"
    )
    done = subprocess.run(
        ["unshare", *flags, "sh", "-c", probe], capture_output=True, text=True, env={"PATH": _PATH}, check=False
    )
    return f"no namespaces, veth or bridge here: {done.stderr.strip()}" if done.returncode else None


@dataclass
class Cluster:
    """One cluster in a folder of its own; `up` takes about four seconds."""

    nodes: int = 2
    cpus: int = 4
    memory_mib: int = 8000
    net: str = "10.213.7"
    base: Path = field(init=False)
    _daemons: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        self.base = Path(tempfile.mkdtemp(prefix="slurm-", dir="/var/tmp"))
        self.base.chmod(0o755)
        self.prefix = f"sl{os.getpid()}"
        self.names = [f"n{number}" for number in range(1, self.nodes + 1)]
        # what a user's files on the "parallel file system" are
        self.shared = self.base / "shared"

    # -- life

    def up(self) -> None:
        """Bring everything up; raises if a part does not come."""
        for folder in ("etc", "log", "run", "state", "spool", "db", "shared"):
            (self.base / folder).mkdir()
        self._write_configuration()
        self._start_network()
        self._start_login()
        self._start_munge()
        self._start_accounting()
        self._start("slurmctld", ["slurmctld", "-D"], inside=True)
        self._wait("slurmctld", 20, lambda: self.login(["sinfo"], check=False).returncode == 0)
        for name in self.names:
            self.boot(name)
        self.wait_idle()

    def down(self) -> None:
        """End all jobs and daemons and remove the namespaces and the folder."""
        if "slurmctld" in self._daemons:
            self.login(["scancel", "-u", "root", "--state=PENDING"], check=False)
            self.login(["scancel", "-f", "-u", "root"], check=False)
        for name in self.names:
            if name in self._daemons:
                self.crash(name)
        for name in ("slurmctld", "slurmdbd", "mariadbd", "munged", "login"):
            self._stop(name)
        for name in ("ctl", *self.names):
            self._run(["ip", "netns", "del", self.prefix + name], check=False)
        shutil.rmtree(self.base, ignore_errors=True)

    def boot(self, name: str) -> None:
        """Start a node."""
        (self.base / "spool" / name).mkdir(exist_ok=True)
        # what the nodes share and lies under /tmp is put back into their own /tmp
        shared = [str(path) for path in (self.base, REPOSITORY, Path(sys.prefix)) if path.is_relative_to("/tmp")]
        space = ["nsenter", f"--net=/run/netns/{self.prefix}{name}", "unshare", "--mount", "--uts", "--ipc", "--pid"]
        space += ["--fork", "--kill-child", "--mount-proc", "--", "bash", "-c", _NODE, "_"]
        self._start(name, [*space, name, str(self.base / "etc"), ":".join(shared)])

    def crash(self, name: str) -> None:
        """Kill everything on a node at once, as a loss of power does."""
        os.kill(self._first_process(name), signal.SIGKILL)
        self._daemons.pop(name).wait(10)

    def wait_idle(self, limit_s: float = 60) -> None:
        """Wait until every node can take a job."""

        def idle() -> bool:
            shown = self.login(["sinfo", "-h", "-N", "-p", "main", "-o", "%T"], check=False).stdout.split()
            return shown == ["idle"] * self.nodes

        self._wait("idle nodes", limit_s, idle)

    # -- use

    @property
    def environ(self) -> dict[str, str]:
        """What a user of the cluster has in the environment."""
        # a compiler that has run in this process leaves the path of its cache in our environment
        foreign = ("SLURM", "RAY_", "SBATCH", "TORCHINDUCTOR_", "TRITON_")
        kept = {k: v for k, v in os.environ.items() if not k.startswith(foreign)}
        own = {"SLURM_CONF": str(self.base / "etc" / "slurm.conf"), "PATH": _PATH}
        # as the pages advise where temporary files do not outlive a job: else each node of each compiles for itself
        return kept | own | {"TORCHINDUCTOR_CACHE_DIR": str(self.shared / "kernels")}

    def login(
        self, command: Sequence[str], *, cwd: Path | None = None, check: bool = True, timeout: float = 120
    ) -> subprocess.CompletedProcess[str]:
        """Run a command as on the login node and wait for it."""
        return self._run(self._login_command(command, cwd), check=check, timeout=timeout)

    def login_start(self, command: Sequence[str], *, cwd: Path | None = None) -> subprocess.Popen[str]:
        """Start a command as on the login node, its two outputs in one pipe."""
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "stdin": subprocess.DEVNULL}
        return subprocess.Popen(self._login_command(command, cwd), env=self.environ, text=True, **pipes)

    def on(self, name: str, command: Sequence[str], *, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Run a command on a node."""
        enter = ["nsenter", "--target", str(self._first_process(name)), "--all", "--wd=/", "--"]
        return self._run([*enter, *command], check=check)

    def job(self, job_id: str) -> dict[str, str]:
        """The fields of `scontrol show job`."""
        shown = self.login(["scontrol", "show", "job", "-o", job_id]).stdout
        return dict(part.split("=", 1) for part in shown.split() if "=" in part)

    # -- parts

    def _write_configuration(self) -> None:
        etc, run = self.base / "etc", self.base / "run"
        addresses = {name: f"{self.net}.{10 + number}" for number, name in enumerate(self.names, 1)}
        hosts = ["127.0.0.1 localhost", f"{self.net}.1 ctl", *(f"{ip} {name}" for name, ip in addresses.items())]
        (etc / "hosts").write_text("\n".join(hosts) + "\n")
        (etc / "empty").touch()
        (etc / "cgroup.conf").write_text("ConstrainCores=no\nConstrainRAMSpace=no\n")
        node = f"CPUs={self.cpus} RealMemory={self.memory_mib} State=UNKNOWN"
        lines = [f"NodeName={name} NodeAddr={ip} {node}" for name, ip in addresses.items()]
        values = {
            "base": self.base,
            "run": run,
            "net": self.net,
            "all": ",".join(self.names),
            "nodes": "\n".join(lines),
        }
        (etc / "slurm.conf").write_text(_SLURM_CONF.format_map(values))
        (etc / "slurmdbd.conf").write_text(_SLURMDBD_CONF.format_map(values))
        (etc / "slurmdbd.conf").chmod(0o600)
        (etc / "munge.key").write_bytes(os.urandom(1024))
        (etc / "munge.key").chmod(0o600)

    def _start_network(self) -> None:
        """A bridge in the controller's namespace, a cable to each node; the default routes lead nowhere.

        They are there because programs find "their" address by asking for the route to some far place.
        """
        control = self.prefix + "ctl"
        steps = [["netns", "add", control], ["-n", control, "link", "set", "lo", "up"]]
        steps += [["-n", control, "link", "add", "br0", "type", "bridge"]]
        steps += [["-n", control, "addr", "add", f"{self.net}.1/24", "dev", "br0"]]
        steps += [["-n", control, "link", "set", "br0", "up"], ["-n", control, "route", "add", "default", "dev", "br0"]]
        for number, name in enumerate(self.names, 1):
            space = self.prefix + name
            steps += [["netns", "add", space], ["-n", space, "link", "set", "lo", "up"]]
            peer = ["peer", "name", "eth0", "netns", space]
            steps += [["-n", control, "link", "add", f"v{number}", "type", "veth", *peer]]
            steps += [["-n", control, "link", "set", f"v{number}", "master", "br0", "up"]]
            steps += [["-n", space, "addr", "add", f"{self.net}.{10 + number}/24", "dev", "eth0"]]
            steps += [["-n", space, "link", "set", "eth0", "up"]]
            steps += [["-n", space, "route", "add", "default", "via", f"{self.net}.1"]]
        for step in steps:
            self._run(["ip", *step])

    def _start_login(self) -> None:
        """A process that holds the namespaces of the login and controller node."""
        hold = f'set -e; hostname ctl; mount --bind "{self.base}/etc/hosts" /etc/hosts; exec sleep infinity'
        space = ["nsenter", f"--net=/run/netns/{self.prefix}ctl", "unshare", "--mount", "--uts", "--"]
        self._start("login", [*space, "bash", "-c", hold])
        self._wait("the login node", 10, lambda: "ctl" in self.login(["cat", "/etc/hosts"], check=False).stdout)

    def _start_munge(self) -> None:
        socket = self.base / "run" / "munge.sock"
        options = [f"--key-file={self.base}/etc/munge.key", f"--socket={socket}", f"--pid-file={self.base}/run/munged"]
        options += [f"--log-file={self.base}/log/munged", f"--seed-file={self.base}/run/munge.seed"]
        self._start("munged", ["munged", "--foreground", "--force", *options])
        self._wait("munged", 10, lambda: self._run(["munge", "-n", "-S", str(socket)], check=False).returncode == 0)

    def _start_accounting(self) -> None:
        """MariaDB without any of the machine's own configuration, and slurmdbd on it."""
        data, socket = self.base / "db", self.base / "run" / "mysql.sock"
        small = ["--innodb-log-file-size=8M"]
        plain = ["--no-defaults", "--user=root", f"--datadir={data}", *small]
        self._run(["mariadb-install-db", *plain, "--skip-test-db", "--auth-root-authentication-method=normal"])
        small += ["--innodb-buffer-pool-size=64M", "--innodb-flush-log-at-trx-commit=0", "--innodb-use-native-aio=0"]
        small += ["--innodb-lock-wait-timeout=900", "--max-allowed-packet=16M", "--skip-log-bin", "--skip-networking"]
        places = [f"--socket={socket}", f"--pid-file={self.base}/run/mariadbd", f"--tmpdir={self.base}/run"]
        self._start("mariadbd", ["mariadbd", *plain, *small, *places])

        def sql(text: str) -> bool:
            client = ["mariadb", "--no-defaults", f"--socket={socket}", "-u", "root", "-e", text]
            return self._run(client, check=False).returncode == 0

        self._wait("mariadbd", 30, lambda: sql("select 1"))
        sql("create database slurm_acct_db; create user slurm@localhost identified by 'slurm'")
        sql("grant all on slurm_acct_db.* to slurm@localhost")
        # slurmdbd has no option for the socket; the client library reads it here
        self._start("slurmdbd", ["env", f"MYSQL_UNIX_PORT={socket}", "slurmdbd", "-D"], inside=True)
        self._wait(
            "slurmdbd", 30, lambda: self.login(["sacctmgr", "-n", "list", "cluster"], check=False).returncode == 0
        )
        self.login(["sacctmgr", "-i", "add", "cluster", "tests"])

    # -- processes

    def _login_command(self, command: Sequence[str], cwd: Path | None) -> list[str]:
        target = str(self._daemons["login"].pid)
        return [
            "nsenter",
            "--target",
            target,
            "--net",
            "--uts",
            "--mount",
            f"--wd={cwd or self.shared}",
            "--",
            *command,
        ]

    def _start(self, name: str, command: Sequence[str], *, inside: bool = False) -> None:
        whole = self._login_command(command, None) if inside else list(command)
        with (self.base / "log" / f"{name}.out").open("ab") as log:
            self._daemons[name] = subprocess.Popen(
                whole, env=self.environ, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )

    def _stop(self, name: str) -> None:
        process = self._daemons.pop(name, None)
        if process is None:
            return
        process.terminate()
        try:
            process.wait(15)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    def _first_process(self, name: str) -> int:
        """Process 1 of a node, by its number outside."""
        pid = self._daemons[name].pid
        return int(Path(f"/proc/{pid}/task/{pid}/children").read_text().split()[0])

    def _run(
        self, command: Sequence[str], *, check: bool = True, timeout: float = 60
    ) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            list(command), env=self.environ, text=True, capture_output=True, timeout=timeout, check=False
        )
        if check and done.returncode:
            raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}: {done.stderr or done.stdout}")
        return done

    def _wait(self, what: str, limit_s: float, condition: Callable[[], bool]) -> None:
        end = time.monotonic() + limit_s
        while not condition():
            if time.monotonic() > end:
                logs = [
                    f"== {path.name}\n{path.read_text(errors='replace')[-1500:]}" for path in self.base.glob("log/*")
                ]
                raise TimeoutError(f"no {what} within {limit_s:.0f} s\n" + "\n".join(logs))
            time.sleep(0.1)


_SLURM_CONF = """\
ClusterName=tests
SlurmctldHost=ctl({net}.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
# cred_expire is also how long a requeued job waits (120 s unless set)
AuthInfo=socket={run}/munge.sock,cred_expire=5
StateSaveLocation={base}/state
SlurmdSpoolDir={base}/spool/%n
SlurmctldPidFile={run}/slurmctld
SlurmdPidFile={run}/slurmd.%n
SlurmctldLogFile={base}/log/slurmctld
SlurmdLogFile={base}/log/slurmd.%n
# no control groups: works where they are version 1, 2, mixed, read-only or absent
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
DefMemPerCPU=500
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=2,bf_interval=2,sched_min_interval=0,batch_sched_delay=0
SlurmdParameters=config_overrides
ReturnToService=2
KillWait=15
SlurmdTimeout=15
MessageTimeout=10
MinJobAge=600
JobRequeue=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
# since 23.02: PreemptParameters=send_user_signal
SlurmctldParameters=preempt_send_user_signal
AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost={net}.1
# the accounting's clients do not read AuthInfo: the path of munge's socket is this "password"
AccountingStoragePass={run}/munge.sock
{nodes}
PartitionName=main Nodes={all} Default=YES PriorityTier=10 MaxTime=60 DefaultTime=10 State=UP PreemptMode=OFF
PartitionName=low  Nodes={all} PriorityTier=1 GraceTime=40 PreemptMode=REQUEUE MaxTime=60 DefaultTime=10 State=UP
PartitionName=high Nodes={all} PriorityTier=20 PreemptMode=OFF MaxTime=60 DefaultTime=10 State=UP
"""

_SLURMDBD_CONF = """\
DbdHost=ctl
DbdAddr={net}.1
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={run}/munge.sock
PidFile={run}/slurmdbd
LogFile={base}/log/slurmdbd
StorageType=accounting_storage/mysql
StorageHost=localhost
StorageUser=slurm
StoragePass=slurm
StorageLoc=slurm_acct_db
"""


def main(command: Sequence[str], environ: Mapping[str, str]) -> int:
    """Bring a cluster up, run a command on its login node, take the cluster down."""
    reason = obstacle()
    if reason is not None:
        print(f"no SLURM cluster on this machine: {reason}", file=sys.stderr)
        return 2
    cluster = Cluster(nodes=int(environ.get("NODES", "2")))
    try:
        started = time.monotonic()
        cluster.up()
        print(
            f"{cluster.nodes} nodes after {time.monotonic() - started:.1f} s; shared: {cluster.shared}", file=sys.stderr
        )
        return subprocess.call(cluster._login_command(command, Path.cwd()), env=cluster.environ)
    finally:
        cluster.down()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:] or ["bash"], os.environ))
