"""What a sweep shows and leaves: rows from folders or from a store, the files, the parent run, the summary."""

import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from harness.config import Recipe
from harness.errors import UserError, nearest
from harness.run_dir import RunDir, read_json, write_json, write_text
from harness.tracking import picture, record
from harness.tracking.copying import place_of
from harness.tracking.mirror import Leftover
from harness.tracking.store import Status, Store
from sweeps import plot, report
from sweeps.folder import lasting
from sweeps.frontier import Frontier, Row, build, hypervolume
from sweeps.space import Space
from sweeps.tuner import Ending

TEXTS: dict[str, Callable[[Frontier], str]] = {
    "pareto.md": report.as_markdown,
    "pareto.csv": report.as_csv,
    "pareto.json": report.as_json,
    "pareto.tex": report.as_latex,
    "pareto.html": report.as_html,
}
WORDS = {"model", "method", "trial", "frontier"}
"""Columns of text; the others hold numbers and stand to the right."""
TERMINAL_ROWS = 200
"""A longer table shows its frontier alone: the files hold every row."""


def from_folders(folders: Sequence[Path]) -> Frontier:
    """Rows of all finished trials in sweeps' folders. Raises `UserError` if a folder holds none of a sweep."""
    rows, names = [], []
    for path in folders:
        if not (path / "sweep.json").is_file() and not (path / "trials").is_dir():
            raise UserError(f"{path} is not a sweep's folder: it has neither sweep.json nor trials/")
        name = place_of(path).experiment if (path / "tracking.json").is_file() else path.name
        names.append(name)
        found = [record.summary(run) for run in record.trial_dirs(path)]
        rows += [Row.of(name, summary) for summary in found if summary is not None]
    return build(names, rows)


def from_store(store: Store, experiments: Sequence[str]) -> Frontier:
    """Rows of all finished trials of these experiments in a store. Raises `UserError` for an unknown name."""
    if store.is_absent():
        raise UserError(
            f"there is no MLflow store at {store.uri}. Run a sweep first, name the runs folder (--runs), set "
            "MLFLOW_TRACKING_URI, or take the rows from a sweep's folder (--folder)."
        )
    rows = []
    for name in experiments:
        found = store.summaries(name)
        if found is None:
            raise UserError(f"no experiment {name!r} in {store.uri}: {nearest(name, store.experiments())}")
        rows += [Row.of(name, summary) for summary in found]
    return build(experiments, rows)


