"""`open_data`: batches of a data set folder, through FFCV or through torch and PIL, with the same content."""

import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from harness.config import DataConfig
from harness.data.device import DeviceFeed, HostBatch
from harness.data.manifest import Manifest, Split, open_checked
from harness.data.memory import choose
from harness.data.pipeline import Backend, Pipeline
from harness.data.settings import augment_of, sizes_of
from harness.errors import UserError


def open_data(
    data: DataConfig,
    split: Split,
    *,
    batch_size: int,
    seed: int,
    rank: int = 0,
    world: int = 1,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    epochs: int | None = None,
    stall_limit_s: float = 600.0,
) -> "Loader":
    """Open one split for one rank; `batch_size` is per rank, `epochs` the stage's (for a resizing schedule alone).

    Files are checked against their manifests first. Nothing is read ahead before `epoch` is called.
    Raises `UserError`: no such set, a damaged file, fewer training images than one global batch, no FFCV.
    """
    manifest, index = open_checked(Path(data.dir), split)
    device = torch.device(device)
    train = split == "train"
    memory, order = choose(index.path, data.memory, data.order) if train else ("cache", "random")
    mean, std = np.asarray(data.mean or manifest.mean), np.asarray(data.std or manifest.std)
    table = _table(mean, std, dtype)
    pipeline = Pipeline(
        index=index,
        train=train,
        batch_size=batch_size,
        seed=seed,
        rank=rank,
        world=world,
        image_size=data.image_size if train else data.eval_image_size or data.image_size,
        sizes=sizes_of(data, epochs) if train else (),
        augment=augment_of(data),
        crop_share=data.eval_crop_share,
        order_kind=order,
        memory=memory,
        table=_host_table(table, device),
        fill=np.rint(mean).astype(np.uint8),
        threads=data.workers,
        stall_limit_s=stall_limit_s,
    )
    _check(pipeline)
    return Loader(pipeline, manifest, _backend(data.backend, pipeline), device, table)


def _backend(name: Literal["ffcv", "torch"], pipeline: Pipeline) -> Backend:
    if name == "torch":
        from harness.data.torch_backend import TorchBackend

        return TorchBackend(pipeline)
    from harness.data.ffcv_backend import FFCVBackend

    backend: Backend = FFCVBackend(pipeline)
    return backend


def _table(mean: NDArray[np.float64], std: NDArray[np.float64], dtype: torch.dtype) -> Tensor:
    """(3, 256): byte to normalised number for each channel."""
    levels = np.arange(256, dtype=np.float64)
    return torch.from_numpy((levels - mean[:, None]) / std[:, None]).to(dtype)


def _host_table(table: Tensor, device: torch.device) -> NDArray[Any]:
    """What the host makes of a byte: the number, in numpy's nearest type; or a byte, where the device normalises."""
    if device.type != "cpu":
        return np.tile(np.arange(256, dtype=np.uint8), (3, 1))
    return (table if table.dtype == torch.float32 else table.view(torch.int16)).numpy()


def _check(pipeline: Pipeline) -> None:
    index, augment = pipeline.index, pipeline.augment.kind
    if pipeline.train and len(pipeline) == 0:
        raise UserError(
            f"{index.path} has {len(index)} images, less than one batch of {pipeline.batch_size} on each of "
            f"{pipeline.world} ranks: lower data.batch_size or run.workers"
        )
    if pipeline.train and augment in ("translate", "crop_flip"):
        if pipeline.sizes:
            raise UserError(f"data.resize_schedule goes with 'resized_crop_flip', not with data.augment = {augment!r}")
        shape, size = index.common_shape(), pipeline.image_size
        if shape != (size, size):
            has = "images of different sizes" if shape is None else f"images of {shape[0]} x {shape[1]} pixels"
            raise UserError(
                f"data.augment = {augment!r} shifts images by whole pixels, so they must be of data."
                f"image_size = {size}, but {index.path} has {has}: take 'resized_crop_flip', or set data.image_size"
            )


class Loader:
    """Batches of one rank. `num_samples` counts the whole split; `len()` is this rank's batches of an epoch.

    `stack` names what loads the images; `order` and `memory` say what was chosen; `waited_s` grows by the time that
    batches were not ready when they were asked for (a GPU that is behind is not counted).
    """

    def __init__(
        self, pipeline: Pipeline, manifest: Manifest, backend: Backend, device: torch.device, table: Tensor
    ) -> None:
        self.num_samples = manifest.num_samples
        self.num_classes = len(manifest.classes)
        self.classes = manifest.classes
        self.stack = backend.name
        self.order, self.memory = pipeline.order_kind, pipeline.memory
        self.waited_s = 0.0
        self._pipeline, self._backend = pipeline, backend
        self._dtype = table.dtype
        self._feed = None if device.type == "cpu" else DeviceFeed(table, device)

    def __len__(self) -> int:
        return len(self._pipeline)

    def epoch(self, epoch: int, skip: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield (images, labels) of an epoch from batch number `skip` on.

        images: (n, 3, size, size), channels_last, normalised, of the loader's type and device; labels: (n,) int64. Both
        are views of buffers that are filled again once the next batch is asked for: clone what you keep. On a GPU the
        reader's work on the current stream counts, launched before it asks.
        """
        order = self._pipeline.order(epoch)[skip * self._pipeline.batch_size :]
        batches = self._backend.batches(epoch, order, self._pipeline.size(epoch))
        made = self._timed(batches)
        try:
            yield from map(self._deliver, made) if self._feed is None else self._feed.batches(made)
        finally:
            batches.close()  # type: ignore[attr-defined]

    def indices(self, epoch: int, batch: int) -> Sequence[int]:
        """The samples of this rank's batch number `batch` of an epoch, as numbered in the file."""
        size = self._pipeline.batch_size
        return [int(sample) for sample in self._pipeline.order(epoch)[batch * size : (batch + 1) * size]]

    def close(self) -> None:
        """End the loader's threads and processes."""
        self._backend.close()

    def _timed(self, batches: Iterator[HostBatch]) -> Iterator[HostBatch]:
        while True:
            begin_s = time.perf_counter()
            batch = next(batches, None)
            self.waited_s += time.perf_counter() - begin_s
            if batch is None:
                return
            yield batch

    def _deliver(self, host: HostBatch) -> tuple[Tensor, Tensor]:
        images, labels = map(torch.from_numpy, host)
        return (images if self._dtype == torch.float32 else images.view(self._dtype)).permute(0, 3, 1, 2), labels
