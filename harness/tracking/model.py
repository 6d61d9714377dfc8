"""The compressed network of a finished trial as an MLflow model: `model/` in its run directory.

It is made once, by a process of its own at low priority, `python -m harness.tracking.model RUN_DIR...`:
following the network's graph takes torch and seconds, which neither a training process nor a driver should give.
"""

import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Literal

from harness.run_dir import RunDir, read_json, write_text

FOLDER = "model"
LIMIT_S, CPU_LIMIT_S = 3600.0, 600
"""A process that takes longer over one batch is ended; beside training little work takes long."""

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
        """See to those of `runs` whose model is due: start a child, or look whether the last one has ended."""
        if self._child is not None:
            if self._child.poll() is None and time.monotonic() - self._began_s < LIMIT_S:
                return
            self._end()
        due = [run for run in runs if state(run) == "due"]
        if due:
            self._begin(due)

    def finish(self, runs: Sequence[RunDir]) -> None:
        """Make all models that are due, and wait for them."""
        while any(state(run) == "due" for run in runs):
            self.work(runs)
            if self._child is not None:
                try:
                    self._child.wait(LIMIT_S)
                except subprocess.TimeoutExpired:
                    self._began_s = -LIMIT_S
        self.close()

    def close(self) -> None:
        """End a child that is still at work; what it has not made stays due."""
        if self._child is not None:
            self._child.kill()
            self._child.wait()
            self._child = None
            assert self._words is not None
            self._words.close()

    def _begin(self, due: Sequence[RunDir]) -> None:
        self._words = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as the child
        self._batch, self._began_s = due, time.monotonic()
        command = [sys.executable, "-m", "harness.tracking.model", *(str(run.path) for run in due)]
        environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
        quiet = subprocess.DEVNULL
        self._child = subprocess.Popen(command, stdin=quiet, stdout=quiet, stderr=self._words, env=environment)

    def _end(self) -> None:
        """A child that failed did so over the first model that it has not made: that one is given up."""
        assert self._child is not None
        assert self._words is not None
        status = self._child.poll()
        left = [run for run in self._batch if state(run) == "due"]
        if status != 0 and left:
            self._words.seek(0)
            lines = self._words.read().decode(errors="replace").strip().splitlines()
            reason = "it took too long" if status is None else (lines or [f"the process ended with {status}"])[-1]
            write_text(_error_path(left[0]), f"{reason[:2000]}\n")
        self.close()


def _error_path(run: RunDir) -> Path:
    return run.path / f"{FOLDER}.error"


def main(folders: Sequence[str]) -> None:
    """Make the models of these run directories, one after the other; ends at the first that fails."""
    os.nice(10)
    resource.setrlimit(resource.RLIMIT_CPU, (CPU_LIMIT_S, CPU_LIMIT_S))
    for folder in folders:
        run = RunDir(folder)
        if state(run) == "due":
            make(run)


if __name__ == "__main__":
    main(sys.argv[1:])