def write(frontier: Frontier, folder: Path) -> list[str]:
    """Write the table in every format, and the plots; the names of the files."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in TEXTS.items():
        write_text(folder / name, text(frontier))
    plot.write(frontier, folder / "pareto.png", "png")
    plot.write(frontier, folder / "pareto.svg", "svg")
    return [*TEXTS, "pareto.png", "pareto.svg"]


@dataclass(frozen=True)
class Parent:
    """The parent run as a file (tracking.json), from which the mirror fills the store."""

    folder: Path
    space: Space
    base: Recipe
    start_ms: int

    def exists(self) -> bool:
        """Whether the sweep has told about itself before."""
        return (self.folder / "tracking.json").is_file()

    def write(self, status: Status, frontier: Frontier | None, artifacts: Sequence[str] | None) -> None:
        """Say where the sweep stands; with a frontier, also its figures and files, as of now."""
        before = read_json(self.folder / "tracking.json") or {}
        document: dict[str, Any] = {
            "experiment": self.space.name,
            "sweep": self.space.name,
            "status": status,
            "start_ms": before.get("start_ms", self.start_ms),
            "params": {key: str(value) for key, value in lasting(self.base, self.space.axes).items()},
            "tags": {"harness.methods": ", ".join(self.space.methods), "harness.axes": ", ".join(self.space.axes)},
            "artifacts": ["sweep.json", *(artifacts or [])],
        }
        if frontier is not None:
            document["metrics"] = {"trials": float(len(frontier.rows)), "frontier_size": float(len(frontier.best))}
            for family in frontier.families():
                document["metrics"][f"hypervolume/{family[0]}"] = hypervolume(frontier.of_family(family))
            runs = [RunDir(path) for path in sorted((self.folder / "trials").glob("*"))]
            ends = [span[1] for run in runs if (span := record.span_ms(run.metrics())) is not None]
            document["end_ms"] = max(ends, default=self.start_ms)
        write_json(self.folder / "tracking.json", document)


@dataclass(frozen=True)
class Summary:
    """What the last lines of a sweep tell."""

    folder: Path
    store: Store
    endings: Sequence[Ending]
    seconds: Mapping[str, float]
    leftover: Leftover | None


def words(ending: Ending) -> str:
    """An ending in a phrase."""
    result = RunDir(ending.spec.run_dir).result()
    if ending.ended != "finished" or result is None:
        return f"{ending.ended}{': ' + ending.message if ending.message else ''}"
    return (
        f"top-1 {result['top1']:.2f}%  {result['gbops']:.4g} GBOPs  {result['bop_reduction']:.1f}x fewer"
        f"  ({ending.wall_s:.0f} s)"
    )


def show_table(frontier: Frontier) -> None:
    """The table on the terminal; the Pareto set is marked and bold, and all that is shown of a very long table."""
    table = Table(box=box.SIMPLE_HEAD, title=f"{', '.join(frontier.experiments)}", title_justify="left")
    for header in report.headers(frontier):
        table.add_column(header, justify="left" if header in WORDS else "right", no_wrap=True)
    is_long = len(frontier.rows) > TERMINAL_ROWS
    shown = [row for row in frontier.rows if frontier.is_best(row)] if is_long else frontier.rows
    for row in shown:
        table.add_row(*report.cells(frontier, row), style="bold" if frontier.is_best(row) else None)
    console = _console(wide=True)
    console.print(table)
    if is_long:
        console.print(f"{len(frontier.rows) - len(shown):,} rows beside the frontier stand in the files alone.")
    elif groups := report.seed_groups(frontier):
        spread = Table(box=box.SIMPLE_HEAD, title="mean and spread over seeds", title_justify="left")
        for header in report.headers(frontier, report.SEED_HEADERS):
            spread.add_column(header, justify="left" if header in WORDS else "right", no_wrap=True)
        for group in groups:
            spread.add_row(*report.seed_cells(group))
        console.print(spread)
    for line in report.notes(frontier):
        console.print(line, highlight=False)


def show_summary(summary: Summary) -> None:
    """What ran on what, where the time went, where the files are, how to open the UI."""
    console = _console(wide=False)
    results = [result for run in record.trial_dirs(summary.folder) if (result := run.result()) is not None]
    for ending in summary.endings:
        if ending.ended == "failed":
            console.print(f"failed: {ending.spec.label}: {ending.message}", markup=False, soft_wrap=True)
    lines = [*_stack_lines(results, summary.store), *_time_lines(summary)]
    lines.append(f"files: {summary.folder} (pareto.md .csv .json .tex .html .png .svg, trials/)")
    if summary.leftover is not None:
        lines.append(
            f"MLflow: {summary.leftover.trials} trials not sent yet ({summary.leftover.reason}); "
            f"to send what is missing: {_python()} -m harness sync {summary.folder}"
        )
    lines.append(f"MLflow UI: {ui_command(summary.store, summary.folder.parent)}")
    console.print("\n".join(lines), highlight=False, markup=False, soft_wrap=True)


def ui_command(store: Store, runs_dir: Path) -> str:
    """The one command (or address) that opens the MLflow UI on the results."""
    return store.uri if store.uri.startswith("http") else f"{_python()} -m harness ui {_short(runs_dir)}"


def draw_layers(folder: Path) -> None:
    """The per-layer picture of every finished trial that has none yet."""
    for run in record.trial_dirs(folder):
        picture.ensure(run)


def _stack_lines(results: Sequence[Mapping[str, Any]], store: Store) -> list[str]:
    stacks = [result.get("stack", {}) for result in results]
    kind = store.uri.partition(":")[0]
    return [
        f"loader: {_each(stacks, 'loader')}",
        f"trainer: {_each(stacks, 'launcher')}, {_each(stacks, 'world_size')} workers, {_each(stacks, 'backend')}",
        f"store: mlflow {metadata.version('mlflow')} ({kind})",
    ]


def _each(stacks: Sequence[Mapping[str, Any]], key: str) -> str:
    """All values of `key`, the most frequent first, with counts if there are several."""
    counts = Counter(str(stack.get(key, "unknown")) for stack in stacks).most_common()
    return counts[0][0] if len(counts) == 1 else ", ".join(f"{value} ({count} trials)" for value, count in counts)


def _time_lines(summary: Summary) -> list[str]:
    """Seconds per stage over the trials of this run, the rest of their time, and the driver's own phases."""
    stages: dict[str, float] = defaultdict(float)
    for ending in summary.endings:
        result = RunDir(ending.spec.run_dir).result()
        if result is not None and ending.ended == "finished":
            timings = {stage: float(value) for stage, value in result.get("timings_s", {}).items()}
            for stage, value in timings.items():
                stages[stage] += value
            stages["start and stop of workers"] += max(ending.wall_s - sum(timings.values()), 0.0)
    lines = []
    if stages:
        lines.append("time in trials: " + ", ".join(f"{name} {value:.1f} s" for name, value in stages.items()))
    lines.append("time of the driver: " + ", ".join(f"{name} {value:.1f} s" for name, value in summary.seconds.items()))
    return lines


def _console(*, wide: bool) -> Console:
    console = Console(highlight=False)
    if wide and not console.is_terminal:
        console.width = 200  # a log has no width: the table must not fold
    return console


def _python() -> str:
    """The interpreter as one would type it from here."""
    return _short(Path(sys.executable))


def _short(path: Path) -> str:
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)
