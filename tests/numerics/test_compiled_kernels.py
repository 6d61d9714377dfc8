"""The compiled kernels compute what the eager ones do, with few graphs, under autocast, or not at all."""

from __future__ import annotations

import fcntl
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch._inductor import cpp_builder
from torch._inductor.runtime.cache_dir_utils import default_cache_dir
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

import sbs
from sbs import compiled, inductor, kernels, library
from tests.numerics import networks, states

SIZE = 8
DEPTHS = ("resnet20", "resnet32")


def _step(net, x, *, autocast: bool = False) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    net.zero_grad()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        loss = F.cross_entropy(net(x).float(), torch.arange(len(x)) % 5)
    (loss + 0.1 * sbs.bop_penalty(net)).backward()
    return loss.detach(), {name: p.grad.clone() for name, p in net.named_parameters() if p.grad is not None}


def _difference(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    """Largest difference of any gradient, relative to the largest entry of that tensor."""
    assert a.keys() == b.keys()
    return max(((a[n] - b[n]).abs().max() / a[n].abs().max().clamp_min(1e-6)).item() for n in a if a[n].numel())


@pytest.fixture
def libraries(monkeypatch) -> list[str]:
    """The kernels that a library is made or loaded for from here on."""
    made: list[str] = []
    kernel = library.kernel
    monkeypatch.setattr(
        library, "kernel", lambda function, *given: made.append(function.__name__) or kernel(function, *given)
    )
    for each in vars(compiled).values():
        if isinstance(each, compiled._Compiled):
            monkeypatch.setattr(each, "made", {})
    return made


@pytest.mark.timeout(400)
def test_compiled_kernels_equal_eager_ones(libraries):
    """Signed and unsigned inputs, all gate modes, channels_last, float32 and bfloat16 autocast."""
    net = states.searched(networks.Inverted(), SIZE, seed=21, group_size=2, absorb_relus=True)
    net = net.train().to(memory_format=torch.channels_last)
    x = networks.images(6, SIZE, 4).contiguous(memory_format=torch.channels_last)
    loss, gradients = _step(net, x)
    loss_bf16, gradients_bf16 = _step(net, x, autocast=True)
    sbs.use_compiled(True)
    loss_compiled, compiled_gradients = _step(net, x)
    torch.testing.assert_close(loss_compiled, loss, rtol=1e-4, atol=1e-5)
    assert _difference(compiled_gradients, gradients) < 2e-3
    loss_compiled, compiled_gradients = _step(net, x, autocast=True)
    torch.testing.assert_close(loss_compiled, loss_bf16, rtol=2e-2, atol=2e-2)
    assert compiled_gradients.keys() == gradients_bf16.keys()
    assert all(g.isfinite().all() for g in compiled_gradients.values())
    assert libraries
    small = sbs.compress(net, sbs.freeze(net)).eval()
    with torch.no_grad():
        assert torch.equal(net.eval()(x), small(x))
    assert not compiled.failures()


@pytest.mark.timeout(400)
def test_graphs_are_made_per_kind_of_tensor_and_not_per_shape(libraries):
    """22 layers x 2 operands x 2 passes of ResNet-20 share a handful; other depths, batches and sizes add none."""
    nets = {
        name: sbs.prepare(sbs.models.build(name, 5), sbs.SearchSpace(), torch.zeros(1, 3, 16, 16), absorb_relus=True)
        for name in DEPTHS
    }
    sbs.use_compiled(True)
    counts = []
    for (name, net), (batch, size) in zip(nets.items(), [(6, 16), (4, 20)], strict=True):
        for _ in range(2):
            _step(net.train(), networks.images(batch, size, 1))
            sbs.after_step(net)
        counts.append(len(libraries))
        assert not compiled.failures(), name
    assert 0 < counts[0] <= 12
    assert counts[1] == counts[0]


@pytest.mark.timeout(400)
def test_a_library_serves_other_sizes_threads_and_processes(tmp_path, monkeypatch):
    """Made once for (outer, channels, inner) of one call; another process finds it, other threads want their own."""
    monkeypatch.setattr(library, "_GIVEN", str(tmp_path))
    form = kernels.Form(False, kernels.GateMode.BEFORE, (3, 15))
    shift, scale, levels = torch.tensor([0.0, 1.7, 15.0]).unbind(0)

    def compare(*shape: int) -> None:
        gate = (torch.arange(shape[1]) % 2).float().view(1, -1, 1)
        operand = kernels.Operand(torch.randn(shape), gate, shift, scale, levels)
        made = library.kernel(kernels.encode_with_sums, operand, form, (torch.float32,), {})
        codes, sums = made(operand, form, torch.float32)
        want, want_sums = kernels.encode_with_sums(operand, form, torch.float32)
        assert torch.equal(codes, want)
        torch.testing.assert_close(sums, want_sums, rtol=1e-4, atol=1e-4)

    for shape in ((4, 6, 25), (9, 2, 2), (2, 64, 49)):
        compare(*shape)
    assert len(list(tmp_path.glob("sbs/*.so"))) == 1
    assert not list(tmp_path.glob("sbs/*.new"))
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    try:
        compare(4, 6, 25)
    finally:
        torch.set_num_threads(threads)
    assert len(list(tmp_path.glob("sbs/*.so"))) == 2


FORM = kernels.Form(False, kernels.GateMode.NONE, (3, 15))


def _operand(size: int = 100) -> kernels.Operand:
    shift, scale, levels = torch.tensor([0.0, 1.7, 15.0]).unbind(0)
    return kernels.Operand(torch.linspace(-1, 3, size), None, shift, scale, levels)


def _compare_encode() -> None:
    made = library.kernel(kernels.encode, _operand(), FORM, (torch.float32,), {})
    want = kernels.encode(_operand(), FORM, torch.float32)
    assert torch.equal(made(_operand(), FORM, torch.float32), want)


def test_a_damaged_library_is_made_again(tmp_path, monkeypatch):
    """Loading one would end the process. What a killed builder has left goes as well."""
    monkeypatch.setattr(library, "_GIVEN", str(tmp_path))
    _compare_encode()
    (path,) = tmp_path.glob("sbs/*.so")
    whole = path.read_bytes()
    path.unlink()  # the process maps that file: one of the same name takes its place
    path.write_bytes(whole[: len(whole) // 4])
    path.with_suffix(".new").write_bytes(whole[:1000])
    _compare_encode()
    assert library._sound_plan(path)
    assert not path.with_suffix(".new").exists()
    for damaged in (b"", whole[:100], whole[:-1], whole[:5000] + bytes(64) + whole[5064:]):
        path.unlink()
        path.write_bytes(damaged)
        assert library._sound_plan(path) is None


def test_a_lock_that_is_never_left_ends_in_eager_kernels(tmp_path, monkeypatch, libraries):
    """As by a stopped process: one warning that says so, and right results."""
    monkeypatch.setattr(library, "_GIVEN", str(tmp_path))
    monkeypatch.setattr(library, "LOCK_LIMIT_S", 0.1)
    sbs.use_compiled(True)
    flock = fcntl.flock

    def held(file: object, how: int) -> None:
        if how & fcntl.LOCK_EX:
            raise BlockingIOError
        flock(file, how)

    monkeypatch.setattr(fcntl, "flock", held)
    with pytest.warns(UserWarning, match=r"encode runs uncompiled.*another process has held"):
        codes = compiled.encode(_operand(), FORM, torch.float32)
    assert torch.equal(codes, kernels.encode(_operand(), FORM, torch.float32))
    assert list(compiled.failures()) == ["encode"]


def test_encoding_is_made_once_for_all_candidate_widths(libraries):
    """The one selected is an input; which ones compete matters for statistics and gradients alone."""
    sbs.use_compiled(True)
    operand = _operand(10_000)
    for grid in ((3, 15), (1, 3, 15, 255), (15,)):
        codes = compiled.encode(operand, FORM._replace(grid=grid), torch.float32)
        assert torch.equal(codes, kernels.encode(operand, FORM, torch.float32))
    assert libraries == ["encode"]


def test_a_small_layer_at_one_width_is_not_worth_a_library(libraries):
    """Compiling for a classifier alone would take seconds, and gain a fraction of a millisecond a step."""
    sbs.use_compiled(True)
    one_width = FORM._replace(grid=(15,))
    codes = compiled.encode(_operand(), one_width, torch.float32)
    assert torch.equal(codes, kernels.encode(_operand(), FORM, torch.float32))
    assert not libraries
    compiled.encode_with_sums(_operand(), FORM, torch.float32)
    assert libraries == ["encode_with_sums"]


def test_what_torch_compiles_to_in_a_form_unknown_here_is_not_run(tmp_path, monkeypatch, libraries):
    """As by another version of torch: one warning, and right results."""
    monkeypatch.setattr(library, "_GIVEN", str(tmp_path))
    monkeypatch.setattr(inductor, "_IMPORTED", "a line that is not there")
    sbs.use_compiled(True)
    with pytest.warns(UserWarning, match=r"encode runs uncompiled.*in an unknown form"):
        codes = compiled.encode(_operand(), FORM, torch.float32)
    assert torch.equal(codes, kernels.encode(_operand(), FORM, torch.float32))
    assert list(compiled.failures()) == ["encode"]
    assert not list(tmp_path.glob("sbs/*.so"))


def test_a_plan_that_needs_other_names_is_not_kept(tmp_path, monkeypatch):
    """It is run once before it is: afterwards it would fail in the midst of training."""
    monkeypatch.setattr(library, "_GIVEN", str(tmp_path))
    compile_kernel = inductor.compile_kernel

    def other(*given):
        code, plan = compile_kernel(*given)
        return inductor.Library(code, plan.replace(b"empty_strided_cpu(", b"empty_strided_elsewhere("))

    monkeypatch.setattr(inductor, "compile_kernel", other)
    with pytest.raises(NameError, match="empty_strided_elsewhere"):
        _compare_encode()
    assert not list(tmp_path.glob("sbs/*.so"))
    monkeypatch.undo()
    monkeypatch.setattr(library, "_GIVEN", str(tmp_path))
    _compare_encode()


@pytest.mark.parametrize("setting", ["theirs", None])
def test_nothing_that_torch_has_cached_gets_into_a_library(tmp_path, monkeypatch, setting):
    """Which may be another machine's, damaged, or another user's. Its cache stays as it is, and so does its setting."""
    monkeypatch.setattr(library, "_GIVEN", str(tmp_path / "ours"))
    theirs = setting and str(tmp_path / setting)
    if theirs is None:
        monkeypatch.delenv(inductor.CACHE, raising=False)
    else:
        monkeypatch.setenv(inductor.CACHE, theirs)
    _compare_encode()
    assert os.environ.get(inductor.CACHE) == theirs
    assert len(list((tmp_path / "ours").rglob("*.so"))) == 1
    assert not (tmp_path / "theirs").exists()


def test_threads_compile_one_after_the_other(tmp_path, monkeypatch):
    """Torch's tracing knows but one at a time."""
    monkeypatch.setattr(library, "_GIVEN", str(tmp_path))

    def difference(grid: tuple[int, ...]) -> float:
        form = FORM._replace(grid=grid)
        made = library.kernel(kernels.residual_sums, _operand(), form, (), {})
        return (made(_operand(), form) - kernels.residual_sums(_operand(), form)).abs().max().item()

    with ThreadPoolExecutor(3) as threads:
        assert max(threads.map(difference, [(3, 15, 255), (1, 3, 255), (1, 3, 15)])) < 1e-3


@pytest.fixture
def compilations(monkeypatch) -> list[str]:
    """The command lines that compile kernels from here on."""
    found: list[str] = []
    run = cpp_builder.run_compile_cmd

    def record(line: str, cwd: str) -> None:
        if ".main.cpp" in line:
            found.append(line)
        run(line, cwd)

    monkeypatch.setattr(cpp_builder, "run_compile_cmd", record)
    return found


def test_headers_are_precompiled_and_used(tmp_path, monkeypatch, compilations):
    """They are the better half of what compiling a kernel takes."""
    monkeypatch.setattr(library, "_GIVEN", str(tmp_path))
    inductor._headers.cache_clear()
    _compare_encode()
    inductor._headers().result(timeout=100)
    compilations.clear()
    library.kernel(kernels.residual_sums, _operand(), FORM._replace(grid=(7, 31)), (), {})
    (command,) = compilations
    (header,) = re.findall(r"-include (\S+)", command)
    assert Path(f"{header}.gch").stat().st_size > 2**20


def test_a_users_own_arithmetic_does_not_get_into_libraries(tmp_path, monkeypatch, compilations):
    """They outlive the process, and codes must be those of eager code."""
    monkeypatch.setattr(library, "_GIVEN", str(tmp_path))
    own = {"cpp.enable_floating_point_contract_flag": "fast", "cpp.enable_unsafe_math_opt_flag": True}
    with torch._inductor.config.patch(own):
        library.kernel(kernels.residual_sums, _operand(), FORM._replace(grid=(7, 63)), (), {})
    (command,) = compilations
    assert "-ffp-contract=off" in command
    assert "-ffp-contract=fast" not in command
    assert "-fno-unsafe-math-optimizations" in command


def test_headers_where_others_can_write_are_left_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    Path(default_cache_dir()).mkdir()
    Path(default_cache_dir()).chmod(0o777)
    inductor._headers.cache_clear()
    assert not inductor._succeeded(inductor._headers())
    assert not inductor._headers().running()
    inductor._headers.cache_clear()


def test_without_openssl_headers_are_not_precompiled(tmp_path, monkeypatch):
    """The compiler's cache of headers wants that program; its lack must not cost the kernels."""
    monkeypatch.setattr(library, "_GIVEN", str(tmp_path))
    monkeypatch.setattr(inductor.shutil, "which", lambda program: None)
    inductor._headers.cache_clear()
    run = subprocess.run

    def without(command, *given, **options):
        if command[0] == "openssl":
            raise FileNotFoundError(2, "No such file or directory", "openssl")
        return run(command, *given, **options)

    monkeypatch.setattr(subprocess, "run", without)
    _compare_encode()
    inductor._headers.cache_clear()


def test_every_type_is_a_kind_of_its_own_and_fake_tensors_have_no_memory():
    gated = _operand()._replace(x=torch.zeros(2, 3, 4), gate=torch.ones(1, 3, 1))
    operands = [gated, *(gated._replace(**{name: value.double()}) for name, value in gated._asdict().items())]
    kinds = {compiled._kind(each, FORM, (t,)) for each in operands for t in (torch.float32, torch.bfloat16)}
    assert len(kinds) == 12
    sbs.use_compiled(True)
    with FakeTensorMode() as mode:
        fake = kernels.Operand(*[None if each is None else mode.from_tensor(each) for each in _operand()])
        assert compiled.encode(fake, FORM, torch.float32).shape == (100,)


def test_a_folder_that_others_can_write_or_change_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(library, "_GIVEN", str(tmp_path))
    (tmp_path / "own").mkdir(mode=0o700)
    (tmp_path / "sbs").symlink_to(tmp_path / "own")
    with pytest.raises(sbs.SbsError, match="not a folder that you alone can write"):
        library.folder()
    (tmp_path / "sbs").unlink()
    (tmp_path / "sbs").mkdir()
    (tmp_path / "sbs").chmod(0o777)
    with pytest.raises(sbs.SbsError, match="not a folder that you alone can write"):
        library.folder()


SCRIPT = """
import warnings, torch, sbs
from sbs import compiled
from tests.numerics import networks, states
sbs.use_compiled(False)
net = states.searched(networks.Residual(), 8, seed=22, group_size=2)
x = networks.images(6, 8, 4)
want = net(x)
sbs.use_compiled(True)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    got = [net(x) for _ in range(2)]
    got[-1].sum().backward()
assert all(torch.equal(g, want) for g in got)
ours = [str(w.message).split()[2] for w in caught if "runs uncompiled" in str(w.message)]
print(*ours)
assert sorted(ours) == sorted(compiled.failures())
"""


def test_warnings_of_the_compiler_are_no_errors(tmp_path):
    """Not even for those who asked Python to take them for such."""
    script = "from tests.numerics.test_compiled_kernels import _compare_encode; _compare_encode()"
    environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-W", "error", "-W", "ignore::pytest.PytestWarning", "-c", script]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


def test_without_a_compiler_every_kernel_runs_eagerly_after_a_warning_of_its_own(tmp_path):
    environment = os.environ | {"CXX": str(tmp_path / "no-such-compiler"), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-c", SCRIPT]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split() == ["encode_with_sums", "backward_with_codes", "backward"]
