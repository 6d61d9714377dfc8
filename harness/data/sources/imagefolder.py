"""Folders of images: train/CLASS/IMAGE and val/CLASS/IMAGE, or ImageNet's flat val folder with a file of labels."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from harness.data.manifest import SPLITS, Split
from harness.data.sources.base import IMAGE_SUFFIXES, Scan, SplitScan, checked
from harness.data.sources.imagenet_val import labels_of_flat_folder
from harness.errors import UserError


@dataclass(frozen=True)
class ImageFolder:
    """`val_labels` and `synsets` (the devkit's meta.mat) are looked for by their usual names where None."""

    root: Path
    val_labels: Path | None = None
    synsets: Path | None = None
    small: bool = False

    @property
    def spec(self) -> str:
        """See `Source.spec`."""
        return f"imagefolder:{self.root}"

    def scan(self) -> Scan:
        """See `Source.scan`; classes are the sorted names of the folders, as in torchvision's ImageFolder."""
        for split in SPLITS:
            if not (self.root / split).is_dir():
                raise UserError(
                    f"{self.spec}: there is no folder {self.root / split}; expected "
                    f"{self.root}/train/CLASS/IMAGE and {self.root}/val/CLASS/IMAGE"
                )
        classes = _folders(self.root / "train")
        if not classes:
            raise UserError(f"{self.spec}: no class folders in {self.root / 'train'}")
        number = {name: k for k, name in enumerate(classes)}
        problems: list[str] = []
        splits: dict[Split, SplitScan] = {"train": self._by_class("train", classes, number, problems)}
        in_val = _folders(self.root / "val")
        if in_val:
            strange = [name for name in in_val if name not in number]
            if strange:
                raise UserError(
                    f"{self.spec}: validation classes that are not in training: {', '.join(strange[:5])}"
                    f"{' ...' if len(strange) > 5 else ''}"
                )
            splits["val"] = self._by_class("val", in_val, number, problems)
        else:
            splits["val"] = self._flat(number, problems)
        return checked(self.spec, classes, splits, problems)

    def _by_class(self, split: Split, classes: list[str], number: Mapping[str, int], problems: list[str]) -> SplitScan:
        refs, labels = [], []
        for name in classes:
            images = _images(self.root, f"{split}/{name}", problems)
            refs += images
            labels += [number[name]] * len(images)
        return SplitScan(refs, np.array(labels, np.int64))

    def _flat(self, number: Mapping[str, int], problems: list[str]) -> SplitScan:
        refs = _images(self.root, "val", problems)
        names = [ref.rsplit("/", 1)[-1] for ref in refs]
        labels = labels_of_flat_folder(self.root, names, number, self.val_labels, self.synsets) if refs else []
        return SplitScan(refs, np.array(labels, np.int64))

    def read(self, ref: str) -> bytes:
        """See `Source.read`."""
        return (self.root / ref).read_bytes()

    def describe(self, ref: str) -> str:
        """See `Source.describe`."""
        return str(self.root / ref)


def _folders(path: Path) -> list[str]:
    try:
        with os.scandir(path) as entries:
            return sorted(entry.name for entry in entries if entry.is_dir())
    except OSError as error:
        raise _unreadable(error) from None


def _unreadable(error: OSError) -> UserError:
    return UserError(f"folder {error.filename} cannot be read: {error.strerror}")


def _images(root: Path, folder: str, problems: list[str]) -> list[str]:
    """Image files under a folder relative to root, in torchvision's order; others become one problem."""

    def refuse(error: OSError) -> None:
        raise _unreadable(error)

    found: list[str] = []
    others: list[str] = []
    for place, _, names in sorted(os.walk(root / folder, onerror=refuse, followlinks=True)):
        for name in sorted(names):
            path = os.path.relpath(os.path.join(place, name), root)  # noqa: PTH118 - a million times
            (found if os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES else others).append(path)  # noqa: PTH122
    if others:
        problems.append(f"{folder}: {len(others)} file(s) are no images, such as {others[0]}")
    return found
