"""`python -m sweeps`: run a space of trials into an accuracy-BOP frontier, and draw frontiers from what was run."""

from pathlib import Path
from typing import Annotated

import typer

from harness.errors import UserError, run_cli
from harness.settings import DEFAULT_RUNS_DIR

app = typer.Typer(
    name="python -m sweeps",
    help=__doc__,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)

OutOption = Annotated[Path, typer.Option("--out", help="Folder of all runs; the store lies in it too.")]


@app.command()
def run(
    space: Annotated[str, typer.Argument(help="A named space, or the path of a TOML file.")],
    out: OutOption = Path(DEFAULT_RUNS_DIR),
    overrides: Annotated[
        list[str], typer.Option("--set", help="Override of the base recipe, e.g. --set search.epochs=2; repeatable.")
    ] = [],  # noqa: B006 - typer copies it
    name: Annotated[str | None, typer.Option(help="Another name for the sweep (folder and experiment).")] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the trials and what they need, run nothing.")
    ] = False,
) -> None:
    """Run every trial of a space that has not finished, then print the frontier. Run again, it goes on.

    Status 0: all trials finished. 1: some failed. 2: a mistake that the message names. 85: left as asked (SIGTERM,
    SIGUSR2) with checkpoints; the same command goes on. 130: Ctrl-C, likewise.
    """
    from sweeps import driver
    from sweeps.space import base_recipe, load_space

    loaded = load_space(space, name=name)
    base = base_recipe(loaded, overrides)
    if dry_run:
        from sweeps.dry import outlook, show

        show(loaded, outlook(loaded, base, out))
        return
    status = driver.run(loaded, base, out, lambda line: print(line, flush=True))
    if status:
        raise typer.Exit(status)


@app.command()
def pareto(
    out: Annotated[Path, typer.Option("--out", help="Where the table and the plots go.")],
    experiments: Annotated[
        list[str], typer.Option("--experiment", help="Name in the MLflow store; repeatable: one table, one plot.")
    ] = [],  # noqa: B006
    folders: Annotated[
        list[Path], typer.Option("--folder", help="A sweep's folder instead of a store; repeatable.")
    ] = [],  # noqa: B006
    runs: Annotated[Path, typer.Option(help="Where the store lies, unless MLFLOW_TRACKING_URI names one.")] = Path(
        DEFAULT_RUNS_DIR
    ),
) -> None:
    """Write pareto.md, .csv, .json, .tex, .html, .png, .svg from the MLflow store alone, or from folders alone."""
    from sweeps import driver, outcome

    if bool(experiments) == bool(folders):
        either = "give --experiment NAME (from the MLflow store) or --folder DIR (from a sweep's folder)"
        raise UserError(f"{either}, not both" if folders else either)
    store = driver.store_of(runs)
    frontier = outcome.from_folders(folders) if folders else outcome.from_store(store, experiments)
    outcome.write(frontier, out)
    outcome.show_table(frontier)


@app.command()
def compare(
    first: Annotated[str, typer.Argument(help="A trial: its directory, or its identity or label under --runs.")],
    second: Annotated[str, typer.Argument(help="Another one.")],
    runs: Annotated[Path, typer.Option(help="Folder of all runs.")] = Path(DEFAULT_RUNS_DIR),
) -> None:
    """Show two trials layer by layer: bits, kept channels, BOPs."""
    from sweeps.compare import find, show

    show(find(first, runs).result() or {}, find(second, runs).result() or {})


def main() -> None:
    """Entry point: user errors become one message and status 2."""
    run_cli(lambda: app(standalone_mode=True))


if __name__ == "__main__":
    main()
