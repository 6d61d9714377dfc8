"""A recorder of what would make a host wait for a GPU, for steps that run on the CPU."""

import traceback
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

ROOT = str(Path(__file__).parents[3])
# What gives the host a number or a size; `lift_fresh` is the host's own data on the way to the device.
READS = {
    "_local_scalar_dense", "item", "equal", "is_nonzero", "nonzero", "masked_select", "_unique2", "unique_dim",
    "unique_consecutive", "bincount", "histc", "repeat_interleave", "lift_fresh",
}  # fmt: skip
MASKED = {"index", "index_put_", "index_put", "_index_put_impl_"}


class HostReads(TorchDispatchMode):
    """`found`: what was read, and the line of the project that did."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def note(self, what: str) -> None:
        stack = [f for f in traceback.extract_stack() if f.filename.startswith(ROOT) and f.filename != __file__]
        lines = [frame for frame in stack if "/.venv/" not in frame.filename]
        ours = [f for f in lines if "/tests/" not in f.filename] or lines
        self.found.append(f"{what} at {Path(ours[-1].filename).relative_to(ROOT)}:{ours[-1].lineno}")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name.removeprefix("aten::")
        masks = name in MASKED and any(
            isinstance(index, Tensor) and index.dtype in {torch.bool, torch.uint8} for index in args[1]
        )
        away = name == "_to_copy" and kwargs.get("device") not in {None, args[0].device}
        between = name == "copy_" and args[0].device != args[1].device
        if (name in READS and func._overloadname != "self_int") or masks or away or between:
            self.note(name)
        return func(*args, **kwargs)


@contextmanager
def host_reads() -> Iterator[list[str]]:
    """The list of reads while inside. On the CPU some of them leave no trace in the dispatcher: those are wrapped."""
    mode = HostReads()

    def watched(name: str) -> Callable[..., Any]:
        original = getattr(Tensor, name)

        def method(self: Tensor, *args: Any, **kwargs: Any) -> Any:
            if name != "to" or "cpu" in args:
                mode.note(name)
            return original(self, *args, **kwargs)

        return method

    with ExitStack() as stack:
        for name in ("cpu", "numpy", "tolist", "to"):
            stack.enter_context(patch.object(Tensor, name, watched(name)))
        stack.enter_context(mode)
        yield mode.found
