"""`make services`: the daemons that some tests start by themselves. Installs those missing, starts none."""

import os
import shutil
import sys
import tempfile
from pathlib import Path

from scripts import debian
from scripts.console import SetupError, fail

PURPOSE = "testing against real services"
# Debian package -> a program that shows that it, or the like of it, is there.
SERVICES = {
    "slurmctld": "slurmctld",
    "slurmd": "slurmd",
    "slurmdbd": "slurmdbd",
    "slurm-client": "sbatch",
    "munge": "munged",
    "mariadb-server": "mariadbd",
    "iproute2": "ip",
    "bc": "bc",
    "postgresql": "initdb",
    "chromium": "chromium",
}
UNITS = {
    "slurmctld": "slurmctld",
    "slurmd": "slurmd",
    "slurmdbd": "slurmdbd",
    "munge": "munge",
    "mariadb-server": "mariadb",
    "postgresql": "postgresql",
}


def missing_services() -> list[str]:
    """The Debian packages to add."""
    folders = [os.environ.get("PATH", ""), "/usr/sbin", "/sbin", *map(str, Path("/usr/lib/postgresql").glob("*/bin"))]
    path = ":".join(folders)
    known = debian.installed(list(SERVICES))
    return [
        package
        for package, program in SERVICES.items()
        if package not in known and not shutil.which(program, path=path)
    ]


def main() -> int:
    """Exit status: 0 when all are there, 2 with one message otherwise."""
    missing = missing_services()
    if not missing:
        print(f"make services: all there ({', '.join(SERVICES)})")
        return 0
    try:
        if admin := debian.administrator(missing, PURPOSE):
            # All of the rest writes to the system, so all of it runs as root.
            os.execvp(admin[0], [*admin, sys.executable, "-m", "scripts.services"])
        log = Path(tempfile.mkstemp(prefix="sbs-harness-services-", suffix=".log")[1])
        with debian.no_daemons_started():
            debian.install(missing, log, PURPOSE)
        debian.keep_disabled([UNITS[package] for package in missing if package in UNITS])
    except SetupError as error:
        return fail("make services", error)
    except KeyboardInterrupt:
        return fail("make services", SetupError("interrupted; the same command goes on from here"))
    print(f"make services: installed {', '.join(missing)}; none of them was started")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
