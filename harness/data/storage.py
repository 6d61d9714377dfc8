"""How the FFCV backend reaches a file's bytes: mapped into memory, or streamed page by page with checked reads.

Both take the place of FFCV's memory managers, which hold dictionaries over all samples (0.5 KB each) and whose page
readers drop errors and short reads. `start_batch` is called by the loader's thread before each batch, `addresses`
during it.
"""

import mmap
import os
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Protocol, Self

import numpy as np
from numpy.typing import NDArray

from harness.data.beton import DamagedFileError, Index
from harness.data.manifest import remedy

_READERS = 4
_BATCHES_AHEAD = 3


class Storage(Protocol):
    """One epoch's access to a file."""

    def __enter__(self) -> Self: ...
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    @property
    def state(self) -> "Storage":
        """What FFCV hands to the operations of a batch: the storage itself."""

    def start_batch(self, number: int) -> None:
        """Have everything of batch `number` in memory. Raises OSError, `DamagedFileError`."""

    def addresses(self, offsets: NDArray[np.int64]) -> NDArray[np.int64]:
        """Where the bytes at these offsets of the file lie in memory, while their batch lasts."""


class CheckedMap:
    """A file mapped into memory. Touching what is no longer there ends the process (SIGBUS): `check` before."""

    def __init__(self, index: Index) -> None:
        self._path, self._end = index.path, index.pages_end
        with index.path.open("rb") as file:
            self.bytes = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)

    def check(self) -> None:
        """Raise `DamagedFileError` if the file was cut since (a file put in its place does not matter)."""
        file_bytes = self.bytes.size()
        if file_bytes < self._end:
            raise DamagedFileError(
                f"{self._path} was cut to {file_bytes} bytes while it was in use{remedy(self._path.parent)}"
            )


class Mapped:
    """The whole file, mapped: the system caches it, once for all processes."""

    def __init__(self, index: Index) -> None:
        self._map = CheckedMap(index)
        self._bytes = np.frombuffer(self._map.bytes, np.uint8)

    def schedule_epoch(self, _batches: Sequence[NDArray[np.int64]]) -> Self:
        """FFCV's hook: what to use in an epoch."""
        return self

    @property
    def state(self) -> Self:
        """See `Storage.state`."""
        return self

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        pass

    def start_batch(self, _number: int) -> None:
        """See `Storage.start_batch`."""
        self._map.check()

    def addresses(self, offsets: NDArray[np.int64]) -> NDArray[np.int64]:
        """See `Storage.addresses`."""
        return offsets + self._bytes.ctypes.data


class Streamed:
    """Only the pages that the next batches need; wants an order in which these are few."""

    def __init__(self, index: Index) -> None:
        self._index = index

    def schedule_epoch(self, batches: Sequence[NDArray[np.int64]]) -> "_PageStream":
        """FFCV's hook: what to use in an epoch."""
        pages = self._index.offsets // self._index.page_bytes
        return _PageStream(self._index, [np.unique(pages[batch]).tolist() for batch in batches])


class _PageStream:
    def __init__(self, index: Index, pages_of_batch: list[list[int]]) -> None:
        self._index, self._pages = index, pages_of_batch
        self._last_use = {page: number for number, pages in enumerate(pages_of_batch) for page in pages}
        self._loading: dict[int, Future[None]] = {}
        self._buffers: dict[int, NDArray[np.uint8]] = {}
        self._spare: list[NDArray[np.uint8]] = []
        self._asked = 0
        self._address = np.zeros(index.pages_end // index.page_bytes + 1, np.int64)

    @property
    def state(self) -> Self:
        return self

    def __enter__(self) -> Self:
        self._file = os.open(self._index.path, os.O_RDONLY)
        self._readers = ThreadPoolExecutor(_READERS, "pages")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Called more than once by FFCV."""
        self._readers.shutdown(cancel_futures=True)
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def start_batch(self, number: int) -> None:
        for page in [page for page in self._buffers if self._last_use[page] < number]:
            self._spare.append(self._buffers.pop(page))
            del self._loading[page]
        ahead = min(number + _BATCHES_AHEAD, len(self._pages) - 1)
        for coming in range(self._asked, ahead + 1):
            for page in self._pages[coming]:
                if page not in self._loading:
                    buffer = self._spare.pop() if self._spare else np.empty(self._index.page_bytes, np.uint8)
                    self._buffers[page] = buffer
                    self._address[page] = buffer.ctypes.data
                    self._loading[page] = self._readers.submit(self._read, page, buffer)
        self._asked = max(self._asked, ahead + 1)
        for page in self._pages[number]:
            self._loading[page].result()

    def addresses(self, offsets: NDArray[np.int64]) -> NDArray[np.int64]:
        pages, rest = np.divmod(offsets, self._index.page_bytes)
        return self._address[pages] + rest

    def _read(self, page: int, buffer: NDArray[np.uint8]) -> None:
        start = page * self._index.page_bytes
        want = min(len(buffer), self._index.pages_end - start)
        done = 0
        while done < want:
            count = os.preadv(self._file, [buffer[done:want].data], start + done)
            if count == 0:
                raise DamagedFileError(f"{self._index.path} ended at byte {start + done} while it was read")
            done += count
