"""What a source of images is: a scan that finds everything, and a reader of one image that runs in any process."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from harness.data.manifest import SPLITS, Split
from harness.errors import UserError

# Whatever `read` needs to find one image: small and picklable.
Ref = Any
IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp"})
_WNID = re.compile(r"n\d{8}")


@dataclass(frozen=True)
class SplitScan:
    """The images of one split: references and labels 0..n-1, in the order in which they are written."""

    refs: Sequence[Ref]
    labels: NDArray[np.int64]


@dataclass(frozen=True)
class Scan:
    """All that a source holds. Class names stand in torchvision's order; problems are sentences for the report."""

    classes: tuple[str, ...]
    splits: Mapping[Split, SplitScan]
    problems: tuple[str, ...] = field(default=())


class Source(Protocol):
    """Images with labels in two splits. Instances are picklable: `read` is called in other processes."""

    @property
    def spec(self) -> str:
        """The text that names this source on a command line."""

    @property
    def small(self) -> bool:
        """Whether images are so small that JPEG and several processes are no gain."""

    def scan(self) -> Scan:
        """Look at everything but the pixels. Raises `UserError` where the source is not what it should be."""

    def read(self, ref: Ref) -> bytes | NDArray[np.uint8]:
        """One image: the bytes of an image file, or an array (height, width, 3). Raises OSError."""

    def describe(self, ref: Ref) -> str:
        """What messages call this image."""


def checked(spec: str, classes: Sequence[str], splits: Mapping[Split, SplitScan], problems: Sequence[str] = ()) -> Scan:
    """A scan whose labels lie in 0..n-1 and whose splits hold images; classes without images become problems.

    Classes that are named by WordNet ids are sorted, as folders are; others stay as they are numbered.
    """
    for split in SPLITS:
        labels = splits[split].labels
        if len(labels) == 0:
            raise UserError(f"{spec}: no images at all for the {split} split")
        outside = (labels < 0) | (labels >= len(classes))
        if outside.any():
            first = int(np.argmax(outside))
            raise UserError(
                f"{spec}: label {labels[first]} of {split} image number {first} lies outside 0..{len(classes) - 1}"
            )
    if all(_WNID.fullmatch(name) for name in classes):
        rank = np.argsort(np.argsort(np.array(classes)))
        splits = {split: SplitScan(part.refs, rank[part.labels]) for split, part in splits.items()}
        classes = sorted(classes)
    strange = np.setdiff1d(splits["val"].labels, splits["train"].labels)
    if len(strange):
        names = ", ".join(repr(classes[k]) for k in strange[:5].tolist())
        raise UserError(f"{spec}: validation has classes without a training image: {names}")
    found = list(problems)
    for split in SPLITS:
        counts = np.bincount(splits[split].labels, minlength=len(classes))
        found += [
            f"{split}: class {classes[k]!r} (label {k}) has no images" for k in np.flatnonzero(counts == 0).tolist()
        ]
    return Scan(tuple(classes), splits, tuple(found))


def split_of_file(name: str) -> Split | None:
    """The split that a shard's file name speaks of; None for a test set."""
    words = set(re.split(r"[^a-z]+", name.lower()))
    if "train" in words:
        return "train"
    return "val" if words & {"val", "valid", "validation"} else None


def shards(spec: str, pattern: str, kind: str) -> dict[Split, list[str]]:
    """The files that a glob matches, sorted, by split. Raises `UserError` if a split has none."""
    import glob

    found: dict[Split, list[str]] = {"train": [], "val": []}
    matches = sorted(glob.glob(pattern, recursive=True))  # noqa: PTH207 - an absolute pattern, too
    for path in matches:
        split = split_of_file(path.rsplit("/", 1)[-1])
        if split is not None:
            found[split].append(path)
    for split, files in found.items():
        if not files:
            seen = f"{len(matches)} files match, such as {matches[0]}" if matches else "no file matches"
            raise UserError(
                f"{spec}: no {kind} file of the {split} split ({seen}). File names must hold the word "
                f"{'train' if split == 'train' else 'val or validation'}; quote the pattern in the shell"
            )
    return found
