"""The digits as a Ray Train worker group, against the same run in one process."""

import importlib
import os
import sys
import time
from collections.abc import Iterator

from scripts.gpu.part import Options, main
from scripts.gpu.parts.train import UNDISTURBED, Run, backend, settings, written_digits
from tests.benchmarks.measure import NotHereError, Row

CPUS = 2
# An elastic group waits so long for more workers than there are GPUs.
START_LIMIT_S = "5"


def rows(options: Options) -> Iterator[Row]:
    """Accuracy, time, and the weights beside those of the part `train`, if that came before."""
    try:
        importlib.import_module("ray.train.torch")
    except ImportError as error:
        raise NotHereError(f"Ray cannot be imported: {error}") from None
    os.environ["RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"] = START_LIMIT_S
    sets = [f"data.dir={written_digits(options.work)}", f"data.backend={backend()}", *settings(options)]
    run = Run(options.work / "ray", [*sets, "run.workers=[1, 2]", f"run.cpus_per_worker={CPUS}"], "--ray")
    begin = time.monotonic()
    run.start()
    if run.wait():
        sys.exit(f"the group ended with status {run.process.returncode}:\n{run.said()}")
    yield Row("digits, Ray Train group: start to end", time.monotonic() - begin, None, "s")
    result = run.folder.result()
    assert result is not None
    stack = result["stack"]
    name = f"digits, {stack['launcher']}, {stack['world_size']} rank, {stack['backend']}"
    yield Row(f"{name}: top-1", result["top1"], 95.0, "%", at_least=True)
    before = Run(options.work / UNDISTURBED, [])
    if before.folder.weights_path.exists() and stack["world_size"] == 1:
        yield Row("digits: weights of the group equal those of one process", run.digest() == before.digest(), 1,
                  at_least=True)  # fmt: skip


if __name__ == "__main__":
    main(rows)
