"""Data: the loader's CPU time against a torch DataLoader with PIL, its throughput against bare FFCV; writing, memory.

Photos are made here, of ImageNet's size and weight (500 x 375, some 110 KB of JPEG); small images are noise of 32 x 32.
"""

import gc
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from harness.config import DataConfig
from harness.data.encode import WriteSettings
from harness.data.loader import open_data
from harness.data.sources import ImageFolder, Scan, SplitScan
from harness.data.writer import write
from tests.benchmarks.measure import Estimate, NotHereError, Row, estimate
from tests.benchmarks.photos import Repeated, make_photos

PHOTOS, SMALL, BATCH, REPEATS = 256, 16384, 64, 7
MEAN, STD = (123.7, 116.8, 103.9), (58.4, 57.1, 57.4)


def rows() -> Iterator[Row]:
    """All figures of the data room."""
    try:
        import ffcv  # noqa: F401
    except ImportError as error:
        raise NotHereError("FFCV") from error
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        yield from _starting(folder)
        photos = make_photos(folder / "photos", PHOTOS)
        yield from _writing(photos, folder)
        for share, limit in ((1.0, 2.2), (0.5, 2.6)):
            place = folder / f"share-{share}"
            write(photos, place, WriteSettings(jpeg_share=share), workers=2)
            name = f"224 px, {share:.0%} JPEG"
            yield from _loading(name, place, _PhotoFiles(photos), limit, augment="resized_crop_flip", image_size=224)
        small = _SmallImages()
        write(small, folder / "small", workers=0)
        yield from _loading(
            "32 px", folder / "small", _SmallArrays(small.pixels), 4.5, augment="crop_flip", image_size=32
        )
        yield _memory(folder / "small")


def _loading(name: str, folder: Path, files: "Dataset[Any]", limit: float, **data: Any) -> Iterator[Row]:
    """CPU time per image against the DataLoader's, and throughput against bare FFCV's, one and two workers."""
    for workers in (1, 2):
        config = DataConfig(source="", dir=str(folder), batch_size=BATCH, workers=workers, mean=MEAN, std=STD, **data)
        kind = f"{name}, {workers} worker{'s' * (workers > 1)}"
        yield from _comparing(kind, config, files, limit)
        gc.collect()


def _comparing(kind: str, config: DataConfig, files: "Dataset[Any]", limit: float) -> Iterator[Row]:
    ours = open_data(config, "train", batch_size=BATCH, seed=0)
    epochs = iter(range(10**6))

    def safe() -> int:
        return _drain(ours.epoch(next(epochs)))

    cpu = _against_plain(files, config.workers, safe)
    yield Row(f"{kind}: CPU of DataLoader + PIL / ours", cpu, limit, "x", at_least=True)
    bare = _bare_ffcv(config)
    wall = _pairs(lambda: _drain(bare), safe, time.perf_counter)
    yield Row(f"{kind}: throughput, ours / bare FFCV", wall, 0.95, "x", at_least=True)
    start = time.perf_counter()
    count = safe()
    yield Row(f"{kind}: ours", count / (time.perf_counter() - start), 0.0, "images/s", at_least=True)
    ours.close()


def _against_plain(files: "Dataset[Any]", workers: int, ours: Callable[[], int]) -> Estimate:
    plain = DataLoader(
        files, BATCH, shuffle=True, num_workers=workers, persistent_workers=True, drop_last=True,
        multiprocessing_context="fork",
    )  # fmt: skip
    return _pairs(lambda: _drain(plain), ours, _cpu_s)


def _pairs(above: Callable[[], int], below: Callable[[], int], clock: Callable[[], float]) -> Estimate:
    """Ratio per image of what `clock` counts, pair by pair with swapped order, after one round to warm up."""

    def per_image(work: Callable[[], int]) -> float:
        start = clock()
        count = work()
        return (clock() - start) / count

    above(), below()
    ratios = []
    for repeat in range(REPEATS):
        if repeat % 2:
            second, first = per_image(below), per_image(above)
        else:
            first, second = per_image(above), per_image(below)
        ratios.append(first / second)
    return estimate(ratios)


