"""Prove the project on this machine's GPU: tests, figures and real runs, within a time budget.

    python3 scripts/gpu/run.py --out FOLDER [--budget-s 600] [--parts tests,train]

Uses the project where it is installed; on a bare machine what `make gpu` put into `.gpu`. Writes figures.json,
figures.md and log.txt to FOLDER after every part, prints the table, and ends with 0 when every part met its limits. A
rehearsal does it all on the CPU at tiny sizes, so that its figures mean nothing.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[0] = str(ROOT)  # a script's own folder otherwise

from scripts.gpu import figures  # noqa: E402 - after the path
from scripts.gpu.plan import Outcome, Part, all_met, run_parts  # noqa: E402

CARRIED = ROOT / ".gpu"
DEFAULT_BUDGET_S = 600.0
TAIL_LINES = 60
PARTS = "scripts.gpu.parts"

PLAN = (
    Part("tests", 170, (f"{PARTS}.tests",)),
    Part("step_resnet18", 100, (f"{PARTS}.steps", "resnet18")),
    Part("step_resnet50", 140, (f"{PARTS}.steps", "resnet50")),
    Part("step_mobilenetv2", 130, (f"{PARTS}.steps", "mobilenetv2")),
    Part("kernels", 60, (f"{PARTS}.kernels",), needed_s=50),
    Part("parity", 60, (f"{PARTS}.parity",)),
    Part("train", 130, (f"{PARTS}.train",), needed_s=60),
    Part("loader", 70, (f"{PARTS}.loader",), needed_s=40),
    Part("ray", 80, (f"{PARTS}.ray_group",), needed_s=40),
    Part("cifar", 3600, (f"{PARTS}.cifar",), needed_s=60),
)
# A rehearsal is for small machines without a GPU.
REHEARSAL_LIMIT_S = 400.0

MACHINE = """
import importlib.util, json, os, platform, torch
gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
extra = {name: importlib.util.find_spec(name) is not None for name in ("ffcv", "ray")}
print(json.dumps({"gpu": gpu, "cpus": len(os.sched_getaffinity(0)), "torch": torch.__version__,
                  "python": platform.python_version(), **extra}))
"""


def options(arguments: list[str]) -> argparse.Namespace:
    """The command line; ends the program when it is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [part.name for part in PLAN]
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    parser.add_argument("--budget-s", type=float, default=DEFAULT_BUDGET_S, help="seconds for everything together")
    parser.add_argument("--parts", default="", help=f"some of: {','.join(names)}; default all")
    parser.add_argument("--rehearsal", action="store_true", help="on the CPU, at tiny sizes")
    parser.add_argument("--cifar", default="", metavar="PLACE", help="CIFAR-100 for the last part; skipped without")
    parser.add_argument("--cifar-set", action="append", default=[], metavar="KEY=VALUE", help="override of its recipe")
    given = parser.parse_args(arguments)
    given.parts = [name for name in given.parts.split(",") if name] or names
    if unknown := set(given.parts) - set(names):
        parser.error(f"no part is named {', '.join(sorted(unknown))}; there are: {', '.join(names)}")
    return given


def plan(given: argparse.Namespace, work: Path) -> list[Part]:
    """The parts as they will be run, in the order in which they were named."""
    common = ["--work", str(work), *(["--device", "cpu", "--tiny"] if given.rehearsal else [])]
    cifar = [f"--place={given.cifar}", *(f"--set={each}" for each in given.cifar_set)]
    by_name = {part.name: part for part in PLAN}
    chosen = []
    for part in (by_name[name] for name in given.parts):
        extra = cifar if part.name == "cifar" else []
        limit_s = REHEARSAL_LIMIT_S if given.rehearsal else part.limit_s
        chosen.append(Part(part.name, limit_s, (*part.command, *common, *extra), part.needed_s))
    return chosen


def unpack(site: Path) -> list[str]:
    """Unpack what was carried for this Python; remarks on what could not be."""
    contents = CARRIED / "contents.json"
    if not contents.is_file():
        return []
    carried = json.loads(contents.read_text())
    here = f"{sys.version_info.major}.{sys.version_info.minor}"
    if carried["python"] != here:
        return [f"{CARRIED} is for Python {carried['python']}, this is {here}: not used"]
    remarks = []
    for name in carried["archives"]:
        try:
            with tarfile.open(CARRIED / f"{name}.tar.xz") as tar:
                tar.extractall(site, filter="fully_trusted")  # our own, and Ray has files that are executable
        except (OSError, EOFError, tarfile.TarError) as error:
            remarks.append(f"{name}.tar.xz could not be unpacked: {error}")
    return remarks


def environment(site: Path) -> dict[str, str]:
    """The variables of every part: the tree and what was carried in front of what is installed."""
    path = [str(ROOT), str(site), *filter(None, [os.environ.get("PYTHONPATH")])]
    return os.environ | {"PYTHONPATH": os.pathsep.join(path), "PYTHONUNBUFFERED": "1", "RAY_USAGE_STATS_ENABLED": "0"}


def machine(env: dict[str, str]) -> dict[str, Any]:
    """What this machine is, asked of torch in a process of its own."""
    asked = subprocess.run(
        [sys.executable, "-c", MACHINE], env=env, capture_output=True, text=True, timeout=120, check=False
    )
    if asked.returncode:
        sys.exit(f"torch does not start here:\n{asked.stderr[-2000:]}")
    return {"date": time.strftime("%Y-%m-%d"), **json.loads(asked.stdout.splitlines()[-1])}


def write(folder: Path, outcomes: list[Outcome], facts: dict[str, Any], log: list[str]) -> None:
    """The results as they stand."""
    (folder / "figures.json").write_text(figures.as_json(outcomes, facts))
    (folder / "figures.md").write_text(figures.as_markdown(outcomes, facts))
    (folder / "log.txt").write_text("\n".join(log))


def main(arguments: list[str]) -> int:
    """Exit status: 0 when every part met its limits, 1 otherwise, 2 without a GPU."""
    began = time.monotonic()
    given = options(arguments)
    given.out.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix="sbs-gpu-"))
    try:
        site = work / "site"
        site.mkdir()
        remarks = unpack(site)
        env = environment(site)
        facts = machine(env) | ({"rehearsal": True} if given.rehearsal else {})
        print(*remarks, json.dumps(facts), f"ready after {time.monotonic() - began:.0f} s", sep="\n", flush=True)
        if facts["gpu"] is None and not given.rehearsal:
            print("no CUDA device is here; --rehearsal runs everything on the CPU", file=sys.stderr)
            return 2
        log, outcomes = [*remarks], list[Outcome]()
        for outcome in run_parts(plan(given, work), work, given.budget_s, env, began):
            outcomes.append(outcome)
            log.append(f"\n=== {outcome.part}: {outcome.status}, {outcome.seconds:.0f} s\n{outcome.output}")
            write(given.out, outcomes, facts, log)
            print(f"{outcome.part}: {outcome.status}, {outcome.seconds:.0f} s", flush=True)
            if outcome.status in ("failed", "timeout"):
                print(*outcome.output.splitlines()[-TAIL_LINES:], sep="\n", flush=True)
        print("\n" + figures.as_markdown(outcomes, facts))
        return 0 if all_met(outcomes, print) else 1
    finally:
        shutil.rmtree(work, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
