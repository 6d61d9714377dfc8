"""What a run directory says, in the terms of a tracking store. Pure reading: nothing here knows MLflow.

Everything sent has a time stamp taken from the run directory, so that sending it twice, or rebuilding a lost store,
gives the same store.
"""

import csv
import io
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass, fields
from pathlib import Path
from typing import Any

from harness.config import searches
from harness.identity import digest
from harness.run_dir import RunDir, read_json

KEY_TAG = "harness.key"
SWEEP_TAG = "harness.sweep"
ROLE_TAG = "harness.role"
POINT_TAG = "harness.point"
CONVENTION_TAG = "harness.convention"

# The compare page of the MLflow UI opens on the first metric that the runs share and the first parameters in which they
# differ, capitals before small letters: what a frontier is drawn from has names that put it there.
TOP1_METRIC = "Top-1"
RESULT_PARAMS = {"GBOPs": "gbops", "Mean weight bits": "mean_weight_bits"}

FINAL_METRICS = (
    "top1", "top5", "loss", "gbops", "bop_reduction", "mean_weight_bits", "mean_activation_bits", "pruned_share",
    "params", "bytes",
)  # fmt: skip
LAYER_COLUMNS = (
    "name", "kind", "weight_bits", "activation_bits", "in_channels", "out_channels", "kept_in", "kept_out", "macs",
    "bops", "params", "bytes",
)  # fmt: skip
# What a row of a table needs; the same keys come from a store and from a run directory.
SUMMARY_KEYS = (
    "key", "label", "model", "data", "seed", "method", "lambda", "target", "point", "convention", *FINAL_METRICS,
)  # fmt: skip


@dataclass(frozen=True)
class Sample:
    """One value of one metric; `time_ms` since the epoch, `step` counted over all stages."""

    key: str
    value: float
    time_ms: int
    step: int


def settled(records: Sequence[Mapping[str, Any]], *, finished: bool) -> list[Mapping[str, Any]]:
    """The records that no resume will supersede: those a checkpoint covers, or all once the trial has a result."""
    if finished:
        return list(records)
    covered = max((record["covers"] for record in records if record["kind"] == "checkpoint"), default=0)
    return [record for record in records if record["seq"] <= covered]


def samples(records: Sequence[Mapping[str, Any]]) -> Iterator[Sample]:
    """Every number in the records, each record's top-1 first under a name of its own; text is passed over."""
    for record in records:
        metrics, time_ms, step = record.get("metrics", {}), _ms(record["time"]), int(record["step"])
        top1 = next((metrics[key] for key in ("final/top1", f"{record.get('stage')}/top1") if key in metrics), None)
        if top1 is not None:
            yield Sample(TOP1_METRIC, float(top1), time_ms, step)
        for key, value in metrics.items():
            if isinstance(value, (int, float)) and not isinstance(value, bool):
                yield Sample(key, float(value), time_ms, step)


def params(config: Mapping[str, Any]) -> dict[str, str]:
    """A recipe as flat text parameters, `section.key`; what tables and plots are made of has short names instead."""
    flat = dict(_flatten(config))
    short = {"model": "model.name", "method": "search.method", "lambda": "search.lambda", "seed": "run.seed"}
    flat |= {name: flat.pop(key) for name, key in short.items() if key in flat}
    if not method_uses_lambda(config):
        flat.pop("lambda", None)
    return flat


def result_params(result: Mapping[str, Any]) -> dict[str, str]:
    """Figures of a result as parameters, since the axes of the compare page begin with parameters."""
    return {name: f"{result[key]:.4g}" for name, key in RESULT_PARAMS.items() if key in result}


def tags(run: RunDir, config: Mapping[str, Any]) -> dict[str, str]:
    """Identity and provenance (of the last start, and how many there were) as tags."""
    found = {POINT_TAG: point(config), ROLE_TAG: "trial"}
    named = read_json(run.path / "trial.json") or {}
    if "data_checksum" in named:
        found["harness.data_checksum"] = str(named["data_checksum"])
    starts = (read_json(run.provenance_path) or {}).get("starts", [])
    if starts:
        last = dict(_flatten(starts[-1])) | {"starts": str(len(starts))}
        found |= {f"provenance.{key}": value[:5000] for key, value in last.items() if value}
        if "commit" in last:
            found["mlflow.source.git.commit"] = last["commit"]
    result = run.result()
    if result:
        found[CONVENTION_TAG] = str(result["convention"])
        found |= {f"stack.{key}": value for key, value in _flatten(result.get("stack", {}))}
    error = run.error()
    if error:
        found["harness.error"] = str(error.get("message", ""))[:5000]
    return found


