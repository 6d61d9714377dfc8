"""`python -m harness ui` and `python -m harness sync`: look at a store, fill a store from run directories."""

import socket
import sys
from pathlib import Path
from typing import Annotated

import typer

from harness.errors import UserError
from harness.settings import DEFAULT_RUNS_DIR
from harness.tracking.serving import serve


def ui(
    runs: Annotated[Path, typer.Argument(help="Folder of runs with its store (mlflow.db).")] = Path(DEFAULT_RUNS_DIR),
    port: Annotated[int, typer.Option(help="Port on the loopback interface (default: a free one).")] = 0,
) -> None:
    """Open the store of a runs folder in the MLflow UI, on the loopback interface only; Ctrl-C ends it."""
    database = runs.resolve() / "mlflow.db"
    if not database.is_file():
        raise UserError(f"no MLflow store in {runs}: {database} does not exist. Run a sweep, or `harness sync {runs}`.")
    port = port or free_port()
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    command += [
        "--backend-store-uri",
        f"sqlite:///{database}",
        "--artifacts-destination",
        str(runs.resolve() / "mlartifacts"),
    ]
    print(f"MLflow UI: http://127.0.0.1:{port} (ready in some seconds; Ctrl-C ends it)", flush=True)
    status = serve(command)
    if status is not None:
        raise UserError(f"the MLflow server ended with status {status}; try another --port")


def sync(
    folders: Annotated[
        list[Path], typer.Argument(help="Trial directories, sweeps' folders, or a folder of both, such as runs.")
    ],
    store: Annotated[
        str | None, typer.Option(help="Store to fill (default: MLFLOW_TRACKING_URI, or mlflow.db beside the sweeps).")
    ] = None,
) -> None:
    """Fill a tracking store from run directories, after an outage or a loss; doing it twice gives the same store."""
    from harness.tracking.copying import sync_sweep
    from harness.tracking.store import Store, StoreError, default_uri

    for folder in folders:
        sweeps = sweep_folders(folder)
        for path in sweeps:
            runs_dir = runs_dir_of(path)
            target = Store(store or default_uri(runs_dir), runs_dir / "mlartifacts", timeout_s=30.0)
            try:
                count = sync_sweep(target, path)
            except StoreError as error:
                raise UserError(f"the store failed: {error}. Run the same command again when it works") from None
            print(f"{path}: {count} {'trial is' if count == 1 else 'trials are'} in {target.uri}", flush=True)


def sweep_folders(folder: Path) -> list[Path]:
    """The folder itself if it is a sweep or a trial, else the sweeps and lone trials in it; `UserError` for none."""
    folder = folder.resolve()
    if (folder / "config.json").is_file() or (folder / "trials").is_dir():
        return [folder]
    found = sorted({path.parent for pattern in ("*/trials", "*/config.json") for path in folder.glob(pattern)})
    if not found:
        raise UserError(f"{folder} holds no trials: give a trial's directory, a sweep's folder, or a folder of both")
    return found


def runs_dir_of(path: Path) -> Path:
    """The folder of all runs that a sweep's folder, a trial of one, or a single run lies in: there is the store."""
    return path.parent.parent.parent if path.parent.name == "trials" else path.parent


def free_port() -> int:
    """A port of the loopback interface that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
