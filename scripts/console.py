"""What every set-up step needs: a numbered line on the screen, a log file behind it, one readable error."""

import re
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

HEARTBEAT_S = 15.0


class SetupError(Exception):
    """One message for the user: what is wrong, then the remedy."""


NO_NETWORK = (
    "Temporary failure in name resolution",
    "Name or service not known",
    "NameResolutionError",
    "Network is unreachable",
    "NewConnectionError",
    "Failed to establish a new connection",
    "ConnectTimeout",
    "ProxyError",
    "Could not resolve",
)
DIAGNOSES = (
    (r"No space left on device|Errno 28", "the disk is full; free some space and run the same command again"),
    (
        "|".join(NO_NETWORK),
        "no package index can be reached; check the network, or name a mirror or proxy (PIP_INDEX_URL, HTTPS_PROXY)",
    ),
    (r"CERTIFICATE_VERIFY_FAILED", "the package index's certificate is not trusted here; name yours in PIP_CERT"),
    (
        r"No matching distribution found for ([^\s(]+)",
        r"the package index offers no \1 for this Python; use another (make setup PYTHON=python3.11) or another index",
    ),
    (
        r"(?:command|error): .*(?:g\+\+|gcc|c\+\+).* failed|fatal error: (\S+): No such file",
        "the C++ compiler failed; its message stands in the log",
    ),
    (r"Could not get lock|Unable to acquire the dpkg", "another package manager is at work; wait for it and try again"),
    (r"Unable to locate package (\S+)", r"the system's package lists know no \1; refresh them (apt-get update)"),
)


def diagnose(output: str) -> str:
    """The likely cause in a failed command's output, with its remedy; its last lines when none is recognised."""
    for pattern, remedy in DIAGNOSES:
        if found := re.search(pattern, output):
            return found.expand(remedy)
    return "its last lines:\n" + "\n".join("    " + line for line in output.strip().splitlines()[-12:])


@contextmanager
def step(title: str) -> Iterator[None]:
    """Print the title, and how long the body took once it is through."""
    started = time.monotonic()
    print(f"  {title} ...", flush=True)
    yield
    print(f"  {title}: done ({time.monotonic() - started:.0f} s)", flush=True)


def run(argv: Sequence[str], log: Path, env: Mapping[str, str] | None = None) -> None:
    """Run a command with its output in `log` (appended), a sign of life every 15 s; raises SetupError when it fails."""
    with log.open("ab") as sink:
        sink.write(f"\n$ {' '.join(argv)}\n".encode())
        sink.flush()
        start = sink.tell()
        try:
            process = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=sink, stderr=subprocess.STDOUT, env=env)
        except OSError as error:
            raise SetupError(f"cannot run {argv[0]}: {error}") from error
    try:
        _wait(process, log)
    except BaseException:
        process.terminate()
        process.wait()
        raise
    if process.returncode:
        with log.open("rb") as source:
            source.seek(start)
            output = source.read().decode(errors="replace")
        raise SetupError(f"`{' '.join(argv)}` failed: {diagnose(output)}\n  log: {log}")


def _wait(process: subprocess.Popen[bytes], log: Path) -> None:
    started = time.monotonic()
    while True:
        try:
            process.wait(timeout=HEARTBEAT_S)
            return
        except subprocess.TimeoutExpired:
            with log.open("rb") as source:
                source.seek(max(0, log.stat().st_size - 4096))
                lines = source.read().decode(errors="replace").strip().splitlines()
            print(f"    {time.monotonic() - started:.0f} s  {lines[-1].strip()[:100] if lines else ''}", flush=True)


def fail(command: str, error: SetupError) -> int:
    """Print the error as the command's last word; the exit status of a set-up that did not end."""
    print(f"{command}: {error}", file=sys.stderr)
    return 2
