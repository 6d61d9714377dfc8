"""The Triton kernels, without a GPU: under Triton's interpreter, and what its compiler makes of them for one.

The interpreter takes its turn from the environment when Triton is imported: hence a process of its own, this file.
"""

from __future__ import annotations

import itertools
import math
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from sbs.kernels import Form, GateMode
from tests.numerics import group_cases
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
    from sbs import triton_groups
    from sbs import triton_kernels as made

    group_cases.compare(triton_groups, group_cases.SMALL, "cpu")

    # bfloat16 is truncated by the interpreter: gradients differ in their last bit
    low = {"dx_rtol": 2**-7}
    for form in FORMS:
        compare(made, Case(form, ODD, torch.float32), "cpu", names=BOTH)
    for mode in GateMode:
        form = Form(False, mode, (1, 3, 15, 255), math.inf)
        compare(made, Case(form, EVEN, torch.bfloat16), "cpu", names=BOTH, **low)
        compare(made, Case(form._replace(grid=(15,)), (90, 45, 1), torch.float16), "cpu")
    compare(made, Case(Form(True, GateMode.NONE, (3, 15)), ODD, torch.float32, torch.bfloat16), "cpu", **low)
    compare(made, Case(Form(True, GateMode.NONE, (3, 15)), ODD, torch.float32), "cpu", names=("backward",))
    compare(made, Case(Form(False, GateMode.STATISTICS, (3, 15)), (90, 45, 1), torch.float16), "cpu")
    compare(made, Case(Form(False, GateMode.AFTER, (3, 15)), (5, 16, 1), torch.float64), "cpu")


@pytest.mark.timeout(240)
def test_interpreted_kernels_are_the_eager_ones():
    command = [sys.executable, "-m", __name__]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


