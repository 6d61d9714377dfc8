"""What can be known to be wrong before a job waits in the queue: each as one message that says what to do."""

import os
import re
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from harness.errors import UserError, nearest
from slurm import queue
from slurm.profile import Profile, minutes

_NAME = re.compile(r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")
# The packages a job imports; ours may lie in the working directory, and then hold this file.
_NEEDED = {"ray": None, "submitit": None, "torch": None, "slurm": "launcher.py", "harness": "settings.py"}


def check_name(name: str) -> None:
    """A name becomes a folder, a word in SLURM's tables and an argument of ours."""
    if not _NAME.match(name):
        raise UserError(f"--name {name!r}: letters, digits, '.', '_' and '-' only, at most 64, the first no sign")


def check_folder(folder: Path) -> None:
    """SLURM reads % in the path of a log as a pattern, and a batch script's options end with the line."""
    bad = sorted({sign for sign in str(folder) if sign in "%\\" or not sign.isprintable()})
    if bad:
        raise UserError(
            f"the folder for the job's records, {str(folder)!r}, contains {' '.join(map(repr, bad))}, which SLURM "
            "cannot take in the path of a log file; set storage.runs in the profile (or --runs) to another folder"
        )


def check_command(command: Sequence[str], workdir: Path, profile: Profile, environ: Mapping[str, str]) -> None:
    """The program must exist, unless set-up lines or a container decide what exists on the node."""
    if not command:
        raise UserError("there is no command: write it after `--`, e.g. `-- python -m sweeps run SPACE.toml`")
    if profile.node.setup or profile.node.container:
        return
    path = os.pathsep.join([str(Path(sys.executable).parent), environ.get("PATH", os.defpath)])
    program = command[0]
    if os.sep in program:
        if shutil.which(str(workdir / program)) is None:
            raise UserError(f"the command {program!r} does not exist in {workdir}, or is not executable")
    elif shutil.which(program, path=path) is None:
        raise UserError(f"no command {program!r} is on the PATH: {path}")
    is_script = len(command) > 1 and re.match(r"^python[\d.]*$", Path(program).name) and command[1].endswith(".py")
    if is_script and not (workdir / command[1]).is_file():
        raise UserError(f"the script {command[1]!r} does not exist in {workdir}")


def check_shadows(workdir: Path) -> None:
    """`python -m` looks into the working directory first: the packages that a job needs must not be hidden there."""
    for name, marker in _NEEDED.items():
        package, module = workdir / name, workdir / f"{name}.py"
        hides = module if module.is_file() else package if (package / "__init__.py").is_file() else None
        if hides is not None and not (marker and (package / marker).is_file()):
            raise UserError(f"{hides} hides the package {name!r} from the job: rename it, or submit from elsewhere")


def check_queue(profile: Profile, partitions: Sequence[queue.Partition]) -> None:
    """What no node of the partition can ever give would wait in the queue for ever."""
    job = profile.job
    if job.partition is None:
        return
    known = {partition.name: partition for partition in partitions}
    asked = [known.get(name) for name in job.partition.split(",")]
    if None in asked:
        missing = next(name for name in job.partition.split(",") if name not in known)
        raise UserError(f"job.partition: there is no partition {missing!r} here; {nearest(missing, sorted(known))}")
    offers = [partition for partition in asked if partition is not None]
    if all(job.nodes > offer.nodes for offer in offers):
        raise UserError(f"job.nodes = {job.nodes}, but partition {job.partition} has {max(o.nodes for o in offers)}")
    if profile.node.cpus is not None and all(profile.node.cpus > offer.cpus for offer in offers):
        raise UserError(
            f"node.cpus = {profile.node.cpus}, but the largest node of partition {job.partition} has "
            f"{max(offer.cpus for offer in offers)}"
        )
    limits = [offer.limit_minutes for offer in offers]
    if all(limit is not None and minutes(job.time) > limit for limit in limits):
        most = max(limit for limit in limits if limit is not None)
        raise UserError(f"job.time = {job.time}, but partition {job.partition} allows {most} minutes at most")
