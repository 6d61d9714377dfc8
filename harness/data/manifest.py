"""The manifest beside each data set file: contents, settings, checksums. A file without one is no data set."""

import hashlib
import json
import os
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from harness.data.beton import DamagedFileError, Index, images_digest, index_digest, read_index
from harness.errors import UserError

SCHEMA = 1
Split = Literal["train", "val"]
SPLITS: tuple[Split, ...] = ("train", "val")
# Files up to this size are read and compared whole each time they are opened; larger ones by `data check`.
VERIFY_WHOLE_BYTES = 32 << 20


class Manifest(BaseModel):
    """What one file holds. `mean` and `std` are those of the training images, per channel in units of 0..255."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    schema_version: Annotated[int, Field(alias="schema")] = SCHEMA
    split: Split
    file: str
    file_bytes: int
    num_samples: int
    classes: tuple[str, ...]
    class_counts: tuple[int, ...]
    height_range: tuple[int, int]
    width_range: tuple[int, int]
    jpeg_images: int
    raw_images: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    source: str
    settings: dict[str, int | float | str | bool]
    problems: int
    checksums: dict[Literal["index", "images"], str]
    written_by: dict[str, str]

    @property
    def content(self) -> str:
        """Digest of what a training run can see of this file: classes and bytes, not where they came from or lie."""
        seen = [self.split, self.num_samples, self.classes, self.mean, self.std, self.checksums["images"]]
        return hashlib.sha256(json.dumps(seen, sort_keys=True).encode()).hexdigest()


def beton_path(folder: Path, split: Split) -> Path:
    """The data set file of a split."""
    return folder / f"{split}.beton"


def manifest_path(folder: Path, split: Split) -> Path:
    """The manifest of a split."""
    return folder / f"{split}.manifest.json"


def save_manifest(folder: Path, manifest: Manifest) -> None:
    """Write a manifest atomically and durably; this is the last step that makes a file a data set."""
    path = manifest_path(folder, manifest.split)
    partial = path.with_suffix(".partial")
    with partial.open("w", encoding="utf-8") as file:
        file.write(manifest.model_dump_json(by_alias=True, indent=1) + "\n")
        file.flush()
        os.fsync(file.fileno())
    partial.rename(path)


def load_manifest(folder: Path, split: Split) -> Manifest:
    """Read the manifest of a split; `UserError` if there is none, or it is not one."""
    path = manifest_path(folder, split)
    if not path.is_file():
        there = (
            f"; {path.name} is missing, so the file beside it is not whole"
            if beton_path(folder, split).exists()
            else ""
        )
        raise UserError(
            f"no {split} data set in {folder}{there}. "
            f"Write it with `python -m harness data write --source SOURCE --out {folder}`."
        )
    try:
        return Manifest.model_validate_json(path.read_text(encoding="utf-8"))
    except (ValidationError, UnicodeDecodeError) as error:
        first = str(error).splitlines()
        raise DamagedFileError(
            f"{path} is not a manifest of schema {SCHEMA}: {' '.join(first[:3])}{remedy(folder)}"
        ) from None


def remedy(folder: Path, source: str = "SOURCE") -> str:
    """The sentence that ends a message about a damaged data set."""
    return f". Write it again: delete {folder} and run `python -m harness data write --source {source} --out {folder}`."


def open_checked(folder: Path, split: Split) -> tuple[Manifest, Index]:
    """Manifest and index of a split, found to agree; `DamagedFileError` (a `UserError`) names what does not."""
    manifest = load_manifest(folder, split)
    path = folder / manifest.file
    try:
        if path.is_file() and 0 < path.stat().st_size != manifest.file_bytes:
            raise DamagedFileError(
                f"{path} has {path.stat().st_size} bytes but its manifest says {manifest.file_bytes}: "
                "it was cut or replaced"
            )
        index = read_index(path)
        _compare(manifest, index)
    except DamagedFileError as error:
        raise DamagedFileError(f"{error}{remedy(folder, manifest.source)}") from None
    return manifest, index


def _compare(manifest: Manifest, index: Index) -> None:
    if len(index) != manifest.num_samples:
        raise DamagedFileError(f"{index.path} has {len(index)} samples but its manifest says {manifest.num_samples}")
    if index_digest(index.path, index) != manifest.checksums["index"]:
        raise DamagedFileError(f"{index.path}: records and tables do not match the manifest's checksum")
    if manifest.file_bytes <= VERIFY_WHOLE_BYTES and images_digest(index) != manifest.checksums["images"]:
        raise DamagedFileError(f"{index.path}: the image bytes do not match the manifest's checksum")
    low, high = int(index.labels.min()), int(index.labels.max())
    if low < 0 or high >= len(manifest.classes):
        raise DamagedFileError(
            f"{index.path}: labels run from {low} to {high}, but the manifest names {len(manifest.classes)} classes"
        )


def data_checksum(folder: str | Path) -> str:
    """Sixteen hex digits that name the content of a data set folder (both splits), whatever its path."""
    contents = [load_manifest(Path(folder), split).content for split in SPLITS]
    return hashlib.sha256("".join(contents).encode()).hexdigest()[:16]