def method_uses_lambda(config: Mapping[str, Any]) -> bool:
    """Whether the trial's method searches, under lambda or towards a budget; baselines have neither."""
    return searches(str(config.get("search", {}).get("method", "")))


def target(method: str, search: Mapping[str, Any]) -> str:
    """What tells trials without lambda apart: `budget 0.05`, `snapshot 0.05`, `35 GBOPs`, `policy mine`; else nothing.

    A policy has the name of its file, or of the trial's folder that holds its policy.json.
    """
    if method == "policy":
        path = Path(search["policy"])
        return f"policy {(path.name == 'policy.json' and path.parent.name) or path.stem}"
    if not searches(method) or search.get("lambda") is not None:
        return ""
    if search.get("gbops") is not None:
        return f"{search['gbops']:g} GBOPs"
    snapshots = search.get("snapshots") or ()
    budget = search.get("budget") or (snapshots[-1] if snapshots else None)
    return "" if budget is None else f"{'snapshot' if snapshots else 'budget'} {budget:g}"


def point(config: Mapping[str, Any]) -> str:
    """Identity of a configuration without its seed and paths: what trials that differ in the seed have in common."""
    tree = json.loads(json.dumps(config))
    tree.get("run", {}).pop("seed", None)
    tree.get("data", {}).pop("dir", None)
    return digest(tree)


def final_samples(result: Mapping[str, Any], records: Sequence[Mapping[str, Any]]) -> list[Sample]:
    """`final/...` once, stamped with the last record's time and step."""
    time_ms = _ms(records[-1]["time"]) if records else 0
    step = int(records[-1]["step"]) if records else 0
    return [Sample(f"final/{name}", float(result[name]), time_ms, step) for name in FINAL_METRICS if name in result]


def summary(run: RunDir) -> dict[str, Any] | None:
    """`SUMMARY_KEYS` of a finished trial from its directory; None while it has no result."""
    result, config = run.result(), read_json(run.config_path)
    if result is None or config is None:
        return None
    search = config["search"]
    own = {"data": str(config["data"]["source"]), "point": point(config), "target": target(search["method"], search)}
    return {name: own[name] if name in own else result.get(name) for name in SUMMARY_KEYS}


def layer_csv(layers: Sequence[Mapping[str, Any]]) -> str:
    """The per-layer table as CSV, one line a layer."""
    text = io.StringIO()
    writer = csv.DictWriter(text, LAYER_COLUMNS, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(layers)
    return text.getvalue()


def layer_table(layers: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The per-layer table in the split form that the MLflow UI shows as a table."""
    return {"columns": list(LAYER_COLUMNS), "data": [[layer.get(name) for name in LAYER_COLUMNS] for layer in layers]}


@dataclass(frozen=True)
class LayerPoint:
    """One layer as its gates stood after an epoch of a search; `step` is of all stages, `bops` is of one image."""

    stage: str
    epoch: int
    step: int
    name: str
    weight_bits: int
    activation_bits: int
    kept_out: int
    bops: float


def layer_history(records: Sequence[Mapping[str, Any]]) -> list[LayerPoint]:
    """What the records of a search say about its layers, epoch by epoch, layer by layer."""
    return [
        LayerPoint(record["stage"], record["epoch"], record["step"], *layer)
        for record in records
        for layer in record.get("layers", ())
    ]


def history_csv(points: Sequence[LayerPoint]) -> str:
    """`layer_history` as CSV, one line for each layer and epoch."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([field.name for field in fields(LayerPoint)])
    writer.writerows(astuple(point) for point in points)
    return text.getvalue()


def span_ms(records: Sequence[Mapping[str, Any]]) -> tuple[int, int] | None:
    """Time of the first and of the last record."""
    return (_ms(records[0]["time"]), _ms(records[-1]["time"])) if records else None


def trial_dirs(folder: Path) -> list[RunDir]:
    """The trials under a folder: itself, or those of a sweep, or of every sweep in it; sorted by path."""
    if (folder / "config.json").is_file():
        return [RunDir(folder)]
    found = {
        path.parent for pattern in ("trials/*/config.json", "*/trials/*/config.json") for path in folder.glob(pattern)
    }
    return [RunDir(path) for path in sorted(found)]


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{key}.")
        elif value is not None:
            yield f"{prefix}{key}", _text(value)


def _text(value: Any) -> str:
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value if isinstance(value, str) else json.dumps(value)


def _ms(seconds: float) -> int:
    return round(seconds * 1000)
