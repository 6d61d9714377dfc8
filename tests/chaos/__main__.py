"""`make chaos N=20`: kill training runs at random moments and hold what comes out against an undisturbed run.

Runs go on two ranks, in turn under torchrun and under Ray Train. A kill strikes one rank, rank 0, or everything (the
driver with Ray's head, or torchrun with its ranks), at a step drawn uniformly over the run; at least one falls into
each stage. What does not restart by itself is started again, as a person or a scheduler would. Prints the seed first,
every kill as it happens, and last: survived / N, seconds lost per kill, duplicates, lost metrics. Ends with 1 unless
every run ended with the weights, policy and metrics of the undisturbed one.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from harness.run_dir import RunDir, read_json
from tests.integration import tiny
from tests.integration.test_train_resume import trace
from tests.integration.waiting import command_line, descendants, kill

EPOCHS = {"pretrain": 12, "search": 12, "finetune": 12}
STEPS_PER_EPOCH = 6
KILLS_PER_RUN = 5
LIMIT_S = 180.0
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}


@dataclass(frozen=True)
class Kill:
    """Strike `target` ("rank", "rank 0" or "everything") once the run has made `step` steps."""

    step: int
    target: str


def stage_of(step: int) -> str:
    """The stage in which a step lies."""
    end = 0
    for stage, epochs in EPOCHS.items():
        end += epochs * STEPS_PER_EPOCH
        if step < end:
            return stage
    return stage


@dataclass
class Tally:
    """What the kills did."""

    kills: int = 0
    survived: int = 0
    lost_s: list[float] = field(default_factory=list)
    stages: list[str] = field(default_factory=list)
    duplicates: int = 0
    lost: int = 0


def draw(count: int, dice: random.Random) -> list[list[Kill]]:
    """Kills for as many runs as needed, a few each in order of their steps, at least one in every stage."""
    total = sum(EPOCHS.values()) * STEPS_PER_EPOCH
    first = [n * total // len(EPOCHS) + dice.randrange(total // len(EPOCHS)) for n in range(len(EPOCHS))]
    steps = (first + [dice.randrange(total) for _ in range(count)])[:count]
    targets = ("rank", "rank 0", "everything")
    kills = [Kill(step, dice.choice(targets)) for step in steps]
    dice.shuffle(kills)
    groups = [kills[i : i + KILLS_PER_RUN] for i in range(0, count, KILLS_PER_RUN)]
    return [sorted(group, key=lambda each: each.step) for group in groups]


class Runner:
    """One run in its folder, started as often as it takes."""

    def __init__(self, recipe: Path, folder: Path, launcher: str) -> None:
        self.run = RunDir(folder).create()
        sets = [part for stage, epochs in EPOCHS.items() for part in ("--set", f"{stage}.epochs={epochs}")]
        train = ["-m", "harness", "train", str(recipe), *sets, "--run-dir", str(folder)]
        torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        self._command = [sys.executable, *(torchrun + train if launcher == "torchrun" else [*train, "--ray"])]
        self._log = folder.with_suffix(".log").open("ab")
        self._process: subprocess.Popen[bytes] | None = None

    def alive(self) -> bool:
        """Whether the launcher runs."""
        return self._process is not None and self._process.poll() is None

    def start(self) -> None:
        """Start it, or start it again."""
        self._process = subprocess.Popen(self._command, stdout=self._log, stderr=self._log, env=ENVIRONMENT)

    def step(self) -> int:
        """Steps made so far, at most a second ago; the truth may be further."""
        told = read_json(self.run.progress_path)
        return 0 if told is None else int(told["step"])

    def strike(self, target: str) -> None:
        """SIGKILL to what `target` names."""
        assert self._process is not None
        family = descendants(self._process.pid)
        ranks = [p for p in family if "RayTrainWorker" in command_line(p) or "-m harness train" in command_line(p)]
        main = int((self.run.path / "lock").read_text().split()[1])
        if target == "everything":
            kill(*[p for p in family if "gcs_server" in command_line(p)], self._process.pid, *ranks)
            self._process.wait(30)
            kill(*family)
        elif target == "rank 0":
            kill(main)
        else:
            kill(*[p for p in ranks if p != main][:1])

    def close(self) -> None:
        """End what still runs."""
        if self._process is not None:
            kill(*descendants(self._process.pid), self._process.pid)
            self._process.wait(30)
        self._log.close()


def reach(runner: Runner, step: int) -> None:
    """Wait until the run has made `step` steps or ended, starting it whenever it is down."""
    deadline = time.monotonic() + LIMIT_S
    while runner.run.result() is None and runner.step() < step:
        if not runner.alive():
            runner.start()
        if time.monotonic() > deadline:
            raise TimeoutError(f"{runner.run.path}: no progress from step {runner.step()} to {step} in {LIMIT_S:g} s")
        time.sleep(0.02)


def torment(runner: Runner, kills: Sequence[Kill], tally: Tally) -> None:
    """Carry out the kills of one run and bring it to its end."""
    for each in kills:
        reach(runner, each.step)
        if runner.run.result() is not None:
            print(f"  {each.target} at step {each.step} ({stage_of(each.step)}): the run was over before")
            tally.kills += 1
            continue
        struck_at, begin = runner.step(), time.monotonic()
        runner.strike(each.target)
        runner.run.progress_path.unlink(missing_ok=True)  # what is read from here on was written by the new life
        reach(runner, struck_at + 1)
        lost_s = time.monotonic() - begin
        tally.kills += 1
        tally.lost_s.append(lost_s)
        tally.stages.append(stage_of(struck_at))
        print(f"  {each.target} at step {struck_at} ({stage_of(struck_at)}): {lost_s:.1f} s lost", flush=True)
    deadline = time.monotonic() + LIMIT_S
    while runner.run.result() is None:
        if not runner.alive():
            runner.start()
        if time.monotonic() > deadline:
            raise TimeoutError(f"{runner.run.path} does not end")
        time.sleep(0.05)


def judge(run: RunDir, reference: dict[str, Any], kills: int, tally: Tally) -> None:
    """Compare one tormented run with the undisturbed one."""
    found = trace(run)
    wanted = [json.dumps(each) for each in reference["metrics"]]
    had = [json.dumps(each) for each in found["metrics"]]
    tally.duplicates += len(had) - len(set(had))
    tally.lost += len(set(wanted) - set(had))
    if found == reference:
        tally.survived += kills
    else:
        print(f"  DIFFERENT from the undisturbed run: {run.path}")


def main() -> int:
    """Parse, run, print, and return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description="Kill runs at random moments.")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(10**6))
    options = parser.parse_args()
    print(f"seed {options.seed}, {options.kills} kills", flush=True)
    tally = Tally()
    with tempfile.TemporaryDirectory(prefix="sbs-chaos-") as name:
        folder = Path(name)
        recipe = tiny.recipe_file(tiny.write_data(folder), "workers = 2\n")
        calm = Runner(recipe, folder / "calm" / "run", "torchrun")
        torment(calm, [], tally)
        calm.close()
        reference = trace(calm.run)
        for number, kills in enumerate(draw(options.kills, random.Random(options.seed))):
            launcher = ("torchrun", "ray")[number % 2]
            print(f"run {number + 1} under {launcher}", flush=True)
            runner = Runner(recipe, folder / f"run{number}" / "run", launcher)
            try:
                torment(runner, kills, tally)
                judge(runner.run, reference, len(kills), tally)
            except TimeoutError as stuck:
                print(f"  STUCK: {stuck}")
            finally:
                runner.close()
    return report(tally, options.kills)


def report(tally: Tally, wanted: int) -> int:
    """Print the last lines; 0 if nothing was lost."""
    mean_s = sum(tally.lost_s) / max(1, len(tally.lost_s))
    counted = ", ".join(f"{stage} {tally.stages.count(stage)}" for stage in EPOCHS)
    print(f"kills by stage: {counted}")
    print(f"survived {tally.survived} / {wanted}")
    print(f"seconds lost per kill: mean {mean_s:.1f}, worst {max(tally.lost_s, default=0.0):.1f}")
    print(f"duplicates {tally.duplicates}")
    print(f"lost metrics {tally.lost}")
    return 0 if (tally.survived, tally.duplicates, tally.lost) == (wanted, 0, 0) else 1


if __name__ == "__main__":
    sys.exit(main())
