"""How numbers are computed: threads, determinism and rounding as the recipe says, whatever a launcher left behind."""

import contextlib
import ctypes
import functools
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import torch
import torch.utils.deterministic

from harness.config import RunConfig

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3


@contextmanager
def arithmetic(run: RunConfig) -> Iterator[None]:
    """Compute as `run` says while inside; what was set before is set again after."""
    with ExitStack() as stack:
        stack.callback(torch.set_num_threads, torch.get_num_threads())
        torch.set_num_threads(run.threads)
        # "warn": a few CUDA kernels have no deterministic form; bit-exact resume is promised on CPU. This call, unlike
        # use_deterministic_algorithms, does not import the compiler.
        stack.callback(torch.set_deterministic_debug_mode, torch.get_deterministic_debug_mode())
        torch.set_deterministic_debug_mode("warn" if run.deterministic else "default")
        _put(stack, torch.utils.deterministic, "fill_uninitialized_memory", value=False)
        _put(stack, torch.backends.cudnn, "benchmark", value=not run.deterministic)
        if run.gpus_per_worker:
            _on_gpus(run, stack)
        else:
            _keep_memory()
        stack.enter_context(warnings.catch_warnings())
        # Of 1x1 convolutions in channels_last, whose strides are ambiguous; nothing is lost.
        warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")
        yield


def autocast(run: RunConfig, device: torch.device) -> AbstractContextManager[Any]:
    """The arithmetic that run.precision asks for."""
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(run.precision)
    return nullcontext() if dtype is None else torch.autocast(device.type, dtype)


def _on_gpus(run: RunConfig, stack: ExitStack) -> None:
    """fp32 means all 24 bits, in convolutions, too, where cuDNN would take 11 (TF32) unless told otherwise.

    A matrix product that is split along its sum keeps its parts in float32 in any precision: those of integer codes are
    exact there, and not in 16 bits.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    rounded = run.precision != "fp32"
    stack.callback(torch.set_float32_matmul_precision, torch.get_float32_matmul_precision())
    torch.set_float32_matmul_precision("high" if rounded else "highest")
    _put(stack, torch.backends.cudnn, "allow_tf32", value=rounded)
    _put(stack, torch.backends.cuda.matmul, "allow_bf16_reduced_precision_reduction", value=False)
    _put(stack, torch.backends.cuda.matmul, "allow_fp16_reduced_precision_reduction", value=False)
    if run.deterministic:
        _fix_compiler(stack)


def _fix_compiler(stack: ExitStack) -> None:
    """Let the compiler choose kernels by rule, not by timing them, which adds up in another order on another day."""
    compiler = sys.modules.get("torch._inductor.config")
    if compiler is not None:
        if hasattr(compiler, "deterministic"):
            _put(stack, compiler, "deterministic", value=True)
        return
    # read when the compiler is imported, which takes a second and a half and may not be needed
    former = os.environ.get("TORCHINDUCTOR_DETERMINISTIC")
    os.environ["TORCHINDUCTOR_DETERMINISTIC"] = "1"
    stack.callback(_give_back, "TORCHINDUCTOR_DETERMINISTIC", former)


def _give_back(variable: str, former: str | None) -> None:
    if former is None:
        os.environ.pop(variable, None)
        compiler: Any = sys.modules.get("torch._inductor.config")
        if compiler is not None and hasattr(compiler, "deterministic"):
            compiler.deterministic = False
    else:
        os.environ[variable] = former


def _put(stack: ExitStack, owner: Any, name: str, *, value: bool) -> None:
    stack.callback(setattr, owner, name, getattr(owner, name))
    setattr(owner, name, value)


@functools.cache
def _keep_memory() -> None:
    """Let glibc keep large freed blocks: giving each activation back to the kernel costs a sixth of a CPU step."""
    with contextlib.suppress(OSError, AttributeError):  # another C library than glibc
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(_M_MMAP_THRESHOLD, 1 << 30)
        libc.mallopt(_M_TRIM_THRESHOLD, (1 << 31) - 1)
