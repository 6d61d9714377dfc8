"""The Triton kernels on a CUDA device compute what the eager kernels do there: codes to the bit, sums in another order.

Skipped without a device, but for the checks themselves, which run under Triton's interpreter in tests/numerics.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

import sbs
from sbs import compiled, kernels
from sbs.kernels import Form, GateMode, Operand
from tests.numerics.triton_cases import Case, compare

FORMS = [
    Form(signed, mode, (1, 3, 15, 255), relu)
    for signed, mode, relu in itertools.product((False, True), GateMode, (None, math.inf, 6.0))
    if not (signed and relu)
]
BOTH = ("encode_with_sums", "backward_with_codes")
GRIDS = [(15,), (3, 15), (3, 15, 255)]
# a 3-d view each: pixels of channels_last, planes of NCHW; multiples of a vector and odd ones, all of several tiles
VIEWS = {
    "pixels": (20_000, 144, 1),
    "odd pixels": (7_001, 45, 1),
    "planes": (8, 96, 3_136),
    "odd planes": (5, 70, 49),
    "rows": (4_000, 1_000, 1),
}


@pytest.fixture(autouse=True)
def _compiled_kernels() -> Iterator[None]:
    before = sbs.use_compiled(True)
    yield
    failures = compiled.failures()
    sbs.use_compiled(before)
    assert not failures


@pytest.mark.gpu
@pytest.mark.timeout(300)
@pytest.mark.parametrize("signed", [False, True])
def test_forms_in_bfloat16(signed):
    for form in FORMS:
        if form.signed is signed:
            compare(compiled, Case(form, VIEWS["pixels"], torch.bfloat16), "cuda", names=BOTH)


@pytest.mark.gpu
@pytest.mark.timeout(300)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_forms_in_other_types(dtype):
    for mode in GateMode:
        compare(compiled, Case(Form(False, mode, (3, 15, 255), 6.0), VIEWS["pixels"], dtype), "cuda", names=BOTH)
    compare(compiled, Case(Form(True, GateMode.NONE, (3, 15)), VIEWS["pixels"], dtype), "cuda", names=BOTH)


@pytest.mark.gpu
@pytest.mark.timeout(300)
def test_all_kernels():
    for mode in GateMode:
        compare(compiled, Case(Form(False, mode, (3, 15, 255), math.inf), VIEWS["pixels"], torch.bfloat16), "cuda")


@pytest.mark.gpu
@pytest.mark.timeout(300)
@pytest.mark.parametrize("view", ["odd pixels", "planes", "odd planes"])
def test_orders_in_memory(view):
    for mode in (GateMode.BEFORE, GateMode.AFTER):
        form = Form(False, mode, (3, 15, 255), math.inf)
        compare(compiled, Case(form, VIEWS[view], torch.bfloat16), "cuda", names=BOTH)


@pytest.mark.gpu
@pytest.mark.timeout(300)
def test_candidate_widths():
    for grid in GRIDS:
        case = Case(Form(False, GateMode.NONE, grid, math.inf), VIEWS["rows"], torch.bfloat16)
        compare(compiled, case, "cuda", names=(*BOTH, "encode"))


@pytest.mark.gpu
def test_other_types():
    """The image and weights are float32 where gradients and codes are bfloat16; float64 runs eagerly."""
    form = Form(True, GateMode.NONE, (3, 15, 255))
    compare(compiled, Case(form, VIEWS["rows"], torch.float32, torch.bfloat16), "cuda")
    compare(compiled, Case(form, VIEWS["odd pixels"], torch.float64), "cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("scale", [1.7, 0.013, 3.0, 1 / 3, 1.9999999, 1.0000001, 511.77])
def test_quotients_are_rounded_once(signed, scale):
    """Codes of many values, ever more of them near the middle between two codes, for scales of all mantissas."""
    levels = torch.tensor(65535.0, device="cuda")
    generator = torch.Generator("cuda").manual_seed(3)
    x = (torch.rand(2**24, generator=generator, device="cuda") * 2.2 - 1.1) * scale
    middles = (torch.arange(65535, device="cuda") + 0.5) / 65535 * scale
    near = torch.cat([middles * (1 + i * 2.0**-24) for i in range(-8, 9)])
    if signed:
        near = 2 * near - scale
    x = torch.cat([x, near, torch.tensor([0.0, -0.0, scale, -scale, math.inf, -math.inf], device="cuda")])
    operand = Operand(x, None, torch.zeros((), device="cuda"), torch.tensor(scale, device="cuda"), levels)
    form = Form(signed, GateMode.NONE, (65535,))
    assert torch.equal(compiled.encode(operand, form, torch.float32), kernels.encode(operand, form, torch.float32))


@pytest.mark.gpu
def test_values_that_are_no_numbers_stay_so():
    x = torch.randn(10_000, device="cuda")
    x[1234] = math.nan
    operand = Operand(x, None, *torch.tensor([0.0, 1.7, 15.0], device="cuda").unbind(0))
    for signed, relu in ((False, None), (True, None), (False, math.inf), (False, 6.0)):
        form = Form(signed, GateMode.NONE, (3, 15), relu)
        codes, check = compiled.encode_with_check(operand, form, torch.float32)
        assert torch.isnan(codes).nonzero().tolist() == [[1234]]
        assert torch.isnan(check)
        _, sums = compiled.encode_with_sums(operand, form, torch.float32)
        assert torch.isnan(sums).all()


@pytest.mark.gpu
def test_sums_are_the_same_every_time():
    case = Case(Form(False, GateMode.AFTER, (3, 15, 255), math.inf), VIEWS["pixels"], torch.bfloat16)
    operand, arguments = case.operand("cuda"), case.gradients("cuda")
    form = case.form

    def results() -> list[Tensor]:
        gradients = compiled.backward(operand, form, *arguments)
        return [compiled.residual_sums(operand, form), *[g for g in gradients if g is not None]]

    first = results()
    for _ in range(3):
        assert all(torch.equal(a, b) for a, b in zip(results(), first, strict=True))


@pytest.mark.gpu
@pytest.mark.timeout(120)
def test_more_elements_than_32_bits_count():
    """2**31 and some: only the first and last elements are compared, which is where an overflow would show."""
    if torch.cuda.get_device_properties(0).total_memory < 40 * 2**30:
        pytest.skip("wants 40 GiB of memory")
    count = 2**31 + 4096 + 8
    x = torch.zeros(count, dtype=torch.bfloat16, device="cuda")
    ends = torch.randn(2, 4096, device="cuda").to(torch.bfloat16)
    x[:4096], x[-4096:] = ends
    operand = Operand(x, None, *torch.tensor([0.0, 1.7, 15.0], device="cuda").unbind(0))
    form = Form(False, GateMode.NONE, (3, 15), math.inf)
    codes, sums = compiled.encode_with_sums(operand, form, torch.bfloat16)
    want, want_sums = kernels.encode_with_sums(operand._replace(x=ends.view(-1)), form, torch.bfloat16)
    assert torch.equal(torch.stack([codes[:4096], codes[-4096:]]).view(-1), want)
    torch.testing.assert_close(sums, want_sums)
    channels = 8
    rows = x[: count - count % channels].view(-1, channels, 1)
    gate = torch.ones(1, channels, 1, device="cuda")
    gated, form = operand._replace(x=rows, gate=gate), form._replace(mode=GateMode.BEFORE)
    del codes
    torch.cuda.empty_cache()
    _, sums = compiled.encode_with_sums(gated, form, torch.bfloat16)
    torch.testing.assert_close(sums, want_sums)
