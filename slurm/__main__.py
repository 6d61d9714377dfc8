"""Command line: `python -m slurm submit | status | logs | cancel`."""

import json
import sys
import time
from pathlib import Path
from typing import Annotated

import typer

from harness.errors import UserError, run_cli
from harness.settings import DEFAULT_RUNS_DIR

app = typer.Typer(
    add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, help="Run commands on a SLURM cluster."
)
DEFAULT_RUNS = f"{DEFAULT_RUNS_DIR}/slurm"
RunsOption = Annotated[Path, typer.Option("--runs", help="Folder with the records of submissions.")]
Which = Annotated[str, typer.Argument(help="Name or job id.", metavar="NAME_OR_ID")]


@app.command()
def submit(
    command: Annotated[list[str], typer.Argument(help="After `--`: what to run.", metavar="COMMAND...")],
    *,
    profile: Annotated[str | None, typer.Option(help="TOML file, or the name of a shipped profile.")] = None,
    name: Annotated[str | None, typer.Option(help="Name of the job; default: from the command.")] = None,
    nodes: Annotated[int | None, typer.Option(help="Nodes (job.nodes).")] = None,
    gpus_per_node: Annotated[int | None, typer.Option(help="GPUs of each node (node.gpus).")] = None,
    time_limit: Annotated[str | None, typer.Option("--time", help="Time limit (job.time), e.g. 04:00:00.")] = None,
    partition: Annotated[str | None, typer.Option(help="Partition (job.partition).")] = None,
    settings: Annotated[list[str] | None, typer.Option("--set", help="Any other key: section.key=value.")] = None,
    runs: Annotated[str | None, typer.Option(help="Folder for the records (storage.runs).")] = None,
    snapshot: Annotated[
        bool | None, typer.Option("--snapshot/--no-snapshot", help="Run a copy of the code (storage.snapshot).")
    ] = None,
    array: Annotated[
        str | None, typer.Option(help="N or N%P: run COMMAND N times without Ray, P at a time; {index} counts.")
    ] = None,
    local: Annotated[bool, typer.Option("--local", help="Run on this machine, without SLURM.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the batch script and submit nothing.")] = False,
    wait: Annotated[bool, typer.Option("--wait", help="Show the output and leave with the command's status.")] = False,
) -> None:
    """Submit COMMAND: once, on the head of a Ray cluster over all nodes of the job, or as a job array."""
    from slurm import submit as steps
    from slurm.profile import load_profile

    flags = {
        "job.nodes": nodes,
        "node.gpus": gpus_per_node,
        "job.time": None if time_limit is None else json.dumps(time_limit),
        "job.partition": None if partition is None else json.dumps(partition),
        "storage.runs": None if runs is None else json.dumps(runs),
        "storage.snapshot": None if snapshot is None else json.dumps(snapshot),
    }
    overrides = [*(settings or []), *(f"{key}={value}" for key, value in flags.items() if value is not None)]
    request = steps.Request(tuple(command), load_profile(profile, overrides), name, array, local)
    submission = steps.plan(request, Path.cwd(), now=time.time())
    if dry_run:
        from slurm.executors import batch_executor

        print(batch_executor(submission).text(len(submission.tasks)))
        return
    steps.check(submission)
    through = steps.submit(submission)
    where = "here, as process" if local else "as job"
    print(f"{through.name}: submitted {where} {through.job_id}; records in {through.folder}", flush=True)
    if wait:
        from slurm.wait import wait_for

        sys.exit(wait_for(through))


@app.command()
def status(
    which: Annotated[str | None, typer.Argument(help="Name or job id; default: all.", metavar="NAME_OR_ID")] = None,
    runs: RunsOption = Path(DEFAULT_RUNS),
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show what became of submissions."""
    from slurm import records
    from slurm.status import look

    chosen = list(records.submissions(runs)) if which is None else [records.find(runs, which)]
    tasks = look(chosen)
    if as_json:
        print(json.dumps([task.to_dict() for task in tasks], indent=1))
        return
    from slurm.table import table

    print(table(tasks) if tasks else f"no submission is recorded under {runs}")


@app.command()
def logs(
    which: Which,
    follow: Annotated[bool, typer.Option("-f", "--follow", help="Go on until the job is over.")] = False,
    rank: Annotated[int, typer.Option(min=0, help="Which node of the job.")] = 0,
    index: Annotated[int, typer.Option(min=0, help="Which task of an array.")] = 0,
    runs: RunsOption = Path(DEFAULT_RUNS),
) -> None:
    """Print a job's output."""
    from slurm import follow as reader
    from slurm import records

    submission = records.find(runs, which)
    if index not in submission.tasks:
        raise UserError(f"--index {index}: {submission.name} has tasks 0 to {submission.tasks[-1]}")
    if follow:
        reader.follow(submission, index, rank, sys.stdout.buffer)
        return
    path = submission.log_file(index, rank)
    if not path.exists():
        raise UserError(f"there is no output yet: {path}")
    reader.copy_from(path, 0, sys.stdout.buffer)


@app.command()
def cancel(which: Which, runs: RunsOption = Path(DEFAULT_RUNS)) -> None:
    """End a job, or take it from the queue; nothing of it goes on."""
    from slurm import records
    from slurm.cancel import cancel_submission

    print(cancel_submission(records.find(runs, which)))


if __name__ == "__main__":
    run_cli(app)
