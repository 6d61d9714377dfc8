"""What the harness adds to training: Ray Train's steps and start, checkpoints, the bookkeeping of every step."""

import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from harness.arithmetic import arithmetic
from harness.config import TrialSpec, load_recipe
from harness.context import Context, Data
from harness.loop import StageLoop
from harness.metrics import Stopwatch
from harness.networks import full_precision
from harness.ranks import Ranks
from harness.ray_cluster import joined
from harness.ray_worker import fit
from harness.run_dir import RunDir
from harness.settings import EXIT_PREEMPTED
from harness.step import Job
from tests.benchmarks import turns
from tests.benchmarks.measure import Estimate, Row, estimate, ratio, repeated

CHECKPOINT_PERIOD_S = 30.0


def rows() -> Iterator[Row]:
    """Two ranks with a CPU each for what concerns Ray Train; one process for the rest."""
    with tempfile.TemporaryDirectory() as folder:
        yield from _ray(Path(folder))
        yield from _checkpoints(Path(folder))
        yield from _bookkeeping(Path(folder))
        yield Row("SIGTERM to status 85, digits", _leave(Path(folder)), must=20.0, unit="s")


# Ray Train ------------------------------------------------------------------------------------------------------------


def _ray(folder: Path) -> Iterator[Row]:
    with joined(None):
        yield Row("step under Ray Train / under torchrun", _turns(folder), must=1.02, unit="x")
        yield Row("start and end of a Ray Train run", _start(folder), must=14.0, unit="s", wanted=8.0)


def _turns(folder: Path) -> Estimate:
    """Ratio of the times of turns, the two runs alternating."""
    specs = {name: _turn_spec(folder, name) for name in ("ray", "torchrun")}
    path = folder / "spec.json"
    path.write_text(specs["torchrun"].model_dump_json(by_alias=True))
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    torchrun = subprocess.Popen([*launcher, "-m", "tests.benchmarks.turns", str(path)], env=environment)
    trainer = _in_thread(lambda: _train_turns(specs["ray"]))
    number = 0

    def turn(name: str) -> Callable[[], object]:
        def take() -> None:
            nonlocal number
            number += 1
            turns.turn_file(folder).write_text(f"{name} {number}")
            _wait_for(turns.result_file(folder, name, number))

        return take

    try:
        return ratio(turn("ray"), turn("torchrun"), repeats=15, warmup=2)
    finally:
        for name, spec in specs.items():
            RunDir(spec.run_dir).request_stop()
            for _ in range(3):  # the request is seen at a step, and a step needs a turn
                number += 1
                turns.turn_file(folder).write_text(f"{name} {number}")
                time.sleep(1.0)
        torchrun.wait(60)
        trainer.join(60)


def _turn_spec(folder: Path, name: str) -> TrialSpec:
    sets = [f"data.dir={folder}", f"data.source={name}", "search.method=full_precision", "run.checkpoint_every_s=1e6"]
    recipe = load_recipe("digits_resnet20", [*sets, "run.workers=2"])
    return TrialSpec(recipe=recipe, key=name, label=name, run_dir=str(folder / f"run-{name}"))


def _train_turns(spec: TrialSpec) -> None:
    from ray.train import RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    TorchTrainer(
        turns.ray_work,
        train_loop_config={"spec": spec.model_dump(mode="json", by_alias=True)},
        scaling_config=ScalingConfig(num_workers=2),
        torch_config=TorchConfig(backend="gloo"),
        run_config=RunConfig(name="turns", storage_path=str(Path(spec.run_dir) / "ray")),
    ).fit()


def _start(folder: Path) -> Estimate:
    """Wall time of a whole Ray Train run of two workers but for the work inside."""
    from harness.data import ensure

    ensure("digits", folder / "digits")
    spent = []
    for repeat in range(3):
        sets = [f"data.dir={folder}/digits", "search.method=full_precision", "pretrain.epochs=0", f"run.seed={repeat}"]
        recipe = load_recipe("digits_resnet20", [*sets, "run.workers=2"])
        spec = TrialSpec(recipe=recipe, key=f"start{repeat}", label="start", run_dir=str(folder / f"start{repeat}"))
        begin = time.perf_counter()
        result = fit(spec, inside_tune=False)
        spent.append(time.perf_counter() - begin - sum(result["timings_s"].values()))
    return estimate(spent)


# One process ----------------------------------------------------------------------------------------------------------


