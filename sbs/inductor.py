"""A kernel through torch's compiler, Inductor: machine code, and the few lines of Python that call it.

AOTInductor, torch's own road to a library, writes so much C++ around a kernel that both take 8 s to compile where the
kernel takes 2. What torch.compile makes has a plan in Python around it instead, which allocates the results and calls
the kernel. Its first lines import the compiler (3 s) and are cut off; what the rest needs of them is in `load`.
"""

import functools
import math
import os
import shutil
import stat
import tempfile
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from importlib.machinery import ExtensionFileLoader
from importlib.util import module_from_spec, spec_from_loader
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

CACHE = "TORCHINDUCTOR_CACHE_DIR"
"""Names torch's folder for what it compiles; torch sets it to its own default as soon as it compiles something."""
_POINTERS = "_TORCHINDUCTOR_PYOBJECT_TENSOR_DATA_PTR"
# Whatever a user prefers: a plan in Python, of one piece, whose kernel is compiled here and now, and computes the codes
# that eager code does. Libraries outlive the process that made them.
_OPTIONS = {
    "cpp_wrapper": False,
    "graph_partition": False,
    "fx_graph_cache": False,
    "compile_threads": 1,
    "cpu_backend": "cpp",
    "memory_planning": False,
    "cpp.enable_floating_point_contract_flag": "off",
    "cpp.enable_unsafe_math_opt_flag": False,
}
_LEAST_KERNEL = '#include <torch/csrc/inductor/cpp_prefix.h>\nextern "C" void kernel(float*) {}\n'
# the last of a plan's lines that are cut off
_IMPORTED = "async_compile = AsyncCompile()\n"
# tracing patches torch for all threads
_ALONE = threading.Lock()


class Library(NamedTuple):
    """code: a shared library with one kernel. plan: Python with a function `call`, which takes a list of tensors."""

    code: bytes
    plan: bytes


def compile_kernel(function: Callable[..., Any], example: tuple[Tensor, ...], options: Mapping[str, Any]) -> Library:
    """`function` of tensors for tensors of these types and orders in memory; sizes of 1 stay so, all others are free.

    Sizes that are equal in the example are equal for good. The results are flat, None among them. Raises what a missing
    or broken compiler raises, ValueError where torch's compiler writes something else than one kernel and its plan.
    """

    def flat(*tensors: Tensor) -> list[Any]:
        return _leaves(function(*tensors))

    with _ALONE, warnings.catch_warnings(action="ignore"), _private_cache():  # torch warns of its own deprecated calls
        precompiled = _headers()
        # these take a while, in which the thread of the headers gets on
        from torch._inductor import config
        from torch._inductor.compile_fx import compile_fx_inner
        from torch._inductor.decomposition import select_decomp_table
        from torch._inductor.virtualized import V
        from torch.fx.experimental.proxy_tensor import make_fx

        with torch.no_grad(), torch.autocast("cpu", enabled=False):
            graph = make_fx(flat, select_decomp_table(), tracing_mode="symbolic")(*example)
            inputs = [node.meta["val"] for node in graph.graph.find_nodes(op="placeholder")]
            headers = {"cpp_cache_precompile_headers": _succeeded(precompiled)}
            with V.set_fake_mode(inputs[0].fake_mode), config.patch(_OPTIONS | dict(options) | headers):
                made: Any = compile_fx_inner(graph, inputs, is_inference=True)
        _, imported, plan = made.source_code.partition(_IMPORTED)
        names = made.current_callable.__globals__
        files = [Path(each.__self__.__file__) for each in names.values() if getattr(each, "__name__", "") == "kernel"]
        if len(files) != 1 or not imported:
            raise ValueError(f"torch {torch.__version__} compiled to {len(files)} kernels in an unknown form")
        return Library(files[0].read_bytes(), plan.encode())


def _leaves(results: Any) -> list[Any]:
    return [leaf for each in results for leaf in _leaves(each)] if isinstance(results, tuple) else [results]


@contextmanager
def _private_cache() -> Iterator[None]:
    """A region in which torch finds nothing in its own cache of machine code.

    That cache does not tell machines that share it apart, takes damaged files for sound ones, and by default lies where
    other users could have put it.
    """
    from torch._inductor.codecache import CppPythonBindingsCodeCache

    CppPythonBindingsCodeCache.cache_clear()  # nor what it remembers of files in folders that are gone
    former = os.environ.get(CACHE)
    with tempfile.TemporaryDirectory(prefix="sbs_compiling_", ignore_cleanup_errors=True) as folder:
        os.environ[CACHE] = folder
        try:
            yield
        finally:
            if former is None:
                del os.environ[CACHE]
            else:
                os.environ[CACHE] = former


@functools.cache
def _headers() -> Future[object]:
    """Done once the C++ headers of all kernels are precompiled, in a thread; never, where they cannot be.

    That takes ten seconds; until then kernels are compiled without, which takes each 2 s longer.
    """
    if shutil.which("openssl") is None:  # which torch's cache of headers wants
        return Future()
    from torch._inductor.codecache import CppPythonBindingsCodeCache
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir

    if not is_own(Path(default_cache_dir())):  # where headers lie, whatever the environment says
        return Future()
    side = ThreadPoolExecutor(1)
    # it precompiles at once what the kernel, which nobody asks for, would be compiled with
    future = side.submit(CppPythonBindingsCodeCache.load_pybinding_async, ["float*"], _LEAST_KERNEL)
    side.shutdown(wait=False)
    return future


def _succeeded(future: Future[object]) -> bool:
    return future.done() and future.exception() is None


def is_own(folder: Path) -> bool:
    """Whether nobody but this user can have written to a folder, which is made if need be."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    status = folder.lstat()  # not of what a link points to, which the link's owner can change
    return stat.S_ISDIR(status.st_mode) and status.st_uid == os.getuid() and not status.st_mode & 0o022


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
