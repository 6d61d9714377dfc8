import os
import subprocess
import sys

import pytest
import torch
from torch import nn

from harness.arithmetic import arithmetic, autocast
from harness.config import RunConfig


def test_arithmetic_is_set_and_given_back():
    threads, deterministic = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    with arithmetic(RunConfig(threads=threads + 1)):
        assert torch.get_num_threads() == threads + 1
        assert torch.are_deterministic_algorithms_enabled()
    assert torch.get_num_threads() == threads
    assert torch.are_deterministic_algorithms_enabled() == deterministic


@pytest.mark.parametrize(
    ("precision", "expected"), [("fp32", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)]
)
def test_precision(precision: str, expected: torch.dtype):
    with autocast(RunConfig.model_validate({"precision": precision}), torch.device("cpu")):
        assert nn.functional.linear(torch.ones(2, 2), torch.ones(2, 2)).dtype == expected


def rounding() -> dict[str, object]:
    """What a GPU would do with products, in the words of torch's newer interface where it has them."""
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    return {
        "convolutions in TF32": cudnn.conv.fp32_precision == "tf32" or cudnn.allow_tf32,
        "products in TF32": matmul.fp32_precision == "tf32" or torch.get_float32_matmul_precision() != "highest",
        "sums in bfloat16": matmul.allow_bf16_reduced_precision_reduction,
        "sums in float16": matmul.allow_fp16_reduced_precision_reduction,
        "kernels by timing": cudnn.benchmark,
    }


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("deterministic", [False, True])
def test_what_a_gpu_may_round_is_set_and_given_back(precision: str, deterministic: bool):
    before = rounding()
    assert before["convolutions in TF32"], "torch's default, which this is against"
    assert before["sums in bfloat16"], "torch's default, which this is against"
    run = RunConfig.model_validate({"gpus_per_worker": 1, "precision": precision, "deterministic": deterministic})
    with arithmetic(run):
        assert rounding() == {
            "convolutions in TF32": precision != "fp32",
            "products in TF32": precision != "fp32",
            "sums in bfloat16": False,
            "sums in float16": False,
            "kernels by timing": not deterministic,
        }
    assert rounding() == before


COMPILER = """
import sys
from harness.arithmetic import arithmetic
from harness.config import RunConfig
if "before" in sys.argv:
    import torch._inductor.config as compiler
with arithmetic(RunConfig(gpus_per_worker=1, deterministic=True)):
    assert "before" in sys.argv or "torch._inductor.config" not in sys.modules
    import torch._inductor.config as compiler
    assert compiler.deterministic
assert not compiler.deterministic
"""


@pytest.mark.parametrize("when", ["before", "within"])
def test_the_compiler_is_told_of_determinism_and_not_imported_for_it(when: str):
    environment = {k: v for k, v in os.environ.items() if k != "TORCHINDUCTOR_DETERMINISTIC"}
    subprocess.run([sys.executable, "-c", COMPILER, when], check=True, timeout=100, env=environment)
