"""Small image sets for the tests of the data room."""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from harness.config import DataConfig
from harness.data.encode import WriteSettings
from harness.data.sources import Scan, SplitScan

WNIDS = ("n01440764", "n01443537", "n02102040")


def picture(height: int, width: int, seed: int) -> NDArray[np.uint8]:
    """Smooth colours with some grain: what JPEG is made for."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (5, 5, 3)).astype(np.uint8)
    smooth = np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)).astype(np.int16)
    return np.clip(smooth + rng.integers(-6, 7, smooth.shape), 0, 255).astype(np.uint8)


def jpeg(image: NDArray[np.uint8] | Image.Image, **options: object) -> bytes:
    """The bytes of a JPEG file."""
    return file_bytes(image, "JPEG", **options)


def file_bytes(image: NDArray[np.uint8] | Image.Image, kind: str, **options: object) -> bytes:
    """The bytes of an image file."""
    buffer = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(buffer, kind, **options)
    return buffer.getvalue()


def image_folder(root: Path, counts: Mapping[str, Mapping[str, int]], side: tuple[int, int] = (40, 60)) -> Path:
    """root/SPLIT/CLASS/*.jpg with `counts[split][class]` images of sides between the two."""
    seed = 0
    for split, classes in counts.items():
        for name, count in classes.items():
            folder = root / split / name
            folder.mkdir(parents=True)
            for number in range(count):
                seed += 1
                height, width = np.random.default_rng(seed).integers(*side, 2)
                (folder / f"{number:03d}.jpg").write_bytes(jpeg(picture(height, width, seed), quality=95))
    return root


class Listed:
    """A source made of given images (arrays or file bytes), half of them to train on."""

    def __init__(self, images: Sequence[object], labels: Sequence[int] | None = None, *, small: bool = True) -> None:
        self.images, self.small, self.spec = list(images), small, "listed"
        self.labels = np.asarray(labels if labels is not None else [0] * len(self.images), np.int64)

    def scan(self) -> Scan:
        half = len(self.images) // 2
        numbers = np.arange(len(self.images))
        parts = {"train": numbers[:half], "val": numbers[half:]}
        classes = tuple(f"class{k}" for k in range(int(self.labels.max()) + 1))
        return Scan(classes, {s: SplitScan(part.tolist(), self.labels[part]) for s, part in parts.items()})

    def read(self, ref: int) -> object:
        return self.images[ref]

    def describe(self, ref: int) -> str:
        return f"image {ref}"


RAW = WriteSettings(max_size=0, jpeg_share=0.0, page_bytes=2 << 20)
HALF_JPEG = WriteSettings(max_size=500, jpeg_share=0.5, page_bytes=2 << 20)


def config(folder: Path, **changes: object) -> DataConfig:
    """A [data] section over a written set."""
    fields = {"source": "listed", "dir": str(folder), "image_size": 32, "batch_size": 8} | changes
    return DataConfig.model_validate(fields)
