"""Kernels for the CPU compiled ahead of time: a shared library for each kind of operand, made once a machine.

torch.compile would do, but each process that uses it imports the compiler and traces again (4 s of CPU), and each call
checks its guards (50 us, where a small layer's arithmetic takes less). A library loads in 2 ms and takes 5 to 15 us a
call. They lie in TORCHINDUCTOR_CACHE_DIR, or in a folder of the user's own among the temporary files.
"""

import fcntl
import functools
import hashlib
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sbs import inductor, kernels
from sbs.errors import SbsError
from sbs.kernels import Form, Operand

LOCK_LIMIT_S = 300.0
"""How long to wait for another process that makes the same library: some times what it takes on a busy machine."""
# as it was when this was imported: later it may be torch's
_GIVEN = os.environ.get(inductor.CACHE)
# a library's file: machine code, plan, the plan's length in bytes, digest of all that
_LENGTH, _DIGEST = 8, hashlib.sha256().digest_size


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
    path = folder() / f"{function.__name__}-{_digest(form, statics, kinds, operand.gate is None, dict(options))}.so"
    plan = _sound_plan(path)
    if plan is None:
        with _locked(path.with_suffix(".lock")):
            call = _Call(function, form, statics, gated=operand.gate is not None)
            plan = _sound_plan(path) or _build(call, tensors, path, options)
    loaded = inductor.load(path, plan)
    shaped = _SHAPES[function]

    def run(operand: Operand, form: Form, *args: Any) -> Any:  # noqa: ARG001 - the library is made for this form
        return shaped(loaded(_tensors(operand, args)))

    return run


def _tensors(operand: Operand, args: tuple[Any, ...]) -> list[Tensor]:
    return [each for each in (*operand, *args) if isinstance(each, Tensor)]


_SHAPES: dict[Callable[..., Any], Callable[[tuple[Any, ...]], Any]] = {
    kernels.encode: lambda found: found[0],
    kernels.encode_with_check: tuple,
    kernels.encode_with_sums: tuple,
    kernels.residual_sums: lambda found: found[0],
    kernels.backward: tuple,
    kernels.backward_with_codes: lambda found: (found[:4], found[4]),
}
"""From a library's flat list to what the kernel returns."""


@dataclass(frozen=True)
class _Call:
    """A kernel as a function of tensors alone; all else is fixed."""

    function: Callable[..., Any]
    form: Form
    statics: tuple[Any, ...]
    gated: bool

    def __call__(self, *tensors: Tensor) -> Any:
        """The kernel's results."""
        x, *rest = tensors
        gate = rest.pop(0) if self.gated else None
        shift, scale, levels, *more = rest
        return self.function(Operand(x, gate, shift, scale, levels), self.form, *more, *self.statics)


def _build(call: _Call, tensors: list[Tensor], path: Path, options: Mapping[str, Any]) -> bytes:
    """Compile the library and write it, whole or not at all; returns its plan."""
    # x, the gate and the gradient share their sizes; all else is as large as here
    sized = {0, 1 if call.gated else 0, 5 if call.gated else 4}
    like = tuple(_example(t) if index in sized else t.clone() for index, t in enumerate(tensors))
    code, plan = inductor.compile_kernel(call, like, options)
    content = code + plan + len(plan).to_bytes(_LENGTH, "little")
    made = path.with_suffix(".new")
    made.unlink(missing_ok=True)  # of a process that was killed over it
    with made.open("wb") as file:
        file.write(content + hashlib.sha256(content).digest())
        file.flush()
        os.fsync(file.fileno())
    inductor.load(made, plan)(list(like))  # raises here, and not in the midst of training, if anything is amiss
    made.replace(path)
    return plan


def _sound_plan(path: Path) -> bytes | None:
    """The plan of a library that is there and ends with its own digest: loading a damaged one would end the process."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return None
    content, digest = content[:-_DIGEST], content[-_DIGEST:]
    if hashlib.sha256(content).digest() != digest:
        return None
    content, length = content[:-_LENGTH], int.from_bytes(content[-_LENGTH:], "little")
    return content[-length:]


def _example(tensor: Tensor) -> Tensor:
    """A tensor of the same kind whose sizes are unlike each other, large enough for the compiler to take pains."""
    sizes = [1 if size == 1 else 32 << axis for axis, size in enumerate(tensor.shape)]
    if tensor.is_contiguous():
        return torch.zeros(sizes, dtype=tensor.dtype)
    outer, channels, inner = sizes
    return torch.zeros(outer, inner, channels, dtype=tensor.dtype).transpose(1, 2)


def folder() -> Path:
    """Where libraries lie, made if need be; raises SbsError where another user could put some there."""
    path = Path(_GIVEN, "sbs") if _GIVEN else Path(tempfile.gettempdir(), f"sbs_kernels_{os.getuid()}")
    if not inductor.is_own(path):
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
_SOURCES = tuple(
    str(sys.modules[name].__loader__.get_source(name))  # type: ignore[union-attr]
    for name in (kernels.__name__, inductor.__name__, __name__)
)
