"""One trial as a Ray Train worker group. The only module that imports ray.train.

The loop keeps its own checkpoints in the run directory and finds them at start, so a worker group that Ray starts anew
(after a lost worker or node, or with another number of ranks) goes on by itself. Ray's checkpoints are not used.
"""

import os
import time
from pathlib import Path
from typing import Any

from harness.config import RunConfig, TrialSpec
from harness.errors import Preempted, TrainingError, UserError
from harness.ray_cluster import SETTINGS
from harness.run_dir import RunDir

# At least; losing a node counts against the controller, not the workers, and its default is to try again for ever.
_CONTROLLER_FAILURES = 5
# Just after a node is lost Ray still counts on it: an elastic group waits this long for it before it shrinks.
_START_LIMIT, _ELASTIC_START_LIMIT_S = "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "60"
# Patience with a shared file system that shows another machine's files late.
_VISIBILITY_LIMIT_S = 10.0


def fit(spec: TrialSpec, *, inside_tune: bool) -> dict[str, Any]:
    """Run a trial, or go on with it, and wait for its end; the content of its result.json.

    With several workers it runs as a Ray Train worker group on the cluster that this process has joined
    (`harness.ray_cluster`); a single one needs none and runs in this process.
    `inside_tune`: pass every epoch's metrics on to the Tune trial that this process is.
    Raises `Preempted` after an orderly leave, `UserError` for what a person must mend, and Ray's TrainingFailedError
    when the group failed more often than run.max_restarts.
    """
    folder = RunDir(spec.run_dir).create()
    done = folder.result()
    if done is not None:
        return done
    folder.clear_error()
    if spec.recipe.run.max_workers == 1:
        return _in_process(spec, inside_tune=inside_tune)
    if not folder.stop_requested():
        _fit_group(spec, inside_tune)
    remote = spec.recipe.run.remote
    if remote is not None and folder.result() is None and folder.error() is None:
        from harness.remote import RemoteCopy

        RemoteCopy(folder, remote).fetch_outcome()  # rank 0 may have worked on a machine that shares no disk
    return _outcome(folder)


def _in_process(spec: TrialSpec, *, inside_tune: bool) -> dict[str, Any]:
    from harness.stages import run

    report = None
    if inside_tune:
        from ray import tune

        report = tune.report
    return run(spec, report=report)


def _fit_group(spec: TrialSpec, inside_tune: bool) -> None:
    import ray
    from ray.train import FailureConfig, ScalingConfig
    from ray.train import RunConfig as TrainRunConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    run = spec.recipe.run
    if run.min_workers < run.max_workers and os.environ.get(_START_LIMIT) == SETTINGS[_START_LIMIT]:
        os.environ[_START_LIMIT] = _ELASTIC_START_LIMIT_S
    require_capacity(run, [node["Resources"] for node in ray.nodes() if node["Alive"]])
    callbacks = []
    if inside_tune:
        from ray.tune.integration.ray_train import TuneReportCallback

        callbacks.append(TuneReportCallback())
    trainer = TorchTrainer(
        _work,
        train_loop_config={
            "spec": spec.model_dump(mode="json", by_alias=True),
            "report": inside_tune,
            "began_s": time.time(),
        },
        scaling_config=ScalingConfig(
            num_workers=run.workers,
            use_gpu=run.gpus_per_worker > 0,
            resources_per_worker=worker_resources(run),
        ),
        torch_config=TorchConfig(backend="nccl" if run.gpus_per_worker else "gloo"),
        run_config=TrainRunConfig(
            name=spec.key,
            storage_path=str(Path(spec.run_dir) / "ray"),
            failure_config=FailureConfig(
                max_failures=run.max_restarts,
                controller_failure_limit=max(_CONTROLLER_FAILURES, run.max_restarts),
            ),
            callbacks=callbacks,
        ),
    )
    trainer.fit()


def _work(config: dict[str, Any]) -> None:
    """What each worker does. Ends normally when trying again would not help, so that Ray does not."""
    import ray.train
    import ray.train.torch

    from harness.stages import run

    spec = TrialSpec.model_validate(config["spec"])
    if failed_since(RunDir(spec.run_dir), config["began_s"]):
        return  # an earlier attempt of this group found what a person must mend
    report = ray.train.report if config["report"] else None
    device = ray.train.torch.get_device() if spec.recipe.run.gpus_per_worker else None
    try:
        run(spec, report=report, device=device, launcher=f"ray.train {ray.__version__}")
    except (Preempted, TrainingError):
        return  # all ranks leave together; why, is in the run directory


def failed_since(folder: RunDir, began_s: float) -> bool:
    """Whether error.json is of this start (unix time) of the trial; on a disk that is not shared an old one stays."""
    try:
        return folder.error_path.stat().st_mtime >= began_s
    except FileNotFoundError:
        return False


def _outcome(folder: RunDir) -> dict[str, Any]:
    deadline = time.monotonic() + _VISIBILITY_LIMIT_S
    while True:
        result, error = folder.result(), folder.error()
        if result is not None:
            return result
        if error is not None:
            raise UserError(error["message"])
        if folder.stop_requested():
            raise Preempted(f"left as asked, with its state in {folder.path}; run the same command again to go on")
        if time.monotonic() > deadline:
            raise RuntimeError(f"the worker group ended without a result, an error or a request to stop: {folder.path}")
        time.sleep(0.1)


def worker_resources(run: RunConfig) -> dict[str, float]:
    """What one worker asks of Ray."""
    return {"CPU": run.cpus_per_worker} | ({"GPU": run.gpus_per_worker} if run.gpus_per_worker else {})


def require_capacity(run: RunConfig, nodes: list[dict[str, float]]) -> None:
    """Raise `UserError` with the arithmetic if the nodes' resources can never hold run.workers ranks."""
    wanted = worker_resources(run)
    room = sum(min(int(node.get(name, 0.0) / amount + 1e-9) for name, amount in wanted.items()) for node in nodes)
    if room < run.min_workers:
        each = " + ".join(f"{amount:g} {name}" for name, amount in wanted.items())
        have = "; ".join(" + ".join(f"{node.get(name, 0.0):g} {name}" for name in wanted) for node in nodes)
        raise UserError(
            f"run.workers = {run.min_workers} x ({each}) can never start: the cluster's {len(nodes)} node(s) ({have}) "
            f"have room for {room}. Lower run.workers, run.cpus_per_worker or run.gpus_per_worker, or add nodes."
        )
