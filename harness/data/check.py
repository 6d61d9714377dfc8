"""Is a data set folder what its manifests say? `deep` decodes every image as well."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from harness.data.beton import JPEG, DamagedFileError, Index, images_digest
from harness.data.manifest import SPLITS, Manifest, Split, load_manifest, open_checked, remedy
from harness.data.pixels import UndecodableError, decode
from harness.errors import UserError


@dataclass(frozen=True)
class Checked:
    """One split found whole."""

    manifest: Manifest
    decoded: int


def check(
    folder: Path,
    *,
    deep: bool = False,
    progress: Callable[[str, int, int], None] = lambda _what, _done, _total: None,
) -> list[Checked]:
    """Compare fields, counts, sizes and checksums of both splits; `UserError` names the first thing that is wrong."""
    found = []
    for split in SPLITS:
        manifest, index = open_checked(folder, split)
        _check_counts(folder, manifest, index)
        whole = images_digest(index, partial(progress, split)) == manifest.checksums["images"]
        bad = (
            [
                f"sample {sample} {reason}"
                for sample, reason in undecodable_samples(index, partial(progress, f"{split}, decoding"))
            ]
            if deep or not whole
            else []
        )
        if bad or not whole:
            what = "the image bytes do not match the manifest's checksum; " * (not whole)
            which = f"{len(bad)} image(s) do not decode: {'; '.join(bad[:10])}" if bad else "all images still decode"
            raise DamagedFileError(f"{index.path}: {what}{which}{remedy(folder, manifest.source)}")
        found.append(Checked(manifest, len(index) if deep else 0))
    _check_classes(folder)
    return found


def undecodable_samples(
    index: Index, progress: Callable[[int, int], None] = lambda _done, _total: None
) -> Iterator[tuple[int, str]]:
    """(sample, reason) of every JPEG that does not decode to the sides that its record gives.

    `progress` hears (done, in all).
    """
    jpegs = np.flatnonzero(index.modes == JPEG).tolist()
    with index.path.open("rb") as file:
        for done, sample in enumerate(jpegs):
            if done % 64 == 0:
                progress(done, len(jpegs))
            file.seek(int(index.offsets[sample]))
            payload = file.read(int(index.sizes[sample]))
            try:
                decode(payload, JPEG, int(index.heights[sample]), int(index.widths[sample]))
            except UndecodableError as error:
                yield sample, str(error)
    progress(len(jpegs), len(jpegs))


def _check_counts(folder: Path, manifest: Manifest, index: Index) -> None:
    counts = tuple(np.bincount(index.labels, minlength=len(manifest.classes)).tolist())
    if counts != manifest.class_counts:
        raise UserError(f"{index.path}: images per class do not match the manifest{remedy(folder, manifest.source)}")


def _check_classes(folder: Path) -> None:
    def classes(split: Split) -> tuple[str, ...]:
        return load_manifest(folder, split).classes

    if classes("train") != classes("val"):
        raise UserError(f"{folder}: the train and val splits name different classes{remedy(folder)}")
