"""The compressed network of a finished trial as an MLflow model: `model/` in its run directory.

It is made once, by a process of its own at low priority, `python -m harness.tracking.model`, which reads the names of
run directories from its standard input: following the network's graph takes torch and seconds, which neither a training
process nor a driver should give. It stays a while for the next ones, since most of those seconds go into its start.
"""

import json
import os
import resource
import select
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Literal

from harness.run_dir import RunDir, read_json, write_text

FOLDER = "model"
LIMIT_S, CPU_LIMIT_S = 3600.0, 600
"""A process is ended that takes longer over a batch, or more CPU over a model; beside training little takes long."""
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
    unfinished = run.path / f".{FOLDER}.{os.getpid()}"
    shutil.rmtree(unfinished, ignore_errors=True)
    with torch.no_grad():
        # two images: torch.export takes a batch of one for the only size there is
        save_model(net, torch.zeros(2, 3, size, size).numpy(), unfinished)
    unfinished.replace(run.path / FOLDER)


class Maker:
    """Makes models in a child process, a batch after the other, without waiting for it."""

    def __init__(self) -> None:
        self._child: subprocess.Popen[bytes] | None = None
        self._batch: Sequence[RunDir] = ()
        self._began_s = 0.0
        self._words: IO[bytes] | None = None

    def work(self, runs: Sequence[RunDir]) -> None:
        """See to those of `runs` whose model is due: give them to the child, or look how far the last batch is."""
        if self._child is not None:
            late = time.monotonic() - self._began_s >= LIMIT_S
            ended = self._child.poll() is not None
            if ended or (late and self._left()):
                self._end()
            elif self._left():
                return
        due = [run for run in runs if state(run) == "due"]
        if due:
            self._give(due)

    def finish(self, runs: Sequence[RunDir]) -> None:
        """Make all models that are due, and wait for them."""
        while any(state(run) == "due" for run in runs):
            self.work(runs)
            if self._child is not None:
                assert self._child.stdin is not None
                self._child.stdin.close()
                try:
                    self._child.wait(LIMIT_S)
                except subprocess.TimeoutExpired:
                    self._began_s = -LIMIT_S
        self.close()

    def close(self) -> None:
        """End the child, at work or not; what it has not made stays due."""
        if self._child is not None:
            assert self._child.stdin is not None
            assert self._words is not None
            self._child.kill()
            self._child.wait()
            self._child.stdin.close()
            self._child, self._batch = None, ()
            self._words.close()

    def _left(self) -> list[RunDir]:
        return [run for run in self._batch if state(run) == "due"]

    def _give(self, due: Sequence[RunDir]) -> None:
        if self._child is None:
            self._words = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as the child
            environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
            command = [sys.executable, "-m", "harness.tracking.model"]
            self._child = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=self._words,
                env=environment,
                bufsize=0,
            )
        assert self._child.stdin is not None
        self._batch, self._began_s = due, time.monotonic()
        try:
            self._child.stdin.write("".join(f"{json.dumps(str(run.path))}\n" for run in due).encode())
        except BrokenPipeError:  # it has just left for want of work
            self._batch = ()

    def _end(self) -> None:
        """A child that failed did so over the first model that it has not made: that one is given up."""
        assert self._child is not None
        assert self._words is not None
        status, left = self._child.poll(), self._left()
        if status != 0 and left:
            self._words.seek(0)
            lines = self._words.read().decode(errors="replace").strip().splitlines()
            reason = "it took too long" if status is None else (lines or [f"the process ended with {status}"])[-1]
            write_text(_error_path(left[0]), f"{reason[:2000]}\n")
        self.close()


def _error_path(run: RunDir) -> Path:
    return run.path / f"{FOLDER}.error"


def main() -> None:
    """Make the models of the run directories that standard input names, in turn; ends at the first that fails."""
    os.nice(19)
    for run in _orders():
        if state(run) == "due":
            usage = resource.getrusage(resource.RUSAGE_SELF)
            limit = int(usage.ru_utime + usage.ru_stime) + CPU_LIMIT_S
            resource.setrlimit(resource.RLIMIT_CPU, (limit, resource.RLIM_INFINITY))
            make(run)


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
