"""The checks of `python -m harness doctor`: each looks at one thing a run needs and says how to mend it."""

import importlib.metadata
import importlib.util
import json
import os
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import tempfile
import tomllib
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal
from urllib.parse import unquote, urlsplit

from packaging.requirements import Requirement

from harness.settings import DEFAULT_RUNS_DIR
from harness.version import DISTRIBUTION

Status = Literal["ok", "warn", "fail"]
PACKAGES = ("sbs", "harness", "sweeps", "slurm")
SETUP_AGAIN = "run `make setup`"
GIB = 2**30

# Generous, since a cold cluster file system needs a minute for one import; only a hang reaches them.
PROBE_LIMIT_S = 120.0
NETWORK_LIMIT_S = 3.0
COMMAND_LIMIT_S = 5.0


@dataclass(frozen=True)
class Finding:
    """One row of the table."""

    name: str
    status: Status
    detail: str
    remedy: str = ""


class ProbeError(Exception):
    """A child process that crashed, hung or found the thing broken; the message is one line."""


def probe(name: str, limit_s: float = PROBE_LIMIT_S) -> Mapping[str, object]:
    """The facts that `harness.doctor_probes` finds in a child process; raises ProbeError."""
    argv = [sys.executable, "-m", "harness.doctor_probes", name]
    with subprocess.Popen(
        argv,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as child:
        try:
            output, errors = child.communicate(timeout=limit_s)
        except subprocess.TimeoutExpired as hang:
            raise ProbeError(f"no answer within {limit_s:.0f} s") from hang
        finally:
            # The whole group: FFCV's writer has processes of its own.
            with suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
    if child.returncode:
        lines = errors.strip().splitlines()
        raise ProbeError(lines[-1].strip() if lines else f"the process ended with status {child.returncode}")
    facts: dict[str, object] = json.loads(output.strip().splitlines()[-1])
    if facts.get("works") is False:
        raise ProbeError("it runs, but gives wrong results")
    return facts


def check_python() -> Finding:
    """The interpreter belongs to a virtual environment."""
    version = ".".join(map(str, sys.version_info[:3]))
    if sys.prefix == sys.base_prefix:
        return Finding("python", "warn", f"{version}, outside any virtual environment", "use .venv/bin/python")
    return Finding("python", "ok", f"{version} at {sys.executable}")


def project_folder() -> Path | None:
    """Where the installed distribution's packages lie (the checkout of an editable install); None if not installed."""
    try:
        distribution = importlib.metadata.distribution(DISTRIBUTION)
    except importlib.metadata.PackageNotFoundError:
        return None
    origin = json.loads(distribution.read_text("direct_url.json") or "{}")
    if origin.get("dir_info", {}).get("editable"):
        return Path(unquote(urlsplit(origin["url"]).path)).resolve()
    return Path(str(distribution.locate_file(""))).resolve()


def _is_checkout(folder: Path) -> bool:
    project = folder / "pyproject.toml"
    return project.is_file() and tomllib.loads(project.read_text())["project"]["name"] == DISTRIBUTION


def check_packages() -> Finding:
    """The import names resolve to this distribution, and its requirements are met."""
    home = project_folder()
    if home is None:
        return Finding("packages", "fail", f"{DISTRIBUTION} is not installed in this environment", SETUP_AGAIN)
    folders = {}
    for name in PACKAGES:
        spec = importlib.util.find_spec(name)
        folders[name] = Path(spec.origin).resolve().parent.parent if spec and spec.origin else None
    strangers = [f"{name} from {folder or 'nowhere'}" for name, folder in folders.items() if folder != home]
    if strangers:
        places = set(folders.values())
        other = places.pop() if len(places) == 1 else None
        if other and _is_checkout(other):
            return Finding("packages", "warn", f"run from {other}, installed from {home}", "run inside one of the two")
        remedy = "another package of that name shadows ours: look at PYTHONPATH and the working directory"
        return Finding("packages", "fail", ", ".join(strangers), remedy)
    unmet = _unmet_requirements()
    if unmet:
        return Finding("packages", "fail", ", ".join(unmet), SETUP_AGAIN)
    return Finding("packages", "ok", f"{', '.join(PACKAGES)} from {home}")


def _unmet_requirements() -> list[str]:
    unmet = []
    for text in importlib.metadata.requires(DISTRIBUTION) or ():
        requirement = Requirement(text)
        if requirement.marker and not requirement.marker.evaluate({"extra": ""}):
            continue
        try:
            version = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            unmet.append(f"{requirement.name} is missing")
            continue
        if not requirement.specifier.contains(version, prereleases=True):
            unmet.append(f"{requirement.name} is {version}, not {requirement.specifier}")
    return unmet


def check_torch() -> Finding:
    """torch imports and computes, on the GPUs if there are any."""
    facts = probe("torch")
    gpus = facts["gpus"]
    assert isinstance(gpus, list)
    has_gpu = any(Path("/dev").glob("nvidia[0-9]*"))
    version = f"torch {facts['version']}"
    if has_gpu and not facts["cuda"]:
        remedy = "rm -r .venv; make setup TORCH_INDEX=<the index of CUDA builds>"
        return Finding("torch", "warn", f"{version} is a CPU build; this machine has a GPU", remedy)
    if has_gpu and not gpus:
        remedy = "CUDA_VISIBLE_DEVICES, or a driver too old for this build (see nvidia-smi)"
        return Finding("torch", "warn", f"{version} for CUDA {facts['cuda']} sees no GPU", remedy)
    devices = ", ".join(gpus) if gpus else f"CPU, {facts['threads']} threads, DDP over gloo"
    return Finding("torch", "ok", f"{version}: {devices}")


def check_compiler() -> Finding:
    """A C++ compiler that torch.compile can use."""
    facts = probe("compiler")
    return Finding("compiler", "ok", f"{facts['command']} {facts['version']} with OpenMP, for torch.compile")


def check_ffcv() -> Finding:
    """FFCV's native part writes and reads a file of four images."""
    return Finding("ffcv", "ok", f"FFCV {probe('ffcv')['version']} wrote and read four images")


def check_ray() -> Finding:
    """Ray imports; a cluster named by RAY_ADDRESS answers."""
    detail = f"Ray {probe('ray')['version']}"
    address = os.environ.get("RAY_ADDRESS", "")
    if not address or address in ("auto", "local"):
        return Finding("ray", "ok", f"{detail}, {address or 'local'} cluster")
    host, port = _host_and_port(address, 10001 if address.startswith("ray://") else 6379)
    if problem := _unreachable(host, port):
        return Finding(
            "ray", "fail", f"{detail}; RAY_ADDRESS={address}: {problem}", "unset RAY_ADDRESS, or start that cluster"
        )
    return Finding("ray", "ok", f"{detail}, cluster at {address}")


def _host_and_port(address: str, default_port: int) -> tuple[str, int]:
    parts = urlsplit(address if "//" in address else f"//{address}")
    return parts.hostname or "localhost", parts.port or default_port


def _unreachable(host: str, port: int) -> str:
    """Why nothing listens there, or an empty text."""
    try:
        socket.create_connection((host, port), timeout=NETWORK_LIMIT_S).close()
    except OSError as error:
        return f"{host}:{port} does not answer ({error})"
    return ""


def check_mlflow() -> Finding:
    """MLflow imports, and the store that runs would be logged to takes them."""
    version = f"MLflow {probe('mlflow')['version']}"
    uri = os.environ.get("MLFLOW_TRACKING_URI", "") or f"sqlite:///{Path(DEFAULT_RUNS_DIR, 'mlflow.db')}"
    scheme = urlsplit(uri).scheme.split("+")[0]
    remedy = "start that server, or correct MLFLOW_TRACKING_URI; unset, runs/mlflow.db is used"
    if scheme in ("http", "https"):
        problem = _http_problem(uri.rstrip("/") + "/health")
    elif scheme == "sqlite":
        problem = _sqlite_problem(Path(uri.split(":///", 1)[-1]))
        remedy = "make that folder writable, or name another store in MLFLOW_TRACKING_URI"
    elif scheme in ("postgresql", "postgres", "mysql", "mssql"):
        problem = _unreachable(*_host_and_port(uri, {"mysql": 3306, "mssql": 1433}.get(scheme, 5432)))
    elif scheme == "databricks":
        return Finding("mlflow", "warn", f"{version}, store {uri}: not looked at", "log in to Databricks before a run")
    else:
        problem, remedy = (
            "MLflow no longer writes to plain folders",
            "use sqlite:///FILE or a server in MLFLOW_TRACKING_URI",
        )
    shown = _without_password(uri)
    if problem:
        return Finding("mlflow", "fail", f"{version}, store {shown}: {problem}", remedy)
    return Finding("mlflow", "ok", f"{version}, store {shown}")


def _without_password(uri: str) -> str:
    password = urlsplit(uri).password
    return uri.replace(f":{password}@", ":***@") if password else uri


def _http_problem(url: str) -> str:
    try:
        with urllib.request.urlopen(url, timeout=NETWORK_LIMIT_S) as answer:
            answer.read(64)
    except urllib.error.HTTPError as error:
        # 401, 403: somebody is at home and wants a name, which the client has from MLFLOW_TRACKING_USERNAME or a token.
        return "" if error.code in (401, 403) else f"answers {error.code} to {url}"
    except (OSError, ValueError) as error:
        return f"no answer within {NETWORK_LIMIT_S:.0f} s ({error})"
    return ""


def _sqlite_problem(path: Path) -> str:
    folder = path.parent
    while not folder.exists():
        folder = folder.parent
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
        if path.exists():
            with closing(sqlite3.connect(f"file:{path}?mode=rw", uri=True, timeout=NETWORK_LIMIT_S)) as store:
                store.execute("BEGIN IMMEDIATE")
                store.rollback()
    except (OSError, sqlite3.Error) as error:
        return f"not writable ({error})"
    return ""


def check_slurm() -> Finding:
    """SLURM's clients, where installed, reach a controller. Without them only `python -m slurm` is out of use."""
    scontrol = shutil.which("scontrol")
    if not scontrol or not shutil.which("sbatch"):
        return Finding("slurm", "ok", "no SLURM on this machine (needed by `python -m slurm` only)")
    remedy = "ask whether slurmctld is up; `python -m slurm` cannot submit until it is"
    try:
        ping = subprocess.run([scontrol, "ping"], capture_output=True, text=True, timeout=COMMAND_LIMIT_S, check=False)
    except subprocess.TimeoutExpired:
        return Finding("slurm", "warn", f"`scontrol ping` gave no answer within {COMMAND_LIMIT_S:.0f} s", remedy)
    if "configuration source" in ping.stderr:
        return Finding("slurm", "ok", "clients are installed, but this machine belongs to no cluster (no slurm.conf)")
    if ping.returncode or " UP" not in ping.stdout:
        said = (ping.stderr or ping.stdout).strip().splitlines()
        return Finding("slurm", "warn", f"the controller does not answer: {said[-1] if said else 'no word'}", remedy)
    return Finding("slurm", "ok", ping.stdout.strip().splitlines()[0])


def check_disk() -> Finding:
    """Room for runs and for Ray's session, which stops making objects on a disk that is 95% full."""
    rooms = []
    warning: Finding | None = None
    for path in (Path(DEFAULT_RUNS_DIR).absolute(), Path(tempfile.gettempdir())):
        existing = next(folder for folder in (path, *path.parents) if folder.exists())
        usage = shutil.disk_usage(existing)
        room = f"{usage.free / GIB:.0f} GiB free at {existing}"
        rooms.append(room)
        if usage.free < GIB:
            return Finding("disk", "fail", room, "free some space, or work elsewhere (--out, TMPDIR)")
        if usage.free < 5 * GIB or usage.free < 0.05 * usage.total:
            warning = Finding(
                "disk", "warn", f"{room}, {usage.used / usage.total:.0%} used", "free some space; Ray stops at 95%"
            )
    return warning or Finding("disk", "ok", ", ".join(dict.fromkeys(rooms)))


def check_shared_memory(folder: Path = Path("/dev/shm")) -> Finding:
    """Room in shared memory for Ray's object store and FFCV's writer."""
    remedy = "in a container: docker run --shm-size=2g"
    try:
        with tempfile.TemporaryFile(dir=folder):
            free = shutil.disk_usage(folder).free
    except OSError as error:
        return Finding("shared memory", "fail", f"{folder} is not writable ({error})", remedy)
    if free < GIB:
        return Finding("shared memory", "warn", f"{free / 2**20:.0f} MiB free at {folder}: Ray will use /tmp", remedy)
    return Finding("shared memory", "ok", f"{free / GIB:.0f} GiB free at {folder}")


CHECKS: dict[str, Callable[[], Finding]] = {
    "python": check_python,
    "packages": check_packages,
    "torch": check_torch,
    "compiler": check_compiler,
    "ffcv": check_ffcv,
    "ray": check_ray,
    "mlflow": check_mlflow,
    "slurm": check_slurm,
    "disk": check_disk,
    "shared memory": check_shared_memory,
}
REMEDIES = {
    "compiler": "install g++ and Python's headers (Debian: apt-get install g++ python3-dev), or name one in CXX; "
    "or leave run.compile off",
    "ffcv": f'{SETUP_AGAIN}; or train with data.backend = "torch"',
}
