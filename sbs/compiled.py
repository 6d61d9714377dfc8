"""The kernels of `sbs.kernels`, compiled at first use: for the CPU to a library (`sbs.library`), for CUDA by Triton.

On other devices they run eagerly; so does, after a warning, a kernel that cannot be compiled. Functions of all weights
at once (`sbs.weights`) have kernels of their own for CUDA alone.
"""

import functools
import importlib
import warnings
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from sbs import kernels, library
from sbs.kernels import Form, Operand

Kernel = Callable[..., Any]

# Compiled division is approximate unless asked otherwise. A quotient that is a bit off can round to the next code, and
# small weights are encoded by eager code (weights.py): all must divide alike.
_OPTIONS = {"eager_numerics.division_rounding": True}
# Loops of the backward pass nested as the code has its axes, also where memory has another order: only then does the
# compiler write what is element-wise and what is summed per channel as one loop over the tensor, and not as two.
_ONE_LOOP = {"pick_loop_orders": False}
_ONE_WIDTH = (1,)
# up to as many elements, a layer at one width (most are a network's first and last) is not worth two or three kernels
# of its own: eagerly it takes 0.2 ms longer, compiling one 2 s
_FEW = 2**13
# of the device, and not of what was compiled for it
_NOT_OURS = (torch.OutOfMemoryError, torch.AcceleratorError)


class _Fallible:
    """A function that has a faster form, and does without it for good if that fails."""

    enabled = True

    def __init__(self, function: Kernel) -> None:
        self.eager = function
        self.name: str = function.__name__
        self.failure: str | None = None

    def give_up(self, error: Exception) -> Kernel:
        """Warn, and run eagerly from here on."""
        first, *others = (str(error).strip() or type(error).__name__).splitlines()
        # a compiler's errors start with its command, and end with what is the matter
        self.failure = f"{first}: {others[-1]}" if others and "Cpp" in type(error).__name__ else first
        warnings.warn(
            f"SBS kernel {self.name} runs uncompiled, and slower: compiling it failed ({self.failure})", stacklevel=4
        )
        return self.eager

    def retry(self) -> None:
        """Forget that it failed."""
        self.failure = None


class _Compiled(_Fallible):
    """A kernel that compiles itself for each kind of operand."""

    def __init__(
        self, function: Kernel, cpu_options: Mapping[str, bool] = MappingProxyType({}), *, reads_grid: bool = True
    ) -> None:
        super().__init__(function)
        self.reads_grid = reads_grid
        self.cpu_options = _OPTIONS | dict(cpu_options)
        self.made: dict[tuple[object, ...], Kernel] = {}

    def __call__(self, operand: Operand, form: Form, *args: Any) -> Any:
        # a subclass (FakeTensor, say) may have no memory that a compiled kernel could read
        if self.failure is not None or not _Fallible.enabled or type(operand.x) is not Tensor:
            return self.eager(operand, form, *args)
        road = _ROADS.get(operand.x.device.type)
        if road is None or torch.compiler.is_compiling():
            return self.eager(operand, form, *args)
        return road(self, operand, form, args)

    def retry(self) -> None:
        """Forget that it failed, and what was made until then."""
        if self.failure is not None:
            super().retry()
            self.made.clear()


class _Grouped(_Fallible):
    """A function of all weights of a network, the first argument a sequence of them: a launch or two on CUDA.

    Its kernels return None for what they do not compute.
    """

    def __init__(self, function: Kernel) -> None:
        super().__init__(function)
        self.kernel = self.name.lstrip("_")
        self.name = f"{self.kernel} of all weights"

    def __call__(self, weights: Sequence[Tensor], *args: Any) -> Any:
        found = None
        if self.failure is None and _Fallible.enabled and weights and not torch.compiler.is_compiling():
            device = weights[0].device
            road = _GROUPED_ROADS.get(device.type)
            own = [w.detach() for w in weights] if road else []
            if road and all(type(w) is Tensor and w.device == device for w in own):
                found = road(self, own, args)
        return self.eager(weights, *args) if found is None else found


