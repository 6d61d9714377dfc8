"""Images per second of the loaders alone, at the ImageNet recipes' crops: on the host, and delivered to the GPU."""

import os
import time
from collections.abc import Iterator
from itertools import count

import torch

from harness.config import DataConfig
from harness.data.loader import Loader, open_data
from harness.data.writer import write
from scripts.gpu.part import Options, main
from scripts.gpu.parts.train import backend
from tests.benchmarks.measure import Estimate, Row, estimate
from tests.benchmarks.photos import Repeated, make_photos

PHOTOS, TIMES, BATCH, SIZE = 512, 16, 512, 176
EPOCHS, LIMIT_S = 5, 5.0
SPARED = 2
"""Cores that are left to the thread that launches kernels, and to the rest of the machine."""
WANTED = 10_000
"""About what ResNet-18 takes of images a second on one A100, as ffcv-imagenet reports it."""


def rows(options: Options) -> Iterator[Row]:
    """What FFCV and the plain backend give, each on the host first."""
    cores = len(os.sched_getaffinity(0))
    photos, times, batch = (16, 4, 16) if options.tiny else (PHOTOS, TIMES, BATCH)
    begin = time.perf_counter()
    root = make_photos(options.work / "photos", photos, cores).root
    yield Row(f"{photos} photos, made by {cores} processes", time.perf_counter() - begin, None, "s")
    folder = options.work / "photos-written"
    begin = time.perf_counter()
    write(Repeated(root, times=times), folder, workers=cores)
    taken = time.perf_counter() - begin
    yield Row(f"{photos * times} photos written, {cores} processes", photos * times / taken, None, "images/s")
    threads = max(1, cores - SPARED)
    for name in (["ffcv"] if backend() == "ffcv" else []) + ["torch"]:
        for device in dict.fromkeys(("cpu", options.device)):
            data = DataConfig(
                source="", dir=str(folder), backend=name, image_size=SIZE, batch_size=batch, workers=threads,
                augment="resized_crop_flip",
            )  # fmt: skip
            loader = open_data(data, "train", batch_size=batch, seed=0, device=device, dtype=torch.bfloat16)
            wanted = WANTED if name == "ffcv" else None
            where = "delivered to the GPU" if device == "cuda" else "on the host"
            figure = rate(loader, device)
            loader.close()
            yield Row(f"{loader.stack}, {threads} threads, {SIZE} px, {where}", figure, None, "images/s",
                      at_least=True, wanted=wanted)  # fmt: skip


def rate(loader: Loader, device: str) -> Estimate:
    """Images per second, a sample an epoch, from the first batch to the last or until time is up."""
    found = []
    begun = time.perf_counter()
    for epoch in count():
        found.append(_epoch(loader, epoch, device, begun + LIMIT_S))
        if epoch + 1 == EPOCHS or time.perf_counter() > begun + LIMIT_S:
            return estimate(found)
    raise AssertionError


def _epoch(loader: Loader, epoch: int, device: str, end: float) -> float:
    images, begin = 0, 0.0
    batches = loader.epoch(epoch)
    for number, (batch, _) in enumerate(batches):
        if number == 0:
            begin = time.perf_counter()
        else:
            images += len(batch)
        if number and time.perf_counter() > end:
            break
    if device == "cuda":
        torch.cuda.synchronize()
    taken = time.perf_counter() - begin
    getattr(batches, "close", lambda: None)()
    return images / taken


if __name__ == "__main__":
    main(rows)
