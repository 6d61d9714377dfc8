"""The system's packages: which are missing, and installing just those, without starting any daemon."""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from scripts.console import SetupError, run

POLICY = Path("/usr/sbin/policy-rc.d")
POLICY_ASIDE = Path("/usr/sbin/policy-rc.d.before-sbs-harness")
POLICY_TEXT = "#!/bin/sh\n# Written by sbs-harness while it installs packages: nothing is to be started.\nexit 101\n"
APT = ("apt-get", "-o", "DPkg::Lock::Timeout=300", "-o", "Dpkg::Use-Pty=0")


def installed(packages: Sequence[str]) -> set[str]:
    """Those of the packages that dpkg lists as installed; none on a system without dpkg."""
    if not shutil.which("dpkg-query"):
        return set()
    listing = subprocess.run(
        ["dpkg-query", "-W", "-f", "${Package} ${db:Status-Status}\n", *packages],
        capture_output=True,
        text=True,
        check=False,
    )
    rows = (line.split() for line in listing.stdout.splitlines())
    return {row[0] for row in rows if row[-1] == "installed"}


def administrator(packages: Sequence[str], purpose: str) -> tuple[str, ...]:
    """What goes before a command that needs root: nothing as root, else sudo; raises SetupError where neither is."""
    if not shutil.which("apt-get"):
        raise SetupError(
            f"{purpose} needs what Debian calls {' '.join(packages)}; there is no apt-get here: install their like"
        )
    if os.geteuid() == 0:
        return ()
    sudo = shutil.which("sudo")
    if sudo and subprocess.run([sudo, "-n", "true"], capture_output=True, check=False).returncode == 0:
        return (sudo, "-n")
    if sudo and sys.stdin.isatty() and subprocess.run([sudo, "-v"], check=False).returncode == 0:
        return (sudo,)
    raise SetupError(
        f"{purpose} needs system packages, and this account is neither root nor allowed to use sudo.\n"
        "  Ask the administrator to run this line once, then run the same command again:\n"
        f"    apt-get update && apt-get install -y --no-install-recommends {' '.join(packages)}"
    )


def install(packages: Sequence[str], log: Path, purpose: str) -> None:
    """Install the packages, no recommended ones; raises SetupError, with the administrator's line if it may not."""
    environment = (*administrator(packages, purpose), "env", "DEBIAN_FRONTEND=noninteractive", "LC_ALL=C")
    arguments = ("install", "-y", "-q", "--no-install-recommends", *packages)
    print(f"    apt-get install {' '.join(packages)}", flush=True)
    try:
        run((*environment, *APT, *arguments), log)
    except SetupError:
        # Stale or empty package lists are the usual reason on a fresh machine.
        run((*environment, *APT, "update", "-q"), log)
        run((*environment, *APT, *arguments), log)


@contextmanager
def no_daemons_started() -> Iterator[None]:
    """Keep package scripts from starting daemons (Debian's policy-rc.d), and put back what was there. Needs root."""
    if POLICY.exists() and POLICY.read_text(errors="replace") == POLICY_TEXT:
        POLICY.unlink()  # left behind by a run that was killed
    if POLICY_ASIDE.exists() and not POLICY.exists():
        POLICY_ASIDE.rename(POLICY)
    if POLICY.exists():
        POLICY.rename(POLICY_ASIDE)
    POLICY.write_text(POLICY_TEXT)
    POLICY.chmod(0o755)
    try:
        yield
    finally:
        POLICY.unlink(missing_ok=True)
        if POLICY_ASIDE.exists():
            POLICY_ASIDE.rename(POLICY)


def keep_disabled(units: Sequence[str]) -> None:
    """Where systemd runs: units that came with a package do not start at the next boot either."""
    if units and Path("/run/systemd/system").is_dir():
        subprocess.run(["systemctl", "disable", "--quiet", *units], capture_output=True, check=False)
