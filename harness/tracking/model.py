"""The compressed network of a finished trial as an MLflow model: `model/` in its run directory.

It is made once, by a process of its own at low priority, `python -m harness.tracking.model`, which is given the names
of run directories one by one: following the network's graph takes torch and seconds, which neither a training process
nor a driver should give. It stays a while for the next ones, since most of those seconds go into its start.
"""

import json
import os
import resource
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Literal

from harness.run_dir import RunDir, read_json, write_text

FOLDER = "model"
LIMIT_S, CPU_LIMIT_S = 3600.0, 600
"""A model is given up that takes longer, or more CPU; beside training even little CPU can take long."""
LINGER_S = 120.0
"""How long a process without work stays: it holds half a GB of memory."""

State = Literal["none", "due", "ready", "failed"]


def state(run: RunDir) -> State:
    """Whether the run directory has its model: ready, failed, still due, or none since nothing was compressed."""
    if (run.path / FOLDER / "MLmodel").is_file():
        return "ready"
    if _error_path(run).is_file():
        return "failed"
    policy = read_json(run.policy_path) or {}
    due = bool(policy.get("layers")) and run.result_path.is_file() and run.weights_path.is_file()
    return "due" if due else "none"


def failure(run: RunDir) -> str:
    """Why there is no model."""
    return _error_path(run).read_text(encoding="utf-8").strip()


def make(run: RunDir) -> None:
    """Write `model/` from config.json, policy.json and weights.pt; appears whole or not at all."""
    import torch

    from harness.checkpoint import load_weights
    from harness.config import parse_recipe
    from harness.networks import restored
    from harness.tracking.store import save_model
    from sbs.plain import plain

    recipe = parse_recipe(read_json(run.config_path) or {}, str(run.config_path))
    net = plain(restored(recipe, load_weights(run.weights_path), read_json(run.policy_path)))
    size = recipe.data.eval_image_size or recipe.data.image_size
    unfinished = _unfinished(run, os.getpid())
    shutil.rmtree(unfinished, ignore_errors=True)
    with torch.no_grad():
        # two images: torch.export takes a batch of one for the only size there is
        save_model(net, torch.zeros(2, 3, size, size).numpy(), unfinished)
    try:
        unfinished.replace(run.path / FOLDER)
    except OSError:
        shutil.rmtree(unfinished, ignore_errors=True)
        if state(run) != "ready":  # another process, on another node maybe, has been faster
            raise


class Maker:
    """Makes models in a child process, one at a time, without waiting for it. Threads may share one."""

    def __init__(self) -> None:
        self._child: _Child | None = None
        self._closed = False
        self._lock = threading.Lock()

    def work(self, runs: Sequence[RunDir]) -> None:
        """Look how far the child is, and give it the first of `runs` whose model is due once it has time."""
        with self._lock:
            child, self._child = self._child, None
            if child is not None and child.lives():
                self._child = child
            due = next((run for run in runs if state(run) == "due"), None)
            if self._closed or due is None or (self._child is not None and self._child.order is not None):
                return
            if self._child is None:
                self._child = _Child()
            self._child.give(due)

    def finish(self, runs: Sequence[RunDir]) -> None:
        """Make all models that are due, and wait for them."""
        try:
            while any(state(run) == "due" for run in runs):
                self.work(runs)
                time.sleep(0.05)
        finally:
            self.close()

    def close(self) -> None:
        """End the child, at work or not, and start no other; what it has not made stays due."""
        with self._lock:
            self._closed = True
            if self._child is not None:
                self._child.end()
                self._child = None


