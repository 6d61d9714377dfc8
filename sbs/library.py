"""Kernels for the CPU compiled ahead of time: a shared library for each kind of operand, made once a machine.

torch.compile would do, but each process that uses it imports the compiler and traces again (4 s of CPU), and each call
checks its guards (50 us, where a small layer's arithmetic takes less). A library of AOTInductor loads in 2 ms and takes
5 us a call. They lie in TORCHINDUCTOR_CACHE_DIR, or in a folder of the user's own among the temporary files.
"""

import fcntl
import functools
import hashlib
import os
import platform
import shutil
import stat
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sbs import kernels
from sbs.errors import SbsError
from sbs.kernels import Form, Operand

# Most of the time goes into the code around the kernel, which is called 5 us faster when optimised but takes a third
# longer to compile.
_OPTIONS: dict[str, Any] = {"aot_inductor.compile_wrapper_opt_level": "O0"}
LOCK_LIMIT_S = 300.0
"""How long to wait for another process that makes the same library: some times what it takes on a busy machine."""


def kernel(
    function: Callable[..., Any], operand: Operand, form: Form, args: tuple[Any, ...], options: Mapping[str, Any]
) -> Callable[..., Any]:
    """`function` of `sbs.kernels` for operands of this kind: types and sizes of 1 as here, all other sizes free.

    Compiles a library unless there is a sound one; other processes that want the same wait for it. Raises what a
    missing or broken compiler raises, OSError for a folder that is of no use, TimeoutError after LOCK_LIMIT_S.
    """
    statics = tuple(arg for arg in args if not isinstance(arg, Tensor))
    tensors = _tensors(operand, args)
    kinds = [(str(t.dtype), [1 if size == 1 else 0 for size in t.shape], t.is_contiguous()) for t in tensors]
    options = _OPTIONS | dict(options)
    # the cache of precompiled headers hashes with this program, and fails without it
    options["aot_inductor.precompile_headers"] = shutil.which("openssl") is not None
    path = folder() / f"{function.__name__}-{_digest(form, statics, kinds, operand.gate is None, options)}.so"
    if not _is_sound(path):
        with _locked(path.with_suffix(".lock")):
            if not _is_sound(path):
                _build(_Call(function, form, statics, operand.gate is not None), tensors, path, options)
    run = torch._C._aoti.AOTIModelContainerRunnerCpu(str(path), 1).run  # noqa: SLF001 - the public loader imports the compiler
    shaped = _SHAPES[function]

    def call(operand: Operand, form: Form, *args: Any) -> Any:  # noqa: ARG001 - the library is made for this form
        return shaped(run(_tensors(operand, args)))

    return call


def _tensors(operand: Operand, args: tuple[Any, ...]) -> list[Tensor]:
    return [each for each in (*operand, *args) if isinstance(each, Tensor)]


_SHAPES: dict[Callable[..., Any], Callable[[list[Tensor]], Any]] = {
    kernels.encode: lambda found: found[0],
    kernels.encode_with_check: tuple,
    kernels.encode_with_sums: tuple,
    kernels.residual_sums: lambda found: found[0],
    kernels.backward: tuple,
    kernels.backward_with_codes: lambda found: (tuple(found[:4]), found[4]),
}
"""From a library's flat list to what the kernel returns."""


class _Call(nn.Module):
    """A kernel as torch.export takes it: tensors are inputs, all else is fixed."""

    def __init__(self, function: Callable[..., Any], form: Form, statics: tuple[Any, ...], gated: bool) -> None:
        super().__init__()
        self.function, self.form, self.statics, self.gated = function, form, statics, gated

    def forward(self, *tensors: Tensor) -> Any:
        """The kernel's results."""
        x, *rest = tensors
        gate = rest.pop(0) if self.gated else None
        shift, scale, levels, *more = rest
        return self.function(Operand(x, gate, shift, scale, levels), self.form, *more, *self.statics)