class _Device:
    """What Triton asks a driver for when it compiles: a GPU of this compute capability."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_target(self) -> object:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return self.capability

    def get_current_stream(self, device: int) -> int:
        return 0


@dataclass(frozen=True)
class Made:
    """A kernel as it was compiled, and the arguments of a launch."""

    name: str
    ptx: str
    registers: int
    local_bytes: int
    arguments: tuple[object, ...]

    @classmethod
    def of(cls, name: str, kernel: Any, arguments: tuple[object, ...]) -> Made:
        found = subprocess.run(
            [
                _tool("ptxas"),
                "-v",
                f"--gpu-name=sm_{kernel.metadata.target.arch}{'a' * (kernel.metadata.target.arch >= 90)}",
                "/dev/stdin",
                "-o",
                "/dev/null",
            ],
            input=kernel.asm["ptx"],
            capture_output=True,
            text=True,
            check=True,
            timeout=60,
        ).stderr
        registers = re.search(r"Used (\d+) registers", found)
        spills = re.findall(r"(\d+) bytes (?:stack frame|spill stores|spill loads)", found)
        assert registers
        assert len(spills) == 3
        return cls(name, kernel.asm["ptx"], int(registers[1]), sum(map(int, spills)), arguments)

    def loop(self) -> str:
        """The body of its one loop."""
        labels = {m[1]: m.start() for m in re.finditer(r"^(\$L\w+):", self.ptx, re.MULTILINE)}
        jumps = [(labels.get(m[1], math.inf), m.start()) for m in re.finditer(r"bra(?:\.uni)?\s+(\$L\w+);", self.ptx)]
        ((start, end),) = [(start, end) for start, end in jumps if start < end]
        return self.ptx[int(start) : end]


def _tool(name: str) -> str:
    import triton

    return str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name)


@pytest.fixture(params=[80, 90])
def made(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[list[Made]]:
    """What the kernels are compiled to from here on, for a GPU of that capability; nothing is launched."""
    from triton.compiler import CompiledKernel
    from triton.runtime import driver, jit

    from sbs import triton_kernels

    found: list[Made] = []
    run = jit.JITFunction.run

    def compile_only(self: Any, *args: object, grid: object, warmup: bool, **given: object) -> object:
        kernel = run(self, *args, grid=grid, warmup=True, **given)
        found.append(Made.of(self.__name__, kernel, args))
        return kernel

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(jit.JITFunction, "run", compile_only)
    monkeypatch.setattr(CompiledKernel, "__getitem__", lambda self, grid: lambda *args: found.append(args))
    monkeypatch.setattr(triton_kernels, "_ready", {})
    before = driver._active
    driver.set_active(_Device(request.param))
    yield found
    driver.set_active(before)


COMPILED = {
    "flat": Case(Form(False, GateMode.NONE, (3, 15, 255), 6.0), (100, 64, 1), torch.bfloat16),
    "pixels": Case(Form(False, GateMode.BEFORE, (3, 15, 255), math.inf), (1000, 144, 1), torch.bfloat16),
    "planes": Case(Form(False, GateMode.AFTER, (3, 15, 255), math.inf), (7, 96, 784), torch.float16),
    "weights": Case(Form(True, GateMode.NONE, (3, 15, 255)), (100, 64, 1), torch.float32),
}


@pytest.mark.parametrize("kind", COMPILED)
def test_compiled_kernels_read_and_write_all_once_in_vectors_of_16_bytes(made, kind):
    """No spills, no division to find a channel, nothing exchanged between threads for an element."""
    from sbs import triton_kernels

    case = COMPILED[kind]
    operand, calls = case.operand("cpu"), case.calls("cpu")
    for name in BOTH:
        getattr(triton_kernels, name)(operand, case.form, *calls[name])
    assert [each.name for each in made] == ["forward", "add_sums", "backward", "add_gradients"]
    assert [each.local_bytes for each in made] == [0, 0, 0, 0]
    for each, tensors in ((made[0], (1, 1)), (made[2], (2, 2))):
        assert each.registers <= 96
        loop = each.loop()
        tile = triton_kernels.TILES[each.name]
        vectors = tile.elements * case.dtype.itemsize // (16 * 32 * tile.warps)
        for access, count in zip(("ld", "st"), tensors, strict=True):
            found = re.findall(rf"{access}\.global\S*", loop)
            assert len(found) == count * vectors, found
            assert all(".v4.b32" in each for each in found)
        assert not re.findall(r"\b(?:div|rem)\.[su]|\.shared|bar\.sync|shfl", loop)
        # rounded before it is added to: only where `tl.fma` stands is it not
        assert "mul.f32" not in loop
        assert "add.f32" not in loop


def test_compiled_kernels_of_all_weights_keep_to_registers(made):
    from sbs import triton_groups

    given = group_cases.weights(group_cases.SMALL, "cpu")
    vector = torch.ones(len(given))
    for own in ([()] * len(given), group_cases.masks(given)):
        triton_groups.moments(given, own)
        triton_groups.statistics(given, vector, vector, group_cases.GRID, own)
    triton_groups.encode(given, vector, vector, vector, torch.bfloat16)
    triton_groups.importance(given, *group_cases.groups(given))
    compiled = [each for each in made if isinstance(each, Made)]
    names = {"moments", "add_moments", "residuals", "add_residuals", "encode", "magnitudes"}
    assert {each.name for each in compiled} == names
    for each in compiled:
        assert each.local_bytes == 0, each.name
        assert each.registers <= 96, each.name


def test_a_kernel_is_compiled_once_for_layers_of_any_size(made):
    """Sizes, and where among others a number lies, make no variants; what runs again gets all its arguments."""
    from sbs import triton_code, triton_kernels

    form = Form(False, GateMode.BEFORE, (3, 15, 255), math.inf)
    for shape in ((100, 64, 1), (1, 64, 1), (16, 192, 1), (2001, 320, 1)):
        case = Case(form, shape, torch.bfloat16)
        operand, calls = case.operand("cpu"), case.calls("cpu")
        shifted = torch.zeros(6)[1:]  # of another alignment
        operand = operand._replace(scale=shifted[0], levels=shifted[3])
        for name in BOTH:
            getattr(triton_kernels, name)(operand, case.form, *calls[name])
    compiled = [each for each in made if isinstance(each, Made)]
    again = [each for each in made if not isinstance(each, Made)]
    assert len(compiled) == 4
    assert len(again) == 12
    assert [len(each) for each in again] == [
        len(getattr(triton_code, each.name).arg_names) for _ in range(3) for each in compiled
    ]


if __name__ == "__main__":
    torch.set_num_threads(1)
    _compare_all()
