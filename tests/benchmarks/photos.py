"""Photos made here, with the spectrum of natural images and their weight: 500 x 375 pixels, some 110 KB of JPEG."""

from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import numpy as np
from PIL import Image

from harness.data.sources import ImageFolder, Scan, SplitScan

VALIDATION = 32


def make_photos(root: Path, count: int, processes: int = 1) -> ImageFolder:
    """`count` photos to train on and 32 to validate with, of one class, in folders under `root`."""
    for split, images in (("train", count), ("val", VALIDATION)):
        folder = root / split / "all"
        folder.mkdir(parents=True)
        if processes == 1:
            for number in range(images):
                _save(folder, number)
        else:
            with ProcessPoolExecutor(processes, mp_context=get_context("fork")) as pool:
                list(pool.map(partial(_save, folder), range(images), chunksize=8))
    return ImageFolder(root)


def _save(folder: Path, number: int) -> None:
    """One photo: amplitude falls as 1/frequency."""
    random = np.random.default_rng(number)
    frequency = np.hypot(np.fft.fftfreq(375)[:, None], np.fft.rfftfreq(500)[None, :])
    frequency[0, 0] = 1.0
    noise = random.normal(size=(3, 375, 251)) + 1j * random.normal(size=(3, 375, 251))
    field = np.fft.irfft2(noise / frequency**1.1, s=(375, 500)).transpose(1, 2, 0)
    grey = field.mean(axis=2, keepdims=True)
    field = grey + 0.3 * (field - grey)
    image = Image.fromarray(np.clip(120 + 55 * field / field.std(), 0, 255).astype(np.uint8))
    image.save(folder / f"{number}.jpg", quality=92)


@dataclass(frozen=True)
class Repeated(ImageFolder):
    """The same photos several times over."""

    times: int = 6

    def scan(self) -> Scan:
        scan = super().scan()
        part = scan.splits["train"]
        several = SplitScan(list(part.refs) * self.times, np.tile(part.labels, self.times))
        return replace(scan, splits={"train": several, "val": scan.splits["val"]})
