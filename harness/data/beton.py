"""FFCV's file format, version 2, for the two fields `image` and `label`: its layout, a checked index, its writing.

    header 24 B | 2 field descriptors | one 24-byte record per sample | zeros to a page | pages of image bytes | table

Read and written here in numpy alone, so that files are checked before FFCV (which believes whatever it reads) opens
them, and so that a machine without FFCV can use and make them. No image crosses a page.
"""

import hashlib
import mmap
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from harness.errors import UserError, require_file

VERSION = 2
JPEG, RAW = 0, 1
MIN_PAGE_BYTES, MAX_PAGE_BYTES = 1 << 21, 1 << 31
MAX_SIDE = (1 << 16) - 1

HEADER = np.dtype(
    [("version", "<u2"), ("num_fields", "<u2"), ("page_size", "<u4"), ("num_samples", "<u8"), ("table", "<u8")],
    align=True,
)
FIELD = np.dtype([("type_id", "<u1"), ("name", "<u1", 16), ("arguments", "<u1", (1024,))], align=True)
IMAGE = np.dtype([("mode", "<u1"), ("width", "<u2"), ("height", "<u2"), ("offset", "<u8")])
SAMPLE = np.dtype([("", IMAGE), ("", "<i8")], align=True)
ALLOCATION = np.dtype([("sample", "<u8"), ("offset", "<u8"), ("size", "<u8")])
FIELDS = (("image", 2), ("label", 1))
SAMPLES_START = HEADER.itemsize + len(FIELDS) * FIELD.itemsize


class DamagedFileError(UserError):
    """A data set file that is not what its header, its tables or its manifest say."""


@dataclass(frozen=True)
class Index:
    """Where every image of a file lies: arrays over samples; offsets and sizes in bytes, sides in pixels."""

    path: Path
    labels: NDArray[np.int64]
    modes: NDArray[np.uint8]
    heights: NDArray[np.int32]
    widths: NDArray[np.int32]
    offsets: NDArray[np.int64]
    sizes: NDArray[np.int64]
    page_bytes: int
    pages_start: int
    pages_end: int

    def __len__(self) -> int:
        return len(self.labels)

    def common_shape(self) -> tuple[int, int] | None:
        """(height, width) if all images share one, else None."""
        same = np.ptp(self.heights) == 0 and np.ptp(self.widths) == 0
        return (int(self.heights[0]), int(self.widths[0])) if same else None