class _Child:
    """The process that makes models, and the run directory that it has in hand."""

    def __init__(self) -> None:
        self._words: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as the process
        environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
        try:
            # in a group of its own, as a Ctrl-C is meant for the driver, which has a last pass to make
            self._process = subprocess.Popen(
                _COMMAND, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=self._words,
                env=environment, bufsize=0, process_group=0,
            )  # fmt: skip
        except OSError:
            self._words.close()
            raise
        self.order: RunDir | None = None
        self._began_s, self._said_bytes = 0.0, 0

    def give(self, run: RunDir) -> None:
        """Have the model of `run` made."""
        assert self._process.stdin is not None
        self.order, self._began_s, self._said_bytes = run, time.monotonic(), os.fstat(self._words.fileno()).st_size
        try:
            self._process.stdin.write(f"{json.dumps(str(run.path))}\n".encode())
        except BrokenPipeError:  # it has just left for want of work
            self.order = None

    def lives(self) -> bool:
        """Whether it can go on; it is ended if it has taken too long, and an order that has ended it is given up."""
        status = self._process.poll()
        if self.order is not None and state(self.order) != "due":
            self.order = None
        late = self.order is not None and time.monotonic() - self._began_s >= LIMIT_S
        if status is None and not late:
            return True
        try:
            if self.order is not None and status not in _ASKED_TO_LEAVE:
                write_text(_error_path(self.order), f"{self._reason(status)[:2000]}\n")
        finally:
            self.end()
        return False

    def end(self) -> None:
        """Kill the process, and clear away what it leaves of an unfinished model."""
        assert self._process.stdin is not None
        self._process.kill()
        self._process.wait()
        self._process.stdin.close()
        self._words.close()
        if self.order is not None:
            shutil.rmtree(_unfinished(self.order, self._process.pid), ignore_errors=True)

    def _reason(self, status: int | None) -> str:
        if status is None:
            return f"it took longer than {LIMIT_S:g} s"
        said = os.pread(self._words.fileno(), 1 << 20, self._said_bytes).decode(errors="replace").strip().splitlines()
        if status == -signal.SIGXCPU:
            return f"it took more than {CPU_LIMIT_S} s of CPU"
        end = f"was ended by {signal.Signals(-status).name}" if status < 0 else f"ended with {status}"
        return f"the process that makes it {end}" + (f": {said[-1]}" if said else "")


_COMMAND = (sys.executable, "-m", "harness.tracking.model")
# not the model's fault, which stays due
_ASKED_TO_LEAVE = (0, -signal.SIGINT, -signal.SIGTERM, -signal.SIGHUP)


def _unfinished(run: RunDir, pid: int) -> Path:
    return run.path / f".{FOLDER}.{pid}"


def _error_path(run: RunDir) -> Path:
    return run.path / f"{FOLDER}.error"


def main() -> None:
    """Make the models of the run directories that standard input names, in turn."""
    os.nice(19)
    for run in _orders():
        if state(run) == "due":
            _limit_cpu()
            signal.alarm(int(LIMIT_S) + 60)  # for a driver that is no more
            try:
                make(run)
            except (Exception, SystemExit) as error:  # noqa: BLE001 - it must not keep the others waiting
                reason = (str(error).strip() or repr(error)).splitlines()[-1]
                write_text(_error_path(run), f"{type(error).__name__}: {reason}"[:2000] + "\n")
                shutil.rmtree(_unfinished(run, os.getpid()), ignore_errors=True)
            signal.alarm(0)


def _limit_cpu() -> None:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    limit = int(usage.ru_utime + usage.ru_stime) + CPU_LIMIT_S
    _, hard = resource.getrlimit(resource.RLIMIT_CPU)
    resource.setrlimit(resource.RLIMIT_CPU, (limit if hard == resource.RLIM_INFINITY else min(limit, hard), hard))


def _orders() -> Iterator[RunDir]:
    """Run directories as they come, a line of JSON each, until the end of input or LINGER_S without any."""
    text = b""
    while select.select([0], [], [], LINGER_S)[0]:
        read = os.read(0, 1 << 16)
        if not read:
            return
        *lines, text = (text + read).split(b"\n")
        for line in lines:
            yield RunDir(json.loads(line))


if __name__ == "__main__":
    main()
