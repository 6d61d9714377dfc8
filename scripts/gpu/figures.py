"""Figures of parts: a JSON line for each as it comes, so that a part cut short keeps what it had; then one table."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tests.benchmarks.__main__ import figure_text, limit_text, verdict_text
from tests.benchmarks.measure import Estimate, Row

if TYPE_CHECKING:
    from scripts.gpu.plan import Outcome


def append(path: Path, row: Row) -> None:
    """Add a figure to a part's file."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(asdict(row)) + "\n")


def read(path: Path) -> tuple[Row, ...]:
    """The figures of a part's file; none if there is no file, and no half-written one."""
    if not path.is_file():
        return ()
    lines = path.read_text(encoding="utf-8").split("\n")[:-1]
    return tuple(_row(json.loads(line)) for line in lines)


def _row(tree: dict[str, Any]) -> Row:
    figure = tree["figure"]
    return Row(**tree | {"figure": Estimate(**figure) if isinstance(figure, dict) else figure})


def as_json(outcomes: "Sequence[Outcome]", machine: Mapping[str, Any]) -> str:
    """Everything but the output of the parts; each figure with its verdict."""
    parts = []
    for outcome in outcomes:
        tree = asdict(outcome)
        del tree["output"]
        tree["rows"] = [asdict(row) | {"value": row.value, "verdict": row.verdict} for row in outcome.rows]
        parts.append(tree)
    return json.dumps({"machine": dict(machine), "parts": parts}, indent=1) + "\n"


def as_markdown(outcomes: "Sequence[Outcome]", machine: Mapping[str, Any]) -> str:
    """How each part ended, then all figures with their limits."""
    lines = [", ".join(f"{name} {value}" for name, value in machine.items()), ""]
    lines += ["| part | status | seconds | limit | |", "|---|---|---|---|---|"]
    for o in outcomes:
        reason = o.reason.replace("|", "\\|")
        lines.append(f"| {o.part} | {o.status} | {o.seconds:.0f} | {o.limit_s:.0f} | {reason} |")
    lines += ["", "| figure | measured | must | |", "|---|---|---|---|"]
    for row in (row for outcome in outcomes for row in outcome.rows):
        name = row.name.replace("|", "\\|")
        lines.append(f"| {name} | {figure_text(row)} | {limit_text(row)} | {verdict_text(row)} |")
    return "\n".join(lines) + "\n"
