"""Kernels of sbs one by one, beside a plain copy: what `scripts/gpu/bench_kernels.py` measures."""

import json
import subprocess
import sys
from collections.abc import Iterator

from scripts.gpu.part import Options, main
from scripts.gpu.run import ROOT
from tests.benchmarks.measure import NotHereError, Row

PROGRAM = ROOT / "scripts" / "gpu" / "bench_kernels.py"
SECONDS = 40
# Triton 3.6 with numpy 2.5
INTERPRETER = "only 0-dimensional arrays can be converted"


def rows(options: Options) -> Iterator[Row]:
    """GB/s of each kernel and size; what failed stands in the log."""
    if not PROGRAM.is_file():
        raise NotHereError(f"{PROGRAM.name} is not in this tree")
    out = options.work / "kernels.json"
    command = [sys.executable, str(PROGRAM), "--out", str(out), "--device", options.device, "--seconds", str(SECONDS)]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    print(done.stdout, flush=True)
    if options.tiny and INTERPRETER in done.stdout:
        raise NotHereError("Triton's interpreter, which takes the GPU's place here, and this numpy do not go together")
    found = json.loads(out.read_text())["rows"] if out.is_file() else []
    for row in found:
        if not row["error"]:
            name = f"{row['kernel']} {row['mode'].lower()}, {row['network']}, {row['channels']} channels {row['how']}"
            yield Row(name.strip(), row["gb_per_s"], None, "GB/s", at_least=True)
    yield Row("kernels one by one: status of the program", done.returncode, 0)


if __name__ == "__main__":
    main(rows)
