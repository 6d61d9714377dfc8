"""`python -m harness doctor`: is this machine fit to train? A table of ok, warn and fail, each with its remedy."""

import json
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Annotated

import typer

from harness.doctor_checks import CHECKS, REMEDIES, SETUP_AGAIN, Finding, ProbeError

COLOURS = {"ok": "green", "warn": "yellow", "fail": "red"}


def examine(checks: Mapping[str, Callable[[], Finding]] = CHECKS) -> list[Finding]:
    """All findings, in the order of the checks, which run side by side (most of them wait for a child process)."""
    with ThreadPoolExecutor(max_workers=4) as pool:
        return list(pool.map(_examine_one, checks, checks.values()))


def _examine_one(name: str, check: Callable[[], Finding]) -> Finding:
    try:
        return check()
    except ProbeError as problem:
        return Finding(name, "fail", str(problem), REMEDIES.get(name, SETUP_AGAIN))


def worst(findings: Sequence[Finding]) -> str:
    """The gravest status among them."""
    return max((finding.status for finding in findings), key=list(COLOURS).index, default="ok")


def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object instead of the table.")] = False,
) -> None:
    """Check Python, torch, compiler, FFCV, Ray, the MLflow store, SLURM and disk space; ends with 1 if one fails."""
    findings = examine()
    if as_json:
        rows = [vars(finding) for finding in findings]
        typer.echo(json.dumps({"status": worst(findings), "checks": rows}, indent=2))
    else:
        _print_table(findings)
    if worst(findings) == "fail":
        raise typer.Exit(1)


def _print_table(findings: Sequence[Finding]) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=None, pad_edge=False, show_edge=False)
    for title in ("check", "", "found"):
        table.add_column(title, overflow="fold")
    for finding in findings:
        text = escape(finding.detail) + (f"\n[bold]->[/bold] {escape(finding.remedy)}" if finding.remedy else "")
        table.add_row(finding.name, f"[{COLOURS[finding.status]}]{finding.status}[/]", text)
    Console(highlight=False).print(table)