@contextmanager
def _bare_loop(folder: Path, recipe_name: str, side: int) -> Iterator[tuple[StageLoop, Callable[[int], None]]]:
    """The loop over a recipe's network, batches of 64 images of `side` pixels; calling the function makes n steps."""
    sets = [
        "data.batch_size=64",
        f"data.image_size={side}",
        "run.workers=1",
        "run.gpus_per_worker=0",
        "run.precision=fp32",
    ]
    recipe = load_recipe(recipe_name, [*sets, "run.checkpoint_every_s=1e6"])
    spec = TrialSpec(recipe=recipe, key="bench", label="bench", run_dir=str(folder))
    ranks = Ranks(0, 1, torch.device("cpu"), "none", "process")
    with arithmetic(recipe.run):
        context = Context(spec, ranks, data=Data(open=turns.TurnLoader))
        context.enter("pretrain")
        net = full_precision(recipe).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        loop = StageLoop(Job("pretrain", "bench", net, recipe.pretrain, 0), context, None)
        images = torch.randn(64, 3, side, side).to(memory_format=torch.channels_last)
        labels = torch.arange(64) % 10

        def steps(count: int) -> None:
            for _ in range(count):
                loop._step(images, labels)

        try:
            yield loop, steps
        finally:
            context.close()


def _checkpoints(folder: Path) -> Iterator[Row]:
    """A checkpoint of ResNet-18 with its momentum (94 MB) every 30 s: what it takes from the training thread."""
    with _bare_loop(folder / "checkpoints", "imagenet_resnet18", 64) as (loop, steps):
        step_s = repeated(lambda: steps(2), repeats=5).value / 2
        count = max(4, round(2.0 / step_s))

        def with_checkpoint() -> None:
            loop.checkpoint()
            steps(count)
            loop.context.flush()

        found = ratio(with_checkpoint, lambda: steps(count))
        share = 100 * count * step_s / CHECKPOINT_PERIOD_S
        figure = Estimate(*((r - 1) * share for r in (found.value, found.low, found.high)), found.repeats)
        yield Row("checkpoint of ResNet-18 every 30 s", figure, must=1.0, unit="%")


def _bookkeeping(folder: Path) -> Iterator[Row]:
    """Heartbeats, progress, wishes, stopwatch and one record an epoch of 22 steps, against a step of ResNet-20."""
    with _bare_loop(folder / "bookkeeping", "digits_resnet20", 32) as (loop, steps):
        step_s = repeated(lambda: steps(10)).value / 10
        watch, context = Stopwatch(), loop.context

        def epoch() -> None:
            for _ in range(22):
                context.beat("waiting for data")
                context.beat("at step 1")
                watch.step(64, 0.0)
                loop.ranks.begin_max(max(loop._wish(), loop._due()))()
                context.progress(0, 1, 1, watch.images_per_s())
            context.record("metrics", 1, 22, {f"metric/{n}": 0.5 for n in range(30)})

        found = repeated(epoch, repeats=15)
        share = 100 / 22 / step_s
        figure = Estimate(found.value * share, found.low * share, found.high * share, found.repeats)
        yield Row("bookkeeping of a step, ResNet-20", figure, must=1.0, unit="%")


def _leave(folder: Path) -> Estimate:
    """Seconds from SIGTERM in the middle of training to the end of the process, its checkpoint written."""
    spent = []
    for repeat in range(3):
        run = RunDir(folder / f"leave{repeat}")
        sets = [f"data.dir={folder}/digits", "search.method=full_precision", "pretrain.epochs=1000"]
        options = [part for override in sets for part in ("--set", override)]
        command = [sys.executable, "-m", "harness", "train", "digits_resnet20", *options, "--run-dir", str(run.path)]
        with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
            try:
                _wait_for(run.progress_path)
                process.terminate()
                begin = time.perf_counter()
                status = process.wait(120)
                spent.append(time.perf_counter() - begin)
            finally:
                process.kill()
        if status != EXIT_PREEMPTED or not list(run.checkpoints.glob("pretrain-*.json")):
            raise RuntimeError(f"left with status {status}, checkpoints: {list(run.checkpoints.iterdir())}")
    return estimate(spent)


def _in_thread(call: Callable[[], object]) -> threading.Thread:
    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    return thread


def _wait_for(path: Path, limit_s: float = 120.0) -> None:
    deadline = time.monotonic() + limit_s
    while not path.exists():
        if time.monotonic() > deadline:
            raise TimeoutError(f"no {path} after {limit_s:g} s")
        time.sleep(0.001)
