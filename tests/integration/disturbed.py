"""`python -m tests.integration.disturbed SPEC.json WHERE...`: run a trial in this process and strike it down at WHERE.

step:N           SIGKILL before the N-th optimiser step of the trial (counted over all stages)
stage:NAME       SIGKILL when stage NAME begins
writing:N        SIGKILL half-way through writing the N-th file of a checkpoint
evaluating:N     SIGKILL within the N-th evaluation
term:N, usr2:N   SIGTERM, SIGUSR2 to this process before step N
term-eval:N      SIGTERM within the N-th evaluation
nan:N:RANK       the loss of the N-th step is NaN on one rank alone
nothing          leave it alone
"""

import os
import signal
import sys
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import sbs
from harness import checkpoint, context, loop, stages
from harness.config import TrialSpec
from harness.errors import run_cli


def _before(owner: Any, name: str, strike: Callable[..., None]) -> None:
    original = getattr(owner, name)

    def disturbed(*arguments: Any, **options: Any) -> Any:
        strike(*arguments)
        return original(*arguments, **options)

    setattr(owner, name, disturbed)


def _arm(where: str) -> None:
    kind, _, value = where.partition(":")
    calls = count(1)

    def send(number: signal.Signals) -> None:
        os.kill(os.getpid(), number)

    if kind in {"step", "term", "usr2"}:
        number = {"step": signal.SIGKILL, "term": signal.SIGTERM, "usr2": signal.SIGUSR2}[kind]
        _before(loop.StageLoop, "_step", lambda self, *_: self.global_step() == int(value) and send(number))
    elif kind == "stage":
        _before(context.Context, "enter", lambda _, stage: stage == value and send(signal.SIGKILL))
    elif kind in {"evaluating", "term-eval"}:
        number = signal.SIGKILL if kind == "evaluating" else signal.SIGTERM
        _before(context, "evaluate", lambda *_: next(calls) == int(value) and send(number))
    elif kind == "writing":

        def tear(path: Path, content: bytes) -> None:
            if path.suffix == ".pt" and next(calls) == int(value):
                path.with_name(f".{path.name}.torn.tmp").write_bytes(content[: len(content) // 2])
                send(signal.SIGKILL)

        _before(checkpoint, "write_bytes", tear)
    elif kind == "nan":
        _spoil(*map(int, value.split(":")))
    elif kind != "nothing":
        raise SystemExit(f"unknown disturbance {where!r}")


def _spoil(step: int, rank: int) -> None:
    original = loop.StageLoop._step

    def spoilt(self: loop.StageLoop, *arguments: Any) -> None:
        stepper_step = self.stepper.step
        if (self.global_step(), self.ranks.rank) == (step, rank):
            self.stepper.step = lambda *a: [part * float("nan") for part in stepper_step(*a)]  # type: ignore[method-assign]
        original(self, *arguments)

    loop.StageLoop._step = spoilt  # type: ignore[method-assign]


def main() -> None:
    sbs.use_compiled(False)  # a process that lives for two seconds is not worth a compilation
    spec = TrialSpec.model_validate_json(Path(sys.argv[1]).read_text())
    for where in sys.argv[2:]:
        _arm(where)
    stages.run(spec)


if __name__ == "__main__":
    run_cli(main)