def _drain(loader: Any) -> int:
    return sum(len(batch[1]) for batch in loader)


def _cpu_s() -> float:
    """CPU seconds of this process and of its living children."""
    total, tick = time.process_time(), os.sysconf("SC_CLK_TCK")
    for entry in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = entry.read_text().rsplit(")", 1)[1].split()
        except OSError:
            continue
        if int(fields[1]) == os.getpid():
            total += (int(fields[11]) + int(fields[12])) / tick
    return total


def _bare_ffcv(config: DataConfig) -> Any:
    """FFCV as its documentation uses it, with the same augmentations."""
    from ffcv.fields.basics import IntDecoder
    from ffcv.fields.rgb_image import RandomResizedCropRGBImageDecoder, SimpleRGBImageDecoder
    from ffcv.loader import Loader, OrderOption
    from ffcv.transforms import NormalizeImage, RandomHorizontalFlip, RandomTranslate, ToTensor, ToTorchImage

    import harness.data.ffcv_backend  # noqa: F401 - imports FFCV quickly

    if config.image_size == 32:
        decode = [SimpleRGBImageDecoder(), RandomHorizontalFlip(), RandomTranslate(4)]
    else:
        decode = [RandomResizedCropRGBImageDecoder((config.image_size,) * 2), RandomHorizontalFlip()]
    normalise = NormalizeImage(np.array(MEAN), np.array(STD), np.float32)
    threads = torch.get_num_threads()
    loader = Loader(
        str(Path(config.dir) / "train.beton"), BATCH, config.workers, order=OrderOption.RANDOM, seed=0, drop_last=True,
        pipelines={"image": [*decode, normalise, ToTensor(), ToTorchImage()], "label": [IntDecoder(), ToTensor()]},
    )  # fmt: skip
    torch.set_num_threads(threads)
    return loader


class _PhotoFiles(Dataset[Any]):
    """What torchvision does with an image folder: PIL decodes, crops, resizes, flips; torch normalises."""

    def __init__(self, photos: ImageFolder) -> None:
        part = photos.scan().splits["train"]
        self._paths = [photos.root / ref for ref in part.refs]
        self._labels = part.labels.tolist()
        self._random = np.random.default_rng(0)

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, number: int) -> tuple[torch.Tensor, int]:
        with Image.open(self._paths[number]) as file:
            image = file.convert("RGB")
        area, aspect = self._random.uniform(0.08, 1.0), np.exp(self._random.uniform(np.log(3 / 4), np.log(4 / 3)))
        width = min(round((image.width * image.height * area * aspect) ** 0.5), image.width)
        height = min(round((image.width * image.height * area / aspect) ** 0.5), image.height)
        left = self._random.integers(0, image.width - width + 1)
        top = self._random.integers(0, image.height - height + 1)
        image = image.crop((left, top, left + width, top + height)).resize((224, 224), Image.Resampling.BILINEAR)
        return _tensor(image, self._random), self._labels[number]


class _SmallArrays(Dataset[Any]):
    """What torchvision does with CIFAR: PIL pads, crops and flips; torch normalises."""

    def __init__(self, pixels: np.ndarray) -> None:
        self._pixels = pixels
        self._random = np.random.default_rng(0)

    def __len__(self) -> int:
        return len(self._pixels)

    def __getitem__(self, number: int) -> tuple[torch.Tensor, int]:
        padded = Image.new("RGB", (40, 40))
        padded.paste(Image.fromarray(self._pixels[number]), (4, 4))
        left, top = self._random.integers(0, 9, 2).tolist()
        return _tensor(padded.crop((left, top, left + 32, top + 32)), self._random), number % 10


def _tensor(image: Image.Image, random: np.random.Generator) -> torch.Tensor:
    if random.random() < 0.5:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous().to(torch.float32).div(255)
    return pixels.sub_(_MEAN).div_(_STD)


_MEAN, _STD = torch.tensor(MEAN).view(3, 1, 1) / 255, torch.tensor(STD).view(3, 1, 1) / 255


