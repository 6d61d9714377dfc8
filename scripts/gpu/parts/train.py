"""A real `harness train` on the digits, left by SIGTERM in the search and gone on with, beside an undisturbed one.

Both run at the same time, since what they compute is in question and not how fast: their final weights are to be the
same to the last bit.
"""

import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from harness.checkpoint import load_weights, weights_digest
from harness.errors import EXIT_PREEMPTED, UserError
from harness.run_dir import RunDir
from scripts.gpu.part import Options, main
from tests.benchmarks.measure import Row

LEAVE_MUST_S = 20.0
TOP1_MUST = 95.0
WAIT_S = 300.0
"""For anything that a run is to do; the part has a limit of its own."""
UNDISTURBED = "undisturbed"


def rows(options: Options) -> Iterator[Row]:
    """Times, accuracy, and whether the weights are equal."""
    begin = time.monotonic()
    sets = [f"data.dir={written_digits(options.work)}", f"data.backend={backend()}", *settings(options)]
    yield Row("digits, written", time.monotonic() - begin, None, "s")
    plain, disturbed = (Run(options.work / name, sets) for name in (UNDISTURBED, "disturbed"))
    begin = time.monotonic()
    plain.start()
    disturbed.start()
    disturbed.wait_for("search")
    asked = time.monotonic()
    disturbed.process.send_signal(signal.SIGTERM)
    status = disturbed.wait()
    print(f"status {status}:\n{disturbed.said()}", flush=True)
    yield Row("digits: status after SIGTERM in the search is 85", status == EXIT_PREEMPTED, 1, at_least=True)
    yield Row("digits: SIGTERM to the end, its state written", time.monotonic() - asked, LEAVE_MUST_S, "s")
    disturbed.start()
    for run in (plain, disturbed):
        if run.wait():
            sys.exit(f"a run ended with status {run.process.returncode}:\n{run.said()}")
    yield Row("digits: two runs at a time, one of them twice", time.monotonic() - begin, None, "s")
    result = plain.folder.result()
    assert result is not None
    print(result, flush=True)
    yield Row(f"digits on {result['stack']['device']}, {result['stack']['loader']}: top-1", result["top1"], TOP1_MUST,
              "%", at_least=True)  # fmt: skip
    same = plain.digest() == disturbed.digest()
    yield Row("digits: weights after the leave equal the undisturbed", same, 1, at_least=True)


def settings(options: Options) -> list[str]:
    """Overrides for the device; a rehearsal makes fewer epochs."""
    gpu = ["run.gpus_per_worker=1", "run.precision=bf16"] if options.device == "cuda" else []
    few = ["pretrain.epochs=1", "pretrain.warmup_epochs=0", "search.epochs=2", "finetune.epochs=1"]
    return ["run.deterministic=true", *gpu, *(few if options.tiny else [])]


def written_digits(work: Path) -> Path:
    """The digits as a data set, written by the command line."""
    folder = work / "digits"
    if not folder.exists():
        subprocess.run(harness("data", "write", "--source", "digits", "--out", str(folder)), check=True)
    return folder


def backend() -> str:
    """FFCV where it loads, else the plain one."""
    try:
        import harness.data.ffcv_backend  # noqa: F401
    except UserError as reason:
        print(reason, flush=True)
        return "torch"
    return "ffcv"


def harness(*arguments: str) -> list[str]:
    """A command of the harness."""
    return [sys.executable, "-m", "harness", *arguments]


class Run:
    """One `harness train` in a folder of its own, where nothing is shared with others."""

    def __init__(self, place: Path, sets: Sequence[str], *more: str, recipe: str = "digits_resnet20") -> None:
        place.mkdir(parents=True, exist_ok=True)
        self.folder = RunDir(place / "run")
        self._log = place / "log.txt"
        options = [word for each in sets for word in ("--set", each)]
        self._command = harness("train", recipe, "--run-dir", str(self.folder.path), *options, *more)
        self.process: subprocess.Popen[bytes]

    def start(self, *, shown: bool = False) -> None:
        """Begin, or go on; `shown`: its output is that of this program."""
        with self._log.open("ab") as sink:
            self.process = subprocess.Popen(self._command, stdout=None if shown else sink, stderr=subprocess.STDOUT)

    def wait(self, limit_s: float | None = WAIT_S) -> int:
        """Its exit status."""
        return self.process.wait(timeout=limit_s)

    def wait_for(self, stage: str) -> None:
        """Until it has an epoch of that stage behind it; the program ends if it never comes to that."""
        deadline = time.monotonic() + WAIT_S
        while not any(record["kind"] == "metrics" and record["stage"] == stage for record in self.folder.metrics()):
            if self.process.poll() is not None or time.monotonic() > deadline:
                sys.exit(f"the run came to no epoch of its {stage}:\n{self.said()}")
            time.sleep(0.05)

    def said(self) -> str:
        """The end of its output."""
        return self._log.read_text(errors="replace")[-4000:]

    def digest(self) -> str:
        """Of the final weights."""
        return weights_digest(load_weights(self.folder.weights_path))


if __name__ == "__main__":
    main(rows)
