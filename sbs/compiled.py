"""The kernels of `sbs.kernels`, compiled at first use: on the CPU to a library (`sbs.library`), else by torch.compile.

Where no compiler is at hand they run eagerly, after one warning.
"""

import warnings
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from sbs import kernels, library
from sbs.kernels import Form, Operand

Kernel = Callable[..., Any]

# On a GPU compiled division is approximate unless asked otherwise. A quotient that is a bit off can round to the next
# code, and small weights are encoded by eager code (weights.py): all must divide alike.
_OPTIONS = {"eager_numerics.division_rounding": True}
# Loops of the backward pass nested as the code has its axes, also where memory has another order: only then does the
# compiler write what is element-wise and what is summed per channel as one loop over the tensor, and not as two.
_ONE_LOOP = {"pick_loop_orders": False}
# forms x types x devices: far more than any one run needs, so that none ends in the eager fallback
_GRAPHS = 64
_ONE_WIDTH = (1,)
# up to as many elements, a layer at one width (most are a network's first and last) is not worth two or three kernels
# of its own: eagerly it takes 0.2 ms longer, compiling one 2 s
_FEW = 2**13


class _Compiled:
    """A kernel that compiles itself for each kind of operand and falls back to eager for good if that fails."""

    enabled = True
    _warned = False

    def __init__(
        self, function: Kernel, cpu_options: Mapping[str, bool] = MappingProxyType({}), *, reads_grid: bool = True
    ) -> None:
        self.eager = function
        self._reads_grid = reads_grid
        self._cpu_options = _OPTIONS | dict(cpu_options)
        self._made: dict[tuple[object, ...], Kernel] = {}

    def __call__(self, operand: Operand, form: Form, *args: Any) -> Any:
        # a subclass (FakeTensor, say) may have no memory that a library could read
        if not _Compiled.enabled or torch.compiler.is_compiling() or type(operand.x) is not Tensor:
            return self.eager(operand, form, *args)
        if len(form.grid) == 1 and operand.x.numel() <= _FEW:
            return self.eager(operand, form, *args)
        if not self._reads_grid or len(form.grid) == 1:  # whose only entry is in levels as well
            form = form._replace(grid=_ONE_WIDTH)
        kind = _kind(operand, form, args)
        made = self._made.get(kind)
        if made is None:
            made = self._make(operand, form, args)
            self._made[kind] = made
        try:
            return made(operand, form, *args)
        except Exception as error:
            if "torch._" not in type(error).__module__:  # of torch.compile, which starts to compile when called
                raise
            return self._give_up(error)(operand, form, *args)

    def _make(self, operand: Operand, form: Form, args: tuple[Any, ...]) -> Kernel:
        try:
            if operand.x.device.type == "cpu":
                return library.kernel(self.eager, operand, form, args, self._cpu_options)
            limits = {"recompile_limit": _GRAPHS, "isolate_recompiles": True}
            made: Kernel = torch.compile(self.eager, dynamic=True, fullgraph=True, options=_OPTIONS.copy(), **limits)  # type: ignore[call-overload]
        except Exception as error:  # noqa: BLE001 - a broken tool chain raises many types, none of them the caller's fault
            return self._give_up(error)
        return made

    def _give_up(self, error: Exception) -> Kernel:
        _Compiled.enabled = False
        if not _Compiled._warned:
            _Compiled._warned = True
            first, *others = (str(error).strip() or type(error).__name__).splitlines()
            # a compiler's errors start with its command, and end with what is the matter
            reason = f"{first}: {others[-1]}" if others and "Cpp" in type(error).__name__ else first
            warnings.warn(f"SBS kernels run uncompiled, and slower: compiling them failed ({reason})", stacklevel=4)
        return self.eager


def _kind(operand: Operand, form: Form, args: tuple[Any, ...]) -> tuple[object, ...]:
    """What a compiled kernel is made for: types, order in memory, and which sizes are 1; all other sizes are free."""
    x, gate, shift, scale, levels = operand
    ones = tuple([size == 1 for size in x.shape])
    rest = [each.dtype if isinstance(each, Tensor) else each for each in args]
    gate_type = None if gate is None else gate.dtype
    return (
        form,
        x.device.type,
        x.dtype,
        ones,
        x.is_contiguous(),
        gate_type,
        shift.dtype,
        scale.dtype,
        levels.dtype,
        *rest,
    )


def use_compiled(enabled: bool) -> bool:
    """Switch compilation of the kernels on or off for this process; returns the former setting."""
    former = _Compiled.enabled
    _Compiled.enabled = enabled
    return former


encode = _Compiled(kernels.encode, reads_grid=False)
encode_with_check = _Compiled(kernels.encode_with_check, reads_grid=False)
encode_with_sums = _Compiled(kernels.encode_with_sums)
residual_sums = _Compiled(kernels.residual_sums)
backward = _Compiled(kernels.backward, _ONE_LOOP)
backward_with_codes = _Compiled(kernels.backward_with_codes, _ONE_LOOP)
