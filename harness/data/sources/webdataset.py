"""Tar files in WebDataset's layout: NAME.jpg beside NAME.cls (a number) or NAME.json ({"label": number})."""

import json
import os
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from harness.data.manifest import Split
from harness.data.sources.base import IMAGE_SUFFIXES, Scan, SplitScan, checked, shards
from harness.errors import UserError

# Path of the shard, offset and size of the image in it, its name.
_Ref = tuple[str, int, int, str]


@dataclass(frozen=True)
class WebDataset:
    """Uncompressed shards whose names hold the word train, or val or validation."""

    pattern: str
    small: bool = False

    @property
    def spec(self) -> str:
        """See `Source.spec`."""
        return f"tar:{self.pattern}"

    def scan(self) -> Scan:
        """See `Source.scan`; classes are called by their numbers."""
        splits: dict[Split, SplitScan] = {}
        problems: list[str] = []
        for split, files in shards(self.spec, self.pattern, "tar").items():
            found = [sample for path in files for sample in _samples(path, problems)]
            labels = np.array([label for _, label in found], np.int64)
            splits[split] = SplitScan([ref for ref, _ in found], labels)
        most = max(int(part.labels.max(initial=-1)) for part in splits.values())
        return checked(self.spec, [str(label) for label in range(most + 1)], splits, problems)

    def read(self, ref: _Ref) -> bytes:
        """See `Source.read`."""
        path, offset, size, _ = ref
        content = os.pread(_descriptor(path).number, size, offset)
        if len(content) != size:
            raise OSError(f"{path} ended early")
        return content

    def describe(self, ref: _Ref) -> str:
        """See `Source.describe`."""
        return f"{ref[0]}:{ref[3]}"


class _Descriptor:
    """An open file that closes with its last user."""

    def __init__(self, path: str) -> None:
        self.number = os.open(path, os.O_RDONLY)

    def __del__(self) -> None:
        os.close(self.number)


@lru_cache(maxsize=8)
def _descriptor(path: str) -> _Descriptor:
    return _Descriptor(path)


def _samples(path: str, problems: list[str]) -> Iterator[tuple[_Ref, int]]:
    """(reference, label) of every image in a shard, in its order; what is incomplete becomes a problem."""
    images: dict[str, _Ref] = {}
    labels: dict[str, int] = {}
    try:
        with tarfile.open(path, "r:") as shard:
            for member in shard:
                if not member.isfile():
                    continue
                folder, _, name = member.name.rpartition("/")
                stem, _, suffix = name.partition(".")
                key, suffix = f"{folder}/{stem}", suffix.lower()
                if f".{suffix}" in IMAGE_SUFFIXES:
                    images[key] = (path, member.offset_data, member.size, member.name)
                elif suffix in ("cls", "json"):
                    file = shard.extractfile(member)
                    label = _label(path, member.name, file.read() if file else b"")
                    if label is not None and (suffix == "cls" or key not in labels):
                        labels[key] = label
    except (OSError, tarfile.TarError) as error:
        raise UserError(
            f"{path} is not a whole, uncompressed tar file ({error}): fetch it again, or unpack .gz first"
        ) from None
    for key, ref in images.items():
        if key in labels:
            yield ref, labels[key]
        else:
            problems.append(f"{path}: {ref[3]} has no label (no .cls, no .json beside it)")


def _label(path: str, name: str, content: bytes) -> int | None:
    """The label in a .cls or .json; None for a .json that tells something else (a caption, a file name)."""
    try:
        value = json.loads(content)
        if isinstance(value, dict):
            return int(value["label"]) if "label" in value else None
        return int(value)
    except (ValueError, TypeError):
        raise UserError(f"{path}: {name} holds no label: {content[:40]!r}") from None
