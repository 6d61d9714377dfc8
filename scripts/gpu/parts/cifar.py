"""CIFAR-100 in earnest, with the time that is left: one recipe from pretraining to report.

PLACE is a data set folder of this project, an `.npz` with uint8 images (n, 32, 32, 3) and labels under train_images,
train_labels, val_images, val_labels, or the folder of CIFAR-100's Python version.
"""

import argparse
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from harness.data.sources import Scan, SplitScan
from harness.data.writer import write
from scripts.gpu.part import Options, main
from scripts.gpu.parts.train import Run, backend, harness
from tests.benchmarks.measure import NotHereError, Row

RECIPE = "cifar100_resnet20"


def rows(options: Options) -> Iterator[Row]:
    """Accuracy and cost of the network that comes out, and the time of each stage."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--place", default="")
    parser.add_argument("--set", action="append", default=[])
    given = parser.parse_args(options.rest)
    if not given.place:
        raise NotHereError("no data set was named: --cifar PLACE")
    folder = written(Path(given.place), options.work / "cifar100")
    device = [] if options.device == "cuda" else ["run.gpus_per_worker=0"]
    sets = [f"data.dir={folder}", f"data.backend={backend()}", *device, *given.set]
    run = Run(options.work / "cifar", sets, recipe=RECIPE)
    run.start(shown=True)
    if run.wait(limit_s=None):
        sys.exit(f"the run ended with status {run.process.returncode}")
    result = run.folder.result()
    assert result is not None
    name = f"{RECIPE}, {result['method']}"
    yield Row(f"{name}: top-1", result["top1"], None, "%", at_least=True)
    yield Row(f"{name}: top-5", result["top5"], None, "%", at_least=True)
    yield Row(f"{name}: bit-operations, full precision / its own", result["bop_reduction"], None, "x", at_least=True)
    for stage, seconds in result["timings_s"].items():
        yield Row(f"{name}: {stage}", seconds, None, "s")


def written(place: Path, folder: Path) -> Path:
    """The data set's folder, written first where PLACE is not one."""
    if (place / "train.beton").is_file():
        return place.absolute()
    if place.suffix == ".npz":
        write(_Arrays(str(place)), folder)
    else:
        subprocess.run(harness("data", "write", "--source", f"cifar100:{place}", "--out", str(folder)), check=True)
    return folder


@cache
def _arrays(path: str) -> dict[str, NDArray[np.generic]]:
    with np.load(path) as file:
        return dict(file)


@dataclass(frozen=True)
class _Arrays:
    """Images and labels of an .npz as a source."""

    path: str
    small: bool = True

    @property
    def spec(self) -> str:
        return f"npz:{self.path}"

    def scan(self) -> Scan:
        labels = {split: _arrays(self.path)[f"{split}_labels"].astype(np.int64) for split in ("train", "val")}
        classes = tuple(f"class{number:03}" for number in range(int(labels["train"].max()) + 1))
        parts = {split: SplitScan([(split, k) for k in range(len(of))], of) for split, of in labels.items()}
        return Scan(classes, {"train": parts["train"], "val": parts["val"]})

    def read(self, ref: tuple[str, int]) -> NDArray[np.uint8]:
        return _arrays(self.path)[f"{ref[0]}_images"][ref[1]].astype(np.uint8)

    def describe(self, ref: tuple[str, int]) -> str:
        return f"{ref[0]} image {ref[1]} of {self.path}"


if __name__ == "__main__":
    main(rows)
