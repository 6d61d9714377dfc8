"""Where images come from: `parse_source` turns a command line's `kind:place` into a `Source`."""

from pathlib import Path

from harness.data.sources.base import Ref, Scan, Source, SplitScan
from harness.data.sources.cifar import Cifar
from harness.data.sources.digits import Digits
from harness.data.sources.imagefolder import ImageFolder
from harness.data.sources.parquet import Parquet
from harness.data.sources.webdataset import WebDataset
from harness.errors import UserError, nearest

KINDS = {
    "digits": "digits",
    "imagefolder": "imagefolder:DIR",
    "parquet": "parquet:GLOB",
    "tar": "tar:GLOB",
    "cifar10": "cifar10:DIR",
    "cifar100": "cifar100:DIR",
}


def parse_source(spec: str, *, val_labels: Path | None = None, synsets: Path | None = None) -> Source:
    """The source that `spec` names; the keywords are for ImageNet's flat validation folder. `UserError` lists kinds."""
    kind, _, place = spec.partition(":")
    if kind not in KINDS:
        raise UserError(f"unknown source {spec!r}: {nearest(kind, list(KINDS.values()))}")
    if (kind == "digits") == bool(place):
        raise UserError(f"source {spec!r} is not of the form {KINDS[kind]}")
    if kind != "imagefolder" and (val_labels or synsets):
        raise UserError(f"source {spec!r}: --val-labels and --synsets belong to imagefolder:DIR")
    match kind:
        case "digits":
            return Digits()
        case "imagefolder":
            return ImageFolder(Path(place), val_labels, synsets)
        case "parquet":
            return Parquet(place)
        case "tar":
            return WebDataset(place)
        case _:
            return Cifar("cifar10" if kind == "cifar10" else "cifar100", Path(place))


__all__ = ["KINDS", "Ref", "Scan", "Source", "SplitScan", "parse_source"]