class _SmallImages:
    """A source of noise."""

    spec, small = "noise", True

    def __init__(self) -> None:
        self.pixels = np.random.default_rng(0).integers(0, 256, (SMALL, 32, 32, 3)).astype(np.uint8)

    def scan(self) -> Scan:
        labels = np.arange(SMALL) % 10
        return Scan(
            tuple("0123456789"), {"train": SplitScan(range(SMALL), labels), "val": SplitScan(range(64), labels[:64])}
        )

    def read(self, ref: int) -> np.ndarray:
        return self.pixels[ref]

    def describe(self, ref: int) -> str:
        return f"noise {ref}"


def _writing(photos: ImageFolder, folder: Path) -> Iterator[Row]:
    """Images per second between the first and the last finished chunk, so without the start of the processes."""
    size = np.mean([path.stat().st_size for path in (photos.root / "train" / "all").iterdir()]) / 1000
    rates = {1: [], 2: []}
    for repeat in range(3):
        for workers in (1, 2):
            seen: list[tuple[float, int]] = []

            def heard(split: str, done: int, _total: int, seen: list[tuple[float, int]] = seen) -> None:
                if split == "train" and done:
                    seen.append((time.perf_counter(), done))

            write(
                Repeated(photos.root), folder / f"written-{workers}-{repeat}", WriteSettings(), workers=workers,
                progress=heard,
            )  # fmt: skip
            (first, before), (last, after) = seen[workers - 1], seen[-workers]
            rates[workers].append((after - before) / (last - first))
    for workers, found in rates.items():
        yield Row(
            f"writing photos of {size:.0f} KB, {workers} processes", estimate(found), 0.0, "images/s", at_least=True
        )
    gain = estimate([two / one for one, two in zip(rates[1], rates[2], strict=True)])
    yield Row("writing: 2 processes / 1", gain, 1.7, "x", at_least=True, wanted=1.9)


_FIRST_BATCH = """
import sys, time, torch
start = time.perf_counter()
from harness.config import DataConfig
from harness.data.loader import open_data
data = DataConfig(source="digits", dir=sys.argv[1], image_size=32, batch_size=32)
for split in ("train", "val"):
    next(open_data(data, split, batch_size=32, seed=0).epoch(0))
print(time.perf_counter() - start)
"""


def _starting(folder: Path) -> Iterator[Row]:
    """Both loaders of a new process, imports of FFCV and numba included, torch's not."""
    from harness.data import ensure

    ensure("digits", folder / "digits")

    def start(**environment: str) -> float:
        command = [sys.executable, "-c", _FIRST_BATCH, str(folder / "digits")]
        done = subprocess.run(command, capture_output=True, text=True, check=True, env=os.environ | environment)
        return float(done.stdout)

    yield Row("first batches of a machine (compiles)", start(NUMBA_CACHE_DIR=str(folder / "cache")), 20.0, "s")
    yield Row("first batches of a process", estimate([start() for _ in range(REPEATS)]), 2.0, "s")


def _memory(folder: Path) -> Row:
    """Growth of the resident set from the first third to the last of 50 epochs, in a process of its own.

    Large blocks go back to the system as they are freed: what the C library keeps for itself goes up and down by more
    than a leak would be.
    """
    code = "import sys; from tests.benchmarks.bench_data import growth_mib; print(growth_mib(sys.argv[1]))"
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
    command = [sys.executable, "-c", code, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    return Row("memory: growth over 50 epochs", float(done.stdout), 2.0, "MiB")


def growth_mib(folder: str) -> float:
    """MiB by which the mean resident set of epochs 35 to 49 is above that of epochs 5 to 19."""
    config = DataConfig(source="", dir=folder, batch_size=256, image_size=32, augment="crop_flip")
    loader = open_data(config, "train", batch_size=256, seed=0)
    sizes = []
    for epoch in range(50):
        _drain(loader.epoch(epoch))
        sizes.append(int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 2**20)
    loader.close()
    return sum(sizes[35:]) / 15 - sum(sizes[5:20]) / 15
