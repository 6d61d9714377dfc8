"""Is a data set folder what its manifests say? `deep` decodes every image as well."""

import io
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from harness.data.beton import JPEG, Index, images_digest
from harness.data.manifest import SPLITS, Manifest, Split, load_manifest, open_checked, remedy
from harness.errors import UserError


@dataclass(frozen=True)
class Checked:
    """One split found whole."""

    manifest: Manifest
    decoded: int


def check(
    folder: Path, *, deep: bool = False, progress: Callable[[str, int, int], None] = lambda _split, _done, _total: None
) -> list[Checked]:
    """Compare fields, counts, sizes and checksums of both splits; `UserError` names the first thing that is wrong."""
    found = []
    for split in SPLITS:
        manifest, index = open_checked(folder, split)
        _check_counts(folder, manifest, index)
        if (
            images_digest(index, lambda done, split=split, n=len(index): progress(split, done, n))
            != (  # type: ignore[misc]
                manifest.checksums["images"]
            )
        ):
            damaged = [f"sample {sample} {reason}" for sample, reason in undecodable_samples(index)][:5]
            where = "; ".join(damaged) if damaged else "all images still decode"
            raise UserError(
                f"{index.path}: the image bytes do not match the manifest's checksum ({where})"
                f"{remedy(folder, manifest.source)}"
            )
        if deep:
            bad = [f"sample {sample} {reason}" for sample, reason in undecodable_samples(index)]
            if bad:
                raise UserError(f"{index.path}: {len(bad)} image(s) do not decode: {'; '.join(bad[:10])}")
        found.append(Checked(manifest, len(index) if deep else 0))
    _check_classes(folder)
    return found


def undecodable_samples(index: Index) -> Iterator[tuple[int, str]]:
    """(sample, reason) of every JPEG that does not decode to the sides that its record gives."""
    with index.path.open("rb") as file:
        for sample in np.flatnonzero(index.modes == JPEG).tolist():
            file.seek(int(index.offsets[sample]))
            try:
                image = Image.open(io.BytesIO(file.read(int(index.sizes[sample]))), formats=["JPEG"])
                image.load()
            except (OSError, SyntaxError, ValueError) as error:
                yield sample, f"does not decode ({error})"
                continue
            if image.size != (index.widths[sample], index.heights[sample]) or image.mode != "RGB":
                yield (
                    sample,
                    f"is {image.mode} of {image.size}, not RGB of {index.widths[sample], index.heights[sample]}",
                )


def _check_counts(folder: Path, manifest: Manifest, index: Index) -> None:
    counts = tuple(np.bincount(index.labels, minlength=len(manifest.classes)).tolist())
    if counts != manifest.class_counts:
        raise UserError(f"{index.path}: images per class do not match the manifest{remedy(folder, manifest.source)}")


def _check_classes(folder: Path) -> None:
    def classes(split: Split) -> tuple[str, ...]:
        return load_manifest(folder, split).classes

    if classes("train") != classes("val"):
        raise UserError(f"{folder}: the train and val splits name different classes{remedy(folder)}")
