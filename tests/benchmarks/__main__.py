"""`python -m tests.benchmarks [NAME ...]`: a line per figure; ends with 1 when one misses its limit or breaks."""

import importlib
import os
import sys
import time
import traceback
from collections.abc import Iterable
from pathlib import Path

from tests.benchmarks.measure import Estimate, NotHereError, Row

HERE = Path(__file__).resolve().parent
LINE = "{:<58} {:>26} {:>12}  {}"


def names() -> list[str]:
    """All benchmarks: the files bench_NAME.py of this folder."""
    return sorted(path.stem.removeprefix("bench_") for path in HERE.glob("bench_*.py"))


def figure_text(row: Row) -> str:
    """The figure with its interval, e.g. `1.21 x (1.18-1.25, n=7)`."""
    text = f"{_short(row.value)} {row.unit}".strip()
    if isinstance(row.figure, Estimate):
        text += f" ({_short(row.figure.low)}-{_short(row.figure.high)}, n={row.figure.repeats})"
    return text


def _short(value: float) -> str:
    """Three digits, or all of those before the point."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def limit_text(row: Row) -> str:
    """The limit, e.g. `<= 1.25`; nothing where there is none."""
    return "" if row.must is None else f"{'>=' if row.at_least else '<='} {row.must:g}"


def verdict_text(row: Row) -> str:
    """MET or MISS, then whether what is wanted was reached."""
    said: list[str] = [row.verdict] if row.verdict else []
    if row.wanted is not None:
        reached = row.value >= row.wanted if row.at_least else row.value <= row.wanted
        said.append(f"wanted {'>=' if row.at_least else '<='} {row.wanted:g}: {'reached' if reached else 'not yet'}")
    return ", ".join(said)


def line(row: Row) -> str:
    """The row as it is printed."""
    return LINE.format(row.name, figure_text(row), limit_text(row), verdict_text(row)).rstrip()


def measure(name: str) -> tuple[int, int]:
    """Run one benchmark, printing rows as they come; (rows met, rows missed), a crash being a miss."""
    met = missed = 0
    try:
        rows: Iterable[Row] = importlib.import_module(f"tests.benchmarks.bench_{name}").rows()
        for row in rows:
            print(line(row), flush=True)
            met += row.verdict == "MET"
            missed += row.verdict == "MISS"
    except NotHereError as reason:
        print(f"{name}: not on this machine: {reason}", flush=True)
    except Exception:  # noqa: BLE001 - the other benchmarks are to be seen all the same
        traceback.print_exc()
        missed += 1
    return met, missed


def main(chosen: list[str]) -> int:
    """Exit status: 0 when every figure is met, 1 on a miss, 2 for an unknown name."""
    if unknown := set(chosen) - set(names()):
        print(f"no benchmark named {', '.join(sorted(unknown))}; there are: {', '.join(names())}", file=sys.stderr)
        return 2
    cores, load = os.cpu_count() or 1, os.getloadavg()[0]
    busy = " - BUSY: figures will suffer" if load > cores / 2 else ""
    print(f"{cores} cores, load {load:.1f}{busy}\n" + LINE.format("figure", "measured", "MUST", ""), flush=True)
    total_met = total_missed = 0
    for name in chosen or names():
        started = time.monotonic()
        met, missed = measure(name)
        print(f"-- {name}: {time.monotonic() - started:.0f} s", flush=True)
        total_met, total_missed = total_met + met, total_missed + missed
    print(f"{total_met} met, {total_missed} missed")
    return 1 if total_missed else 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
