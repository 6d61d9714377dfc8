"""A Ray cluster to run on: the one that RAY_ADDRESS names, or a private one on this machine while it lasts."""

import fcntl
import gc
import json
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from harness.errors import UserError
from harness.settings import RAY_SUBMISSION_VARIABLE

# How Train and Tune behave, on any cluster. A worker group may start slowly on a busy machine: with the default of 60 s
# Train would start over for ever.
SETTINGS = {
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "300",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    "RAY_TRAIN_METRICS_ENABLED": "0",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
}
# Only where the cluster is this machine: nothing here is pre-empted node by node, and polling costs no network.
LOCAL_SETTINGS = {
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
    "RAY_USAGE_STATS_ENABLED": "0",
}
# For the driver alone: our own progress and signals instead of Tune's.
DRIVER_SETTINGS = {
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_SIGINT_HANDLER": "1",
    "RAY_AIR_NEW_OUTPUT": "0",
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",  # a last result tells the ending, not the metrics
    "TUNE_WARN_THRESHOLD_S": "10",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}
LONGEST_TEMP = 40
"""Characters of the temporary folder beyond which Ray's socket paths would exceed the system's limit of 107 bytes."""
_PREFIX, _OWNER = "sbs-", "owner"
_TOKEN = secrets.token_hex(32)
"""One for the life of this process, since Ray reads it once."""


@dataclass(frozen=True)
class Node:
    """One machine's CPUs and GPUs as the cluster counts them."""

    cpus: float
    gpus: float = 0.0


def local_nodes(*, gpus: bool) -> list[Node]:
    """This machine as the only node: the CPUs that this process may use, and its GPUs if a trial wants any."""
    count = 0
    if gpus:
        import torch

        count = torch.cuda.device_count()
    return [Node(float(len(os.sched_getaffinity(0))), float(count))]


def uses_existing_cluster() -> bool:
    """Whether RAY_ADDRESS names a cluster to join."""
    return bool(os.environ.get("RAY_ADDRESS"))


@contextmanager
def joined(nodes: Sequence[Node] | None) -> Iterator[list[Node]]:
    """Be connected to Ray while inside; the nodes that there are. Stops what it started, also after an error.

    A private cluster listens on the loopback interface, asks for a token that only this user can read, and lives in a
    folder of mode 700; `nodes` says what it offers (None: `local_nodes`). Raises `UserError` if the named cluster
    cannot be joined.
    """
    settings = DRIVER_SETTINGS | SETTINGS | ({} if uses_existing_cluster() else LOCAL_SETTINGS)
    for name, value in settings.items():
        os.environ.setdefault(name, value)
    if uses_existing_cluster():
        yield from _existing()
    else:
        yield from _private((nodes or local_nodes(gpus=True))[0])


def _existing() -> Iterator[list[Node]]:
    import ray

    address = os.environ["RAY_ADDRESS"]
    variables = SETTINGS | _submission()
    try:
        ray.init(address=address, log_to_driver=False, logging_level="ERROR", runtime_env={"env_vars": variables})
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise UserError(f"cannot join the Ray cluster at RAY_ADDRESS={address}: {error}") from None
    try:
        alive = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        yield [Node(found.get("CPU", 0.0), found.get("GPU", 0.0)) for found in alive]
    finally:
        _leave()


def _leave() -> None:
    """Shut Ray down while no garbage is collected.

    References to its objects lie in cycles; collected by another thread (that of the tracking store, say) in the middle
    of the shutdown, they call a worker that is no more, at which Ray ends the process.
    """
    import ray

    gc.collect()
    enabled = gc.isenabled()
    gc.disable()
    try:
        ray.shutdown()
    finally:
        if enabled:
            gc.enable()


def _submission() -> dict[str, str]:
    """What `ray job submit` calls this driver, for its workers to know; Ray tells the driver alone."""
    told = json.loads(os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}"))
    name = (told.get("metadata") or {}).get("job_submission_id")
    return {RAY_SUBMISSION_VARIABLE: str(name)} if name else {}


@contextmanager
def scratch(base: Path) -> Iterator[Path]:
    """A folder of mode 700 in `base` for a cluster's sockets and logs, gone afterwards.

    Whoever is killed leaves it behind; the next start takes such folders away. A lock tells the living from the dead.
    """
    _clear(base)
    folder = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=base))
    unnamed = folder / ".owner"
    with unnamed.open("w", encoding="ascii") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        unnamed.rename(folder / _OWNER)  # with its lock: no one ever sees it without
        file.write(f"{os.getpid()}\n")
        file.flush()
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def _clear(base: Path) -> None:
    """Remove this user's scratch folders whose owners are dead, wherever on this machine those ran."""
    for folder in base.glob(f"{_PREFIX}*"):
        with suppress(OSError):  # another user's, not a scratch folder, alive, or just taken away by another start
            if folder.is_symlink() or folder.stat().st_uid != os.getuid():
                continue
            with (folder / _OWNER).open("r+", encoding="ascii") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                # under another name first: a dying process of that cluster may still write to the old one
                shutil.rmtree(folder.rename(base / f".{folder.name}"), ignore_errors=True)


def _private(node: Node) -> Iterator[list[Node]]:
    base = tempfile.gettempdir()
    with scratch(Path(base if len(base) <= LONGEST_TEMP else "/tmp")) as folder:
        yield from _private_in(folder, node)


def _private_in(folder: Path, node: Node) -> Iterator[list[Node]]:
    mine = "RAY_AUTH_MODE" not in os.environ
    if mine:  # read when ray is first imported
        token = folder / "token"
        token.touch(mode=0o600)
        token.write_text(_TOKEN, encoding="ascii")
        os.environ.update({"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token)})
    import ray

    try:
        ray.init(
            address="local",
            num_cpus=int(node.cpus),
            num_gpus=int(node.gpus),
            include_dashboard=False,
            log_to_driver=False,
            logging_level="ERROR",
            _node_ip_address="127.0.0.1",
            _temp_dir=str(folder),
        )
        yield [node]
    finally:
        _leave()  # also after a start that failed half-way
        if mine:
            for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN_PATH"):
                os.environ.pop(name, None)
