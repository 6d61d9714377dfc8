"""A kernel through torch's compiler: machine code, and the few lines of Python that call it.

AOTInductor, torch's own road to a library, wraps every kernel in so much C++ that compiling that takes five times as
long as the kernel. What torch.compile makes has a plan in Python instead, which allocates the results and calls the
kernel. Its first lines import the compiler (2 s); the rest needs but the names below.
"""

import functools
import math
import os
import shutil
import warnings
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from importlib.machinery import ExtensionFileLoader
from importlib.util import module_from_spec, spec_from_loader
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

_POINTERS = "_TORCHINDUCTOR_PYOBJECT_TENSOR_DATA_PTR"
# One kernel at a time, in this process, and no cache of graphs: the library is what is kept.
_OPTIONS = {"cpp_wrapper": False, "fx_graph_cache": False, "compile_threads": 1, "graph_partition": False}
_LEAST_KERNEL = '#include <torch/csrc/inductor/cpp_prefix.h>\nextern "C" void kernel(float*) {}\n'
# the last line of a plan's imports
_IMPORTED = "async_compile = AsyncCompile()\n"


class Library(NamedTuple):
    """code: a shared library with one kernel. plan: Python with a function `call`, which takes a list of tensors."""

    code: bytes
    plan: bytes


def compile_kernel(function: Callable[..., Any], example: tuple[Tensor, ...], options: Mapping[str, Any]) -> Library:
    """`function` of tensors for tensors of these types and orders in memory; sizes of 1 stay so, all others are free.

    Sizes that are equal in the example are equal for good. The results are flat, None among them. Raises what a missing
    or broken compiler raises, ValueError where torch's compiler writes something else than one kernel and its plan.
    """
    precompiled = _headers()
    # after the thread was started, as it takes a while
    from torch._inductor import config
    from torch._inductor.compile_fx import compile_fx_inner
    from torch._inductor.decomposition import select_decomp_table
    from torch._inductor.virtualized import V
    from torch.fx.experimental.proxy_tensor import make_fx

    def flat(*tensors: Tensor) -> list[Any]:
        return _leaves(function(*tensors))

    with warnings.catch_warnings(), torch.no_grad(), torch.autocast("cpu", enabled=False):
        warnings.simplefilter("ignore")  # of torch's own deprecated calls
        graph = make_fx(flat, select_decomp_table(), tracing_mode="symbolic")(*example)
        inputs = [node.meta["val"] for node in graph.graph.find_nodes(op="placeholder")]
        with (
            V.set_fake_mode(inputs[0].fake_mode),
            config.patch(_OPTIONS | dict(options) | {"cpp_cache_precompile_headers": _succeeded(precompiled)}),
        ):
            made: Any = compile_fx_inner(graph, inputs, is_inference=True)
    _, imported, plan = made.source_code.partition(_IMPORTED)
    names = made.current_callable.__globals__
    files = [Path(kernel.__self__.__file__) for kernel in names.values() if getattr(kernel, "__name__", "") == "kernel"]
    if len(files) != 1 or not imported:
        raise ValueError(f"torch {torch.__version__} compiled to {len(files)} kernels in an unknown form")
    return Library(files[0].read_bytes(), plan.encode())


def _leaves(results: Any) -> list[Any]:
    return [leaf for each in results for leaf in _leaves(each)] if isinstance(results, tuple) else [results]


@functools.cache
def _headers() -> Future[object]:
    """Done once the C++ headers of all kernels are precompiled; never, where they cannot be.

    They take longer than some kernels, which are compiled meanwhile, slowly.
    """
    if shutil.which("openssl") is None:  # which torch's cache of headers wants
        return Future()
    from torch._inductor.codecache import CppPythonBindingsCodeCache

    side = ThreadPoolExecutor(1)
    future = side.submit(CppPythonBindingsCodeCache.load_pybinding, ["float*"], _LEAST_KERNEL)
    side.shutdown(wait=False)
    return future


def _succeeded(future: Future[object]) -> bool:
    return future.done() and future.exception() is None


def load(path: Path, plan: bytes) -> Callable[[list[Tensor]], tuple[Any, ...]]:
    """The plan's function, with the kernel of the library at `path` (what follows the library there does not matter).

    The function empties the list that it is given.
    """
    guards: Any = torch._C._dynamo.guards  # noqa: SLF001 - as in torch's own plans
    names: dict[str, Any] = {
        "async_compile": _Loader(path),
        "torch": torch,
        "math": math,
        "inf": math.inf,
        "nan": math.nan,
        "assert_size_stride": guards.assert_size_stride,
        "empty_strided_cpu": guards._empty_strided_cpu,  # noqa: SLF001
        "reinterpret_tensor": guards._reinterpret_tensor,  # noqa: SLF001
    }
    exec(compile(plan, str(path), "exec"), names)  # noqa: S102 - as trusted as the machine code beside it
    call: Callable[[list[Tensor]], tuple[Any, ...]] = names["call"]
    return call


class _Loader:
    """Stands in a plan for torch's own, which would compile: takes the kernel from the library."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def cpp_pybinding(self, types: list[str], source: str) -> Callable[..., None]:  # noqa: ARG002 - compiled already
        """The library's only function."""
        # where the library asks for torch's function that finds a tensor's memory
        os.environ[_POINTERS] = str(torch._C._dynamo.guards._torchinductor_pyobject_tensor_data_ptr)  # type: ignore[attr-defined]  # noqa: SLF001
        loader = ExtensionFileLoader(f"{__name__}.{self._path.stem}.kernel", str(self._path))
        spec = spec_from_loader(loader.name, loader)
        assert spec is not None
        module = module_from_spec(spec)
        loader.exec_module(module)
        kernel: Callable[..., None] = module.kernel
        return kernel

    def wait(self, names: dict[str, Any]) -> None:
        """Nothing is under way."""
