"""What `doctor` runs in children, since each may crash or hang: `python -m harness.doctor_probes NAME` prints JSON."""

import importlib.metadata
import json
import os
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Callable
from pathlib import Path

Facts = dict[str, object]

COMPILER_SOURCE = """
#include <Python.h>
#include <omp.h>
#include <vector>
extern "C" long doctor_sum(long n) {
    std::vector<long> ones(n, 1);
    long total = 0;
    #pragma omp parallel for reduction(+ : total)
    for (long i = 0; i < n; ++i) total += ones[i];
    return total;
}
"""


def torch() -> Facts:
    """Version, threads, CUDA build (None for a CPU build) and the names of the visible GPUs."""
    import torch as t

    gpus = [t.cuda.get_device_name(index) for index in range(t.cuda.device_count())]
    if gpus:
        t.ones(8, device="cuda").sum().item()
    return {"version": t.__version__, "threads": t.get_num_threads(), "cuda": t.version.cuda, "gpus": gpus}


def compiler() -> Facts:
    """Builds and runs what torch.compile builds: C++17 with OpenMP and Python's headers, as a shared library."""
    import ctypes

    command = os.environ.get("CXX", "g++")
    with tempfile.TemporaryDirectory() as folder:
        source, library = Path(folder, "probe.cpp"), Path(folder, "probe.so")
        source.write_text(COMPILER_SOURCE)
        include = f"-I{sysconfig.get_path('include')}"
        subprocess.run(
            [command, "-std=c++17", "-fopenmp", "-shared", "-fPIC", include, str(source), "-o", str(library)],
            check=True,
        )
        total = ctypes.CDLL(str(library)).doctor_sum(1000)
    version = subprocess.run([command, "-dumpfullversion"], capture_output=True, text=True, check=True).stdout.strip()
    return {"command": command, "version": version, "works": total == 1000}


def ffcv() -> Facts:
    """Writes four images with FFCV's native writer and reads them back through its JIT-compiled loader."""
    import numpy as np
    from ffcv.fields import IntField, RGBImageField
    from ffcv.loader import Loader, OrderOption
    from ffcv.writer import DatasetWriter

    pixels = np.arange(4 * 8 * 8 * 3, dtype=np.uint8).reshape(4, 8, 8, 3)

    class Images:
        def __len__(self) -> int:
            return 4

        def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
            return pixels[index], index

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "four.beton")
        fields = {"image": RGBImageField(write_mode="raw"), "label": IntField()}
        DatasetWriter(str(path), fields, num_workers=1).from_indexed_dataset(Images())
        loader = Loader(str(path), batch_size=4, num_workers=1, order=OrderOption.SEQUENTIAL, drop_last=False)
        batches = [(images.numpy().copy(), labels.flatten().tolist()) for images, labels in loader]
    read_back = len(batches) == 1 and np.array_equal(batches[0][0], pixels) and batches[0][1] == [0, 1, 2, 3]
    return {"version": importlib.metadata.version("ffcv"), "works": bool(read_back)}


def ray() -> Facts:
    """Imports what a sweep needs of Ray."""
    import ray as r
    import ray.train
    import ray.tune

    return {"version": r.__version__}


def mlflow() -> Facts:
    """Imports MLflow's client, server side and all."""
    from mlflow import __version__
    from mlflow.tracking import MlflowClient

    return {"version": __version__, "works": callable(MlflowClient)}


PROBES: dict[str, Callable[[], Facts]] = {
    "torch": torch,
    "compiler": compiler,
    "ffcv": ffcv,
    "ray": ray,
    "mlflow": mlflow,
}


def main(name: str) -> None:
    """Run one probe; its libraries may print what they like, the facts go out last, on a line of their own."""
    facts = PROBES[name]()
    sys.stdout.write("\n" + json.dumps(facts) + "\n")


if __name__ == "__main__":
    main(sys.argv[1])
