"""CIFAR-10 and CIFAR-100 from the official archives; their pickles are read without running what they might hold."""

import io
import pickle
import tarfile
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal, NoReturn

import numpy as np
from numpy._core.multiarray import _reconstruct
from numpy.typing import NDArray

from harness.data.manifest import Split
from harness.data.sources.base import Scan, SplitScan, checked
from harness.errors import UserError


@dataclass(frozen=True)
class _Layout:
    archive: str
    folder: str
    parts: Mapping[Split, tuple[str, ...]]
    labels: bytes
    meta: str
    names: bytes


_LAYOUTS = {
    "cifar10": _Layout(
        "cifar-10-python.tar.gz", "cifar-10-batches-py",
        {"train": tuple(f"data_batch_{k}" for k in range(1, 6)), "val": ("test_batch",)},
        b"labels", "batches.meta", b"label_names",
    ),
    "cifar100": _Layout(
        "cifar-100-python.tar.gz", "cifar-100-python", {"train": ("train",), "val": ("test",)},
        b"fine_labels", "meta", b"fine_label_names",
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Cifar:
    """A folder with the archive as it was downloaded, or as it was unpacked."""

    kind: Literal["cifar10", "cifar100"]
    root: Path
    small: bool = True

    @property
    def spec(self) -> str:
        """See `Source.spec`."""
        return f"{self.kind}:{self.root}"

    def scan(self) -> Scan:
        """See `Source.scan`; labels as they are numbered in the archive, which torchvision keeps."""
        names, images = _load(self.kind, self.root)
        splits = {
            split: SplitScan([(split, k) for k in range(len(labels))], labels) for split, (_, labels) in images.items()
        }
        return checked(self.spec, names, splits)

    def read(self, ref: tuple[Split, int]) -> NDArray[np.uint8]:
        """See `Source.read`."""
        split, number = ref
        return np.ascontiguousarray(_load(self.kind, self.root)[1][split][0][number].transpose(1, 2, 0))

    def describe(self, ref: tuple[Split, int]) -> str:
        """See `Source.describe`."""
        return f"{self.kind} {ref[0]} image number {ref[1]}"


_Images = dict[Split, tuple[NDArray[np.uint8], NDArray[np.int64]]]


@cache
def _load(kind: str, root: Path) -> tuple[tuple[str, ...], _Images]:
    layout = _LAYOUTS[kind]
    files = _files(kind, root)
    images: _Images = {}
    try:
        for split, parts in layout.parts.items():
            batches = [_unpickle(files[part], part) for part in parts]
            pixels = np.concatenate([np.asarray(batch[b"data"], np.uint8) for batch in batches]).reshape(-1, 3, 32, 32)
            labels = np.concatenate([np.asarray(batch[layout.labels], np.int64) for batch in batches])
            if len(pixels) != len(labels):
                raise ValueError(f"{split} has {len(pixels)} images and {len(labels)} labels")
            images[split] = (pixels, labels)
        names = tuple(name.decode() for name in _unpickle(files[layout.meta], layout.meta)[layout.names])
    except (KeyError, ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{kind}:{root}: the archive is not {kind}'s: {type(error).__name__} {error}") from None
    return names, images


def _files(kind: str, root: Path) -> dict[str, bytes]:
    """Content of the archive's files by name."""
    layout = _LAYOUTS[kind]
    folder = root if root.name == layout.folder else root / layout.folder
    try:
        if folder.is_dir():
            return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.is_file()}
        if (root / layout.archive).is_file():
            with tarfile.open(root / layout.archive) as archive:
                members = [member for member in archive.getmembers() if member.isfile()]
                return {Path(m.name).name: file.read() for m in members if (file := archive.extractfile(m)) is not None}
    except (OSError, EOFError, tarfile.TarError) as error:
        raise UserError(f"{kind}:{root}: cannot read the archive: {error}") from None
    raise UserError(f"{kind}:{root}: found neither {root / layout.archive} nor the folder {folder}")


def _latin1(text: str, encoding: str) -> bytes:
    """How Python 3 writes byte strings into old pickles."""
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"it wants to encode text as {encoding}")
    return text.encode("latin1")


class _Unpickler(pickle.Unpickler):
    """Knows numpy arrays and byte strings, and nothing else."""

    _ALLOWED: Mapping[tuple[str, str], Any] = {
        ("numpy.core.multiarray", "_reconstruct"): _reconstruct,
        ("numpy._core.multiarray", "_reconstruct"): _reconstruct,
        ("numpy", "ndarray"): np.ndarray,
        ("numpy", "dtype"): np.dtype,
        ("_codecs", "encode"): _latin1,
    }

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in self._ALLOWED:
            return self._ALLOWED[module, name]
        raise pickle.UnpicklingError(f"it wants to run {module}.{name}")

    def persistent_load(self, pid: Any) -> NoReturn:  # noqa: ARG002 - pickle's hook
        raise pickle.UnpicklingError("it refers to something outside itself")


def _unpickle(content: bytes, name: str) -> Any:
    try:
        return _Unpickler(io.BytesIO(content), encoding="bytes").load()
    except (pickle.UnpicklingError, EOFError, ImportError) as error:
        raise UserError(f"the pickle {name} was refused, it is not plain data: {error}") from None