def _build(call: _Call, tensors: list[Tensor], path: Path, options: dict[str, Any]) -> None:
    # x, the gate and the gradient share their sizes, of which those that are 1 stay so; all else is as large as here
    sized = {0, 1 if call.gated else 0, 5 if call.gated else 4}
    names = [torch.export.Dim(f"size{axis}", min=2) for axis in range(tensors[0].dim())]
    shapes = tuple(
        {axis: names[axis] for axis in range(t.dim()) if t.shape[axis] > 1} if index in sized else None
        for index, t in enumerate(tensors)
    )
    like = tuple(_example(t) if index in sized else t for index, t in enumerate(tensors))
    work = path.with_suffix(".build")
    shutil.rmtree(work, ignore_errors=True)  # of a process that was killed over it
    work.mkdir()
    try:
        _compile(call, like, shapes, work, options).replace(path)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _compile(
    call: _Call, like: tuple[Tensor, ...], shapes: tuple[Any, ...], work: Path, options: dict[str, Any]
) -> Path:
    """The library, its digest at its end, safely on the disk."""
    from torch._inductor import aot_compile

    with (
        warnings.catch_warnings(),
        torch.no_grad(),
        torch.autocast("cpu", enabled=False),
    ):
        warnings.simplefilter("ignore")  # of torch's own deprecated calls
        program = torch.export.export(call, like, dynamic_shapes=(shapes,))
        module = program.module(check_guards=False)
        made = Path(str(aot_compile(module, like, options=options | {"aot_inductor.output_path": f"{work}/kernel.so"})))
    with made.open("rb+") as file:
        digest = hashlib.sha256(file.read()).digest()
        file.write(digest)
        file.flush()
        os.fsync(file.fileno())
    return made


def _is_sound(path: Path) -> bool:
    """Whether the library is there and ends with its own digest: loading a damaged one would end the process."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return False
    size = hashlib.sha256().digest_size
    return hashlib.sha256(content[:-size]).digest() == content[-size:]


def _example(tensor: Tensor) -> Tensor:
    """A tensor of the same kind whose sizes are unlike each other, large enough for the compiler to take pains."""
    sizes = [1 if size == 1 else 32 << axis for axis, size in enumerate(tensor.shape)]
    if tensor.is_contiguous():
        return torch.zeros(sizes, dtype=tensor.dtype)
    outer, channels, inner = sizes
    return torch.zeros(outer, inner, channels, dtype=tensor.dtype).transpose(1, 2)


def folder() -> Path:
    """Where libraries lie, made if need be; raises SbsError where another user could put some there."""
    base = os.environ.get("TORCHINDUCTOR_CACHE_DIR")
    path = Path(base, "sbs") if base else Path(tempfile.gettempdir(), f"sbs_kernels_{os.getuid()}")
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    status = path.lstat()  # not of what a link points to, which the link's owner can change
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid() or status.st_mode & 0o022:
        raise SbsError(
            f"{path} is not a folder that you alone can write; remove it, or set TORCHINDUCTOR_CACHE_DIR to another "
            "folder"
        )
    return path


def _digest(*kind: object) -> str:
    """What a library depends on beyond its kernel's name: kind of operand, options, code, torch, threads, this CPU."""
    described = (*kind, torch.get_num_threads(), _machine())
    return hashlib.sha256(repr(described).encode()).hexdigest()[:24]


@functools.cache
def _machine() -> tuple[str, ...]:
    """The compiler builds for the CPU that it runs on, and homes are shared by machines that differ."""
    information = Path("/proc/cpuinfo")
    lines = information.read_text().splitlines() if information.exists() else [platform.processor()]
    cpu = sorted({line for line in lines if line.startswith(("model name", "flags", "Features", "CPU part"))})
    return (
        torch.__version__,
        *platform.libc_ver(),
        *_SOURCES,
        platform.machine(),
        torch.backends.cpu.get_cpu_capability(),
        *cpu,
    )


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Alone among all processes; a bounded wait, as a stopped process, or one forked meanwhile, can hold the lock."""
    deadline = time.monotonic() + LOCK_LIMIT_S
    with path.open("w") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() >= deadline:
                    raise TimeoutError(f"another process has held {path} for {LOCK_LIMIT_S:.0f} s") from None
                time.sleep(0.05)
        try:
            yield
        finally:
            fcntl.flock(file, fcntl.LOCK_UN)  # closing alone would leave it to a process forked meanwhile


# as they were imported: read later, an edited file would name a library of the old code after the new one
_SOURCES = tuple(str(sys.modules[name].__loader__.get_source(name)) for name in (kernels.__name__, __name__))  # type: ignore[union-attr]
