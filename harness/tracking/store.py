"""The one file that imports mlflow: a small client that finds before it creates, and fails quickly.

Its errors are `StoreError`, whatever lies beneath (HTTP, SQL, files), so that callers can wait and try again.
"""

import gc
import json
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, Concatenate, Literal, ParamSpec, TypeVar, cast

from harness.tracking.record import (
    CONVENTION_TAG,
    FINAL_METRICS,
    KEY_TAG,
    POINT_TAG,
    ROLE_TAG,
    Sample,
    target,
)

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from numpy.typing import NDArray
    from torch import nn

Status = Literal["RUNNING", "FINISHED", "FAILED", "KILLED"]
BATCH = {"metrics": 1000, "params": 100, "tags": 100}
"""How many of each a single request may carry (MLflow's own limits)."""

_P = ParamSpec("_P")
_T = TypeVar("_T")


class StoreError(Exception):
    """The tracking store did not do what it was asked: not reachable, too slow, full, or refused."""


def default_uri(runs_dir: Path) -> str:
    """The store to use: `MLFLOW_TRACKING_URI`, else an sqlite file in the runs folder."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{runs_dir.resolve() / 'mlflow.db'}"


def _translated(method: "Callable[Concatenate[Store, _P], _T]") -> "Callable[Concatenate[Store, _P], _T]":
    """Turn everything that a store can raise into `StoreError`."""

    @wraps(method)
    def call(self: "Store", *args: _P.args, **kwargs: _P.kwargs) -> _T:
        import requests
        import sqlalchemy.exc
        from mlflow.exceptions import MlflowException

        try:
            return method(self, *args, **kwargs)
        except (MlflowException, requests.RequestException, sqlalchemy.exc.SQLAlchemyError, OSError) as error:
            first_line = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise StoreError(f"{self.uri}: {first_line[:300]}") from error

    return cast("Callable[Concatenate[Store, _P], _T]", call)


class Store:
    """A tracking store. `artifact_root` is where an embedded (sqlite) store keeps files; servers decide themselves."""

    def __init__(self, uri: str, artifact_root: Path | None = None, *, timeout_s: float = 10.0) -> None:
        self.uri = uri
        self.artifact_root = artifact_root
        self._timeout_s = timeout_s
        self._client: MlflowClient | None = None

    def is_absent(self) -> bool:
        """Whether this is an sqlite file that does not exist: looking into it would create it."""
        return self.uri.startswith("sqlite:///") and not Path(self.uri.removeprefix("sqlite:///")).is_file()

    @property
    def client(self) -> "MlflowClient":
        """The MLflow client, made on first use: importing mlflow takes a second, a new sqlite file two."""
        if self._client is None:
            # A dead server must cost seconds, not the four minutes of the defaults.
            os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
            os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", f"{self._timeout_s:g}")
            os.environ.setdefault("GIT_PYTHON_REFRESH", "quiet")
            from mlflow import MlflowClient

            for name in ("mlflow", "alembic"):
                logging.getLogger(name).setLevel(logging.WARNING)
            if self.uri.startswith("sqlite:///"):
                Path(self.uri.removeprefix("sqlite:///")).parent.mkdir(parents=True, exist_ok=True)
            self._client = MlflowClient(tracking_uri=self.uri)
        return self._client

    @_translated
    def experiment(self, name: str, *, create: bool = True) -> str | None:
        """Id of the experiment, made if absent and `create`; None if absent and not."""
        found = self.client.get_experiment_by_name(name)
        if found is not None:
            if found.lifecycle_stage == "deleted" and create:
                self.client.restore_experiment(found.experiment_id)
            return str(found.experiment_id)
        if not create:
            return None
        folder = self.artifact_root
        location = (folder.resolve() / name).as_uri() if folder and self.uri.startswith("sqlite:") else None
        kind = {"mlflow.experimentKind": "custom_model_development"}  # the UI then opens on training, not on agents
        return str(self.client.create_experiment(name, artifact_location=location, tags=kind))

    @_translated
    def experiments(self) -> list[str]:
        """Names of all experiments."""
        return sorted(found.name for found in self.client.search_experiments())

    @_translated
    def find_run(self, experiment: str, identity: Mapping[str, str]) -> str | None:
        """Id of the run that carries all tags of `identity`, the oldest if there are several; None if there is none."""
        condition = " and ".join(f"tags.`{key}` = '{value}'" for key, value in identity.items())
        found = self.client.search_runs([experiment], condition, max_results=1, order_by=["attributes.start_time ASC"])
        return str(found[0].info.run_id) if found else None

    @_translated
    def run(
        self, experiment: str, identity: Mapping[str, str], name: str, start_ms: int | None, parent: str | None
    ) -> str:
        """`find_run`, made if there is none."""
        found = self.find_run(experiment, identity)
        if found is not None:
            return found
        tags = {**identity, "mlflow.runName": name, "mlflow.source.name": "sbs-harness"}
        if parent is not None:
            tags["mlflow.parentRunId"] = parent
        return str(self.client.create_run(experiment, start_time=start_ms, tags=tags, run_name=name).info.run_id)

    @_translated
    def log(
        self,
        run: str,
        samples: Iterable[Sample] = (),
        params: Mapping[str, str] | None = None,
        tags: Mapping[str, str] | None = None,
    ) -> None:
        """Send values in batches. Equal values sent twice are stored once."""
        from mlflow.entities import Metric, Param, RunTag

        values: list[tuple[str, Any]] = [
            *(("metrics", Metric(s.key, s.value, s.time_ms, s.step)) for s in samples),
            *(("params", Param(key, value)) for key, value in (params or {}).items()),
            *(("tags", RunTag(key, value)) for key, value in (tags or {}).items()),
        ]
        for kind, size in BATCH.items():
            group = [value for its_kind, value in values if its_kind == kind]
            for start in range(0, len(group), size):
                self.client.log_batch(run, **{kind: group[start : start + size]})

    @_translated
    def log_new_params(self, run: str, params: Mapping[str, str]) -> None:
        """Send the parameters that the run does not have; a store refuses to change one."""
        known = self.client.get_run(run).data.params
        self.log(run, params={key: value for key, value in params.items() if key not in known})

    @_translated
    def log_texts(self, run: str, texts: Mapping[str, str]) -> None:
        """Write small text artifacts, replacing what was there."""
        for name, text in texts.items():
            self.client.log_text(run, text, name)

    @_translated
    def log_table(self, run: str, name: str, table: Mapping[str, Any]) -> None:
        """Write a table artifact that the MLflow UI shows as a table; `name` ends in .json."""
        self.client.log_dict(run, dict(table), name)
        self.client.set_tag(run, "mlflow.loggedArtifacts", json.dumps([{"path": name, "type": "table"}]))

    @_translated
    def log_files(self, run: str, files: Sequence[Path], folder: str | None = None) -> None:
        """Upload files as they are."""
        for path in files:
            self.client.log_artifact(run, str(path), folder)

    @_translated
    def log_folder(self, run: str, folder: Path, name: str) -> None:
        """Upload a folder with all that is in it as the artifact folder `name`, replacing what was there."""
        self.client.log_artifacts(run, str(folder), name)

    @_translated
    def set_status(self, run: str, status: Status, end_ms: int | None = None) -> None:
        """Final status with its time, or back to RUNNING for a run that goes on."""
        if status == "RUNNING":
            self.client.update_run(run, status=status)
        else:
            self.client.set_terminated(run, status=status, end_time=end_ms)

    @_translated
    def summaries(self, experiment: str) -> list[dict[str, Any]] | None:
        """`record.SUMMARY_KEYS` of every finished trial of the experiment; None if there is no such experiment."""
        found = self.client.get_experiment_by_name(experiment)
        if found is None:
            return None
        rows = []
        token: str | None = None
        condition = f"tags.`{ROLE_TAG}` = 'trial' and attributes.status = 'FINISHED'"
        with _garbage_left():
            while True:
                page = self.client.search_runs([found.experiment_id], condition, max_results=500, page_token=token)
                rows += [_summary(run) for run in page if "final/top1" in run.data.metrics]
                token = page.token
                if not token:
                    return rows


def save_model(net: "nn.Module", example: "NDArray[Any]", folder: Path) -> None:
    """Write `net` as an MLflow model with a signature, its graph in torch.export's format: no class is pickled.

    `example`: (N, C, H, W) float32, N at least 2; the model takes any number of images of that size. It loads with
    `mlflow.pytorch.load_model` and `mlflow.pyfunc.load_model`, without this project.
    """
    import mlflow.pytorch
    import numpy as np
    import torch
    from mlflow.models import ModelSignature
    from mlflow.types import Schema, TensorSpec

    with torch.no_grad():
        classes = net(torch.from_numpy(example)).shape[1]
    inputs = TensorSpec(np.dtype(np.float32), (-1, *example.shape[1:]))  # with a name it would ask for a dictionary
    outputs = TensorSpec(np.dtype(np.float32), (-1, classes))
    mlflow.pytorch.save_model(
        net,
        str(folder),
        input_example=example,
        signature=ModelSignature(Schema([inputs]), Schema([outputs])),
        serialization_format="pt2",
        pip_requirements=[f"torch=={torch.__version__.partition('+')[0]}"],  # given, or MLflow loads it to find out
    )


@contextmanager
def _garbage_left() -> Iterator[None]:
    """No garbage collection inside: it would look at the hundred objects of every run over and over."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _summary(run: Any) -> dict[str, Any]:
    params, tags, metrics = run.data.params, run.data.tags, run.data.metrics
    row: dict[str, Any] = {
        "key": tags[KEY_TAG],
        "label": run.info.run_name,
        "model": params["model"],
        "data": params["data.source"],
        "seed": int(params["seed"]),
        "method": params["method"],
        "lambda": float(params["lambda"]) if "lambda" in params else None,
        "target": target(params["method"], _search_section(params)),
        "point": tags[POINT_TAG],
        "convention": tags[CONVENTION_TAG],
    }
    return row | {name: metrics.get(f"final/{name}") for name in FINAL_METRICS}


def _search_section(params: Mapping[str, str]) -> dict[str, Any]:
    """What drives a search, or the policy that was given, back from its parameters as text."""
    text = {key: params.get(f"search.{key}") for key in ("budget", "gbops", "snapshots")} | {
        "lambda": params.get("lambda")
    }
    found = {key: json.loads(value) for key, value in text.items() if value is not None}
    return found | {"policy": params.get("search.policy")}