def _groups_by_triton(function: _Grouped, weights: Sequence[Tensor], args: tuple[Any, ...]) -> Any:
    """The function for CUDA."""
    try:
        return _triton("triton_groups")[function.kernel](weights, *args)
    except _NOT_OURS:
        raise
    except Exception as error:  # noqa: BLE001 - as in _by_triton
        return function.give_up(error)(weights, *args)


def _by_library(kernel: _Compiled, operand: Operand, form: Form, args: tuple[Any, ...]) -> Any:
    """The kernel for the CPU."""
    if len(form.grid) == 1 and operand.x.numel() <= _FEW:
        return kernel.eager(operand, form, *args)
    if not kernel.reads_grid or len(form.grid) == 1:  # whose only entry is in levels as well
        form = form._replace(grid=_ONE_WIDTH)
    kind = _kind(operand, form, args)
    made = kernel.made.get(kind)
    if made is None:
        try:
            made = library.kernel(kernel.eager, operand, form, args, kernel.cpu_options)
        except Exception as error:  # noqa: BLE001 - a broken tool chain raises many types, none the caller's fault
            made = kernel.give_up(error)
        kernel.made[kind] = made
    return made(operand, form, *args)


def _by_triton(kernel: _Compiled, operand: Operand, form: Form, args: tuple[Any, ...]) -> Any:
    """The kernel for CUDA, which compiles itself when it is launched."""
    try:
        return _triton("triton_kernels")[kernel.name](operand, form, *args)
    except _NOT_OURS:
        raise
    except Exception as error:  # noqa: BLE001 - Triton missing, its compilers or the C compiler that it needs
        return kernel.give_up(error)(operand, form, *args)


@functools.cache
def _triton(module: str) -> Mapping[str, Kernel]:
    return vars(importlib.import_module(f"sbs.{module}"))  # a build of torch for the CPU comes without Triton


_ROADS: dict[str, Callable[[_Compiled, Operand, Form, tuple[Any, ...]], Any]] = {
    "cpu": _by_library,
    "cuda": _by_triton,
}
"""By type of device; kernels run eagerly on all others."""
_GROUPED_ROADS: dict[str, Callable[[_Grouped, Sequence[Tensor], tuple[Any, ...]], Any]] = {"cuda": _groups_by_triton}


def _kind(operand: Operand, form: Form, args: tuple[Any, ...]) -> tuple[object, ...]:
    """What a library is made for: types, order in memory, and which sizes are 1; all other sizes are free."""
    x, gate, shift, scale, levels = operand
    ones = tuple([size == 1 for size in x.shape])
    rest = [each.dtype if isinstance(each, Tensor) else each for each in args]
    gate_type = None if gate is None else gate.dtype
    return (form, x.dtype, ones, x.is_contiguous(), gate_type, shift.dtype, scale.dtype, levels.dtype, *rest)


encode = _Compiled(kernels.encode, reads_grid=False)
encode_with_check = _Compiled(kernels.encode_with_check, reads_grid=False)
encode_with_sums = _Compiled(kernels.encode_with_sums)
residual_sums = _Compiled(kernels.residual_sums)
backward = _Compiled(kernels.backward, _ONE_LOOP)
backward_with_codes = _Compiled(kernels.backward_with_codes, _ONE_LOOP)
_ALL: list[_Fallible] = [encode, encode_with_check, encode_with_sums, residual_sums, backward, backward_with_codes]


def grouped(function: Kernel) -> _Grouped:
    """`function`, by a grouped kernel of its name where there is one."""
    made = _Grouped(function)
    _ALL.append(made)
    return made


def use_compiled(enabled: bool) -> bool:
    """Switch compilation of the kernels on or off for this process; returns the former setting.

    Switched on, kernels that could not be compiled are tried again.
    """
    former = _Fallible.enabled
    _Fallible.enabled = enabled
    for kernel in _ALL if enabled else ():
        kernel.retry()
    return former


def failures() -> dict[str, str]:
    """Why a kernel could not be compiled, for each that now runs eagerly."""
    return {kernel.name: kernel.failure for kernel in _ALL if kernel.failure is not None}
