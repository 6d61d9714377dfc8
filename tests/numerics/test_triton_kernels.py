"""The Triton kernels, without a GPU: under Triton's interpreter, and what its compiler makes of them.

The interpreter takes its turn from the environment when Triton is imported: hence a process of its own, this file.
"""

from __future__ import annotations

import itertools
import math
import os
import subprocess
import sys
from importlib.util import find_spec

import pytest
import torch

from sbs.kernels import Form, GateMode
from tests.numerics.triton_cases import Case, compare

pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed (pip install triton)")

# neither a multiple of a vector nor of a tile; two tiles of every axis
ODD, EVEN = (3, 20, 41), (2, 24, 72)
FORMS = [
    Form(signed, mode, (3, 15), relu)
    for (signed, relu), mode in itertools.product(
        ((False, None), (True, None), (False, math.inf), (False, 6.0)), GateMode
    )
]
BOTH = ("encode_with_sums", "backward_with_codes")


def _compare_all() -> None:
    from sbs import triton_kernels as made

    # bfloat16 is truncated by the interpreter: gradients differ in their last bit
    low = {"dx_rtol": 2**-7}
    for form in FORMS:
        compare(made, Case(form, ODD, torch.float32), "cpu", names=BOTH)
    for mode in GateMode:
        form = Form(False, mode, (1, 3, 15, 255), math.inf)
        compare(made, Case(form, EVEN, torch.bfloat16), "cpu", names=BOTH, **low)
        compare(made, Case(form._replace(grid=(15,)), (90, 45, 1), torch.float16), "cpu")
    compare(made, Case(Form(True, GateMode.NONE, (3, 15)), ODD, torch.float32, torch.bfloat16), "cpu", **low)
    compare(made, Case(Form(False, GateMode.STATISTICS, (3, 15)), (90, 45, 1), torch.float16), "cpu")
    compare(made, Case(Form(False, GateMode.AFTER, (3, 15)), (5, 16, 1), torch.float64), "cpu")


@pytest.mark.timeout(240)
def test_interpreted_kernels_are_the_eager_ones():
    command = [sys.executable, "-m", __name__]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


if __name__ == "__main__":
    torch.set_num_threads(1)
    _compare_all()