def page_align(offset: int, page_bytes: int) -> int:
    """The first page boundary at or after `offset`."""
    return -(-offset // page_bytes) * page_bytes


def read_index(path: Path) -> Index:
    """Read and check header, fields and tables; `DamagedFileError` says what is wrong with the file."""
    require_file(path, "data set file", "Write it with `python -m harness data write --source SOURCE --out DIR`.")
    file_bytes = path.stat().st_size
    with path.open("rb") as file:
        header = _read_header(file, path, file_bytes)
        count, page = int(header["num_samples"]), int(header["page_size"])
        samples_end = SAMPLES_START + count * SAMPLE.itemsize
        if samples_end > file_bytes:
            raise DamagedFileError(
                f"{path} is cut: its header promises {count} samples, whose records alone need {samples_end} bytes, "
                f"but the file has {file_bytes}"
            )
        samples = np.fromfile(file, SAMPLE, count)
        table = _read_table(file, path, file_bytes, int(header["table"]), count)
    image = samples["f0"]
    index = Index(
        path,
        samples["f1"].astype(np.int64),
        np.ascontiguousarray(image["mode"]),
        image["height"].astype(np.int32),
        image["width"].astype(np.int32),
        image["offset"].astype(np.int64),
        table["size"].astype(np.int64),
        page,
        page_align(samples_end, page) if count == 0 else int(table["offset"].min()) // page * page,
        int(header["table"]),
    )
    _check_allocations(index, table, samples_end)
    return index


def _read_header(file: BinaryIO, path: Path, file_bytes: int) -> np.void:
    if file_bytes == 0:
        raise DamagedFileError(f"{path} is empty (0 bytes)")
    if file_bytes < SAMPLES_START:
        raise DamagedFileError(f"{path} is cut inside its header: {file_bytes} bytes, {SAMPLES_START} at least")
    header: np.void = np.fromfile(file, HEADER, 1)[0]
    page = int(header["page_size"])
    if header["version"] != VERSION or page & (page - 1) or not MIN_PAGE_BYTES <= page <= MAX_PAGE_BYTES:
        raise DamagedFileError(
            f"{path} is not an FFCV file of version {VERSION}: version {header['version']}, pages of {page} bytes"
        )
    found = []
    if header["num_fields"] <= 16:
        fields = np.fromfile(file, FIELD, int(header["num_fields"]))
        found = [(bytes(f["name"]).split(b"\0")[0].decode("latin-1"), int(f["type_id"])) for f in fields]
    if found != list(FIELDS):
        names = ", ".join(name for name, _ in found) or f"{header['num_fields']} of them"
        raise DamagedFileError(
            f"{path} has the wrong fields ({names}); expected an RGB image `image`, an integer `label`"
        )
    return header


def _read_table(file: BinaryIO, path: Path, file_bytes: int, start: int, count: int) -> NDArray[np.void]:
    if file_bytes != start + count * ALLOCATION.itemsize:
        raise DamagedFileError(
            f"{path} is cut or incomplete: its allocation table of {count} entries should fill bytes {start} to "
            f"{start + count * ALLOCATION.itemsize}, but the file ends at {file_bytes}"
        )
    file.seek(start)
    table = np.fromfile(file, ALLOCATION, count)
    return table[np.argsort(table["sample"], kind="stable")]


def _check_allocations(index: Index, table: NDArray[np.void], samples_end: int) -> None:
    page, offsets, ends = index.page_bytes, index.offsets, index.offsets + index.sizes
    raw_bytes = index.heights.astype(np.int64) * index.widths * 3
    bad = {
        "the allocation table does not name every sample once": table["sample"] != np.arange(len(index)),
        "the allocation table and the sample's record disagree": table["offset"].astype(np.int64) != offsets,
        "an image lies outside the pages": (offsets < samples_end) | (ends > index.pages_end) | (index.sizes <= 0),
        "an image crosses a page": offsets // page != (ends - 1) // page,
        "an image is neither JPEG nor raw": index.modes > RAW,
        "a raw image has the wrong size": (index.modes == RAW) & (index.sizes != raw_bytes),
        "an image has no pixels": raw_bytes == 0,
    }
    for what, where in bad.items():
        if where.any():
            raise DamagedFileError(f"{index.path} is damaged: {what} (first at sample {int(np.argmax(where))})")


def head_bytes(samples: NDArray[np.void], page_bytes: int, table_start: int) -> bytes:
    """Header, field descriptors and sample records, as they stand at the start of a file."""
    header = np.zeros(1, HEADER)
    header[0] = (VERSION, len(FIELDS), page_bytes, len(samples), table_start)
    fields = np.zeros(len(FIELDS), FIELD)
    for field, (name, type_id) in zip(fields, FIELDS, strict=True):
        field["type_id"] = type_id
        field["name"][: len(name)] = np.frombuffer(name.encode("ascii"), np.uint8)
    return header.tobytes() + fields.tobytes() + samples.tobytes()


def index_digest(path: Path, index: Index) -> str:
    """SHA-256 of everything but the images: header, fields, records and table. Cheap enough for every opening."""
    with path.open("rb") as file:
        digest = hashlib.sha256(file.read(SAMPLES_START + len(index) * SAMPLE.itemsize))
        file.seek(index.pages_end)
        digest.update(file.read())
    return digest.hexdigest()


def sample_digest(label: int, mode: int, height: int, width: int, payload: bytes | memoryview) -> bytes:
    """16 bytes that stand for one stored sample, wherever it lies in the file."""
    digest = hashlib.blake2b(np.array([label, mode, height, width], "<i8").tobytes(), digest_size=16)
    digest.update(payload)
    return digest.digest()


def images_digest(index: Index, progress: Callable[[int, int], None] = lambda _done, _total: None) -> str:
    """SHA-256 over the digests of all samples, in order: reads the whole file. `progress` hears (done, in all)."""
    whole = hashlib.sha256()
    columns = (index.labels, index.modes, index.heights, index.widths)
    with (
        index.path.open("rb") as file,
        mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as bytes_,
        memoryview(bytes_) as view,
    ):
        for sample, (offset, size) in enumerate(zip(index.offsets.tolist(), index.sizes.tolist(), strict=True)):
            if sample % 1024 == 0:
                progress(sample, len(index))  # from 0 on: a rate counts from the first news
            with view[offset : offset + size] as payload:
                label, mode, height, width = (int(column[sample]) for column in columns)
                whole.update(sample_digest(label, mode, height, width, payload))
    progress(len(index), len(index))
    return whole.hexdigest()
