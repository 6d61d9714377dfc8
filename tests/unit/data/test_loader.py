"""Both backends: the same batches, exact resumption, counts, types, sizes; and what the settings may not be."""

import itertools
import logging
import multiprocessing
import os
import shutil
import signal
import sys
import threading
import time
from pathlib import Path
from typing import NoReturn

import numpy as np
import pytest
import torch
from torch import Tensor

from harness.data import torch_backend
from harness.data.loader import Loader, open_data
from harness.data.manifest import load_manifest
from harness.errors import UserError
from tests.unit.data.samples import config

BACKENDS = [pytest.param("ffcv", marks=pytest.mark.ffcv), "torch"]
PHOTOS = {"image_size": 48, "augment": "resized_crop_flip", "eval_crop_share": 0.875}


def epoch(loader: Loader, number: int = 0, skip: int = 0) -> list[tuple[Tensor, Tensor]]:
    batches = [(images.clone(), labels.clone()) for images, labels in loader.epoch(number, skip)]
    loader.close()
    return batches


def load(folder: Path, split: str = "train", **changes: object) -> Loader:
    options = {
        "batch_size": 8,
        "seed": 1,
        "rank": 0,
        "world": 1,
        "dtype": torch.float32,
        "device": "cpu",
        "epochs": None,
    }
    place = {name: changes.pop(name, default) for name, default in options.items()}
    return open_data(config(folder, **changes), split, **place)


def levels(folder: Path, images: Tensor) -> Tensor:
    """Back to 0..255."""
    manifest = load_manifest(folder, "train")
    return images * torch.tensor(manifest.std).view(3, 1, 1) + torch.tensor(manifest.mean).view(3, 1, 1)


def same(a: list[tuple[Tensor, Tensor]], b: list[tuple[Tensor, Tensor]]) -> bool:
    return len(a) == len(b) and all(
        torch.equal(x, y) and torch.equal(m, n) for (x, m), (y, n) in zip(a, b, strict=True)
    )


@pytest.mark.ffcv
class TestAgreement:
    @pytest.mark.parametrize("split", ["train", "val"])
    def test_raw_pixels_without_resizing_agree_bit_by_bit(self, digits: Path, split: str):
        ours, theirs = (epoch(load(digits, split, backend=b, augment="crop_flip"), 3) for b in ("ffcv", "torch"))
        assert same(ours, theirs)

    @pytest.mark.parametrize("changes", [{}, {"color_jitter": (0.4, 0.4, 0.4), "cutout": 16}])
    def test_training_images_agree(self, photos: Path, changes: dict[str, object]):
        """The same crops, flips, colours and holes, so each image can be compared, not only the distribution.

        FFCV decodes JPEG with turbojpeg's fast inverse transform, PIL with the exact one: half a level darker on the
        mean, a few levels at most. Crops are then averaged over areas.
        """
        ours, theirs = (epoch(load(photos, backend=b, **PHOTOS | changes)) for b in ("ffcv", "torch"))
        assert [m.tolist() for _, m in ours] == [n.tolist() for _, n in theirs]
        difference = torch.cat(
            [levels(photos, x) - levels(photos, y) for (x, _), (y, _) in zip(ours, theirs, strict=True)]
        )
        assert difference.abs().max() < (12 if changes else 6)
        assert difference.abs().mean() < (0.8 if changes else 0.4)
        assert abs(difference.mean()) < 0.5

    def test_eval_images_agree(self, photos: Path):
        """Within a level where pixels are stored; where JPEG is, within what two inverse transforms may differ by."""
        ours, theirs = (
            torch.cat([x for x, _ in epoch(load(photos, "val", backend=b, **PHOTOS))]) for b in ("ffcv", "torch")
        )
        difference = (levels(photos, ours) - levels(photos, theirs)).abs().amax(dim=(1, 2, 3))
        from harness.data.beton import read_index

        jpeg = torch.from_numpy(read_index(photos / "val.beton").modes == 0)
        assert difference[~jpeg].max() < 1.01
        assert difference[jpeg].max() < 5.01


@pytest.mark.parametrize("backend", BACKENDS)
class TestBatches:
    def test_shape_type_layout_and_labels(self, digits: Path, backend: str):
        loader = load(digits, backend=backend)
        images, labels = epoch(loader)[0]
        assert images.shape == (8, 3, 32, 32)
        assert images.dtype == torch.float32
        assert next(iter(load(digits, backend=backend).epoch(0)))[0].is_contiguous(memory_format=torch.channels_last)
        assert labels.dtype == torch.int64
        assert (loader.num_samples, loader.num_classes, len(loader)) == (1438, 10, 179)
        assert loader.stack.startswith(backend)

    def test_normalised_by_the_training_images(self, digits: Path, backend: str):
        images = torch.cat([x for x, _ in epoch(load(digits, backend=backend, batch_size=2))])
        assert torch.allclose(images.mean(dim=(0, 2, 3)), torch.zeros(3), atol=2e-3)
        assert torch.allclose(images.std(dim=(0, 2, 3)), torch.ones(3), atol=2e-3)

    def test_normalised_as_told(self, digits: Path, backend: str):
        told = {"mean": (0.0, 10.0, 20.0), "std": (255.0, 255.0, 51.0)}
        plain, moved = (epoch(load(digits, "val", backend=backend, **k))[0][0] for k in ({}, told))
        expected = (levels(digits, plain) - torch.tensor(told["mean"]).view(3, 1, 1)) / torch.tensor(told["std"]).view(
            3, 1, 1
        )
        assert torch.allclose(moved, expected, atol=1e-5)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_half_precision_is_the_rounded_full(self, digits: Path, backend: str, dtype: torch.dtype):
        full, half = (epoch(load(digits, "val", backend=backend, dtype=t))[0][0] for t in (torch.float32, dtype))
        assert half.dtype == dtype
        assert torch.equal(half, full.to(dtype))

    @pytest.mark.parametrize("skip", [0, 1, 5, 17, 18])
    def test_an_epoch_goes_on_from_any_batch(self, photos: Path, backend: str, skip: int):
        def loader() -> Loader:
            return load(photos, backend=backend, batch_size=3, world=1, **PHOTOS)

        whole = epoch(loader(), 4)
        assert same(epoch(loader(), 4, skip), whole[skip:])

    def test_the_same_again_and_other_epochs_other_images(self, photos: Path, backend: str):
        loader = load(photos, backend=backend, **PHOTOS)
        first, again, other = ([x.clone() for x, _ in loader.epoch(k)] for k in (0, 0, 1))
        loader.close()
        assert all(map(torch.equal, first, again))
        assert not any(map(torch.equal, first, other))

    def test_validation_counts_every_sample_once_over_ranks(self, digits: Path, backend: str):
        loaders = [load(digits, "val", backend=backend, batch_size=50, rank=r, world=3) for r in range(3)]
        labels = [torch.cat([m for _, m in epoch(loader)]) for loader in loaders]
        assert [len(loader) for loader in loaders] == [3, 3, 3]
        assert sum(map(len, labels)) == 359
        assert tuple(torch.bincount(torch.cat(labels)).tolist()) == load_manifest(digits, "val").class_counts

    def test_training_batches_are_equal_over_ranks_and_indices_name_their_samples(self, digits: Path, backend: str):
        from harness.data.beton import read_index

        stored = read_index(digits / "train.beton").labels
        seen: list[int] = []
        for rank in range(2):
            loader = load(digits, backend=backend, batch_size=100, rank=rank, world=2)
            batches = epoch(loader, 2)
            assert [len(m) for _, m in batches] == [100] * 7
            for number, (_, labels) in enumerate(batches):
                indices = loader.indices(2, number)
                assert stored[indices].tolist() == labels.tolist()
                seen += indices
        assert len(set(seen)) == len(seen) == 1400

    def test_a_rank_without_validation_images(self, photos: Path, backend: str):
        lone = load(photos, "val", backend=backend, rank=0, world=100, **PHOTOS)
        assert (len(lone), epoch(lone)) == (0, [])

    def test_sizes_follow_the_schedule(self, photos: Path, backend: str):
        schedule = ((0.0, 32), (0.5, 40), (0.75, 48))
        loader = load(photos, backend=backend, epochs=8, **PHOTOS | {"resize_schedule": schedule})
        sides = [next(iter(loader.epoch(number)))[0].shape[-1] for number in range(8)]
        loader.close()
        assert sides == [32] * 4 + [40] * 2 + [48] * 2
        assert epoch(load(photos, "val", backend=backend, **PHOTOS | {"eval_image_size": 64}))[0][0].shape[-1] == 64

    def test_the_wait_for_batches_is_counted_and_the_readers_time_is_not(
        self, digits: Path, backend: str, monkeypatch: pytest.MonkeyPatch
    ):
        loader = load(digits, "val", backend=backend, batch_size=120)
        ticks = itertools.count()  # a clock that gains a second whenever somebody looks
        monkeypatch.setattr("harness.data.loader.time.perf_counter", lambda: float(next(ticks)))
        for _ in loader.epoch(0):
            next(ticks)
        loader.close()
        assert loader.waited_s == 4.0, "three batches and the end"

    def test_stopping_early_leaves_no_thread(self, photos: Path, backend: str):
        before = threading.active_count()
        loader = load(photos, backend=backend, workers=1, **PHOTOS)
        for number in range(5):
            for _ in loader.epoch(number):
                break
        batches = loader.epoch(7)
        next(batches)
        loader.close()
        del batches
        assert threading.active_count() == before

    def test_a_file_that_is_cut_while_it_is_open_is_a_message_and_no_sigbus(
        self, pixels: Path, tmp_path: Path, backend: str
    ):
        folder = shutil.copytree(pixels, tmp_path / "cut")
        loader = load(folder, backend=backend, **PHOTOS)
        for _ in loader.epoch(0):
            pass
        shutil.copy(folder / "train.beton", folder / "new")
        (folder / "new").replace(folder / "train.beton")
        assert len(list(loader.epoch(1))) == len(loader), "a file put in its place does not matter"
        loader.close()
        loader = load(folder, backend=backend, **PHOTOS)
        with (folder / "train.beton").open("r+b") as file:
            file.truncate(1 << 20)
        with pytest.raises(
            UserError, match=r"train.beton was cut to 1048576 bytes while it was in use. Write it again"
        ):
            list(loader.epoch(1))
        loader.close()

    def test_a_damaged_jpeg_is_named(self, damaged: tuple[Path, int], backend: str):
        folder, sample = damaged
        with pytest.raises(
            UserError, match=rf"train.beton: the image of sample {sample} does not decode \(damaged JPEG\)"
        ):
            epoch(load(folder, backend=backend, **PHOTOS))


def test_a_damaged_jpeg_is_named_by_loading_processes_as_well(damaged: tuple[Path, int]):
    folder, sample = damaged
    with pytest.raises(UserError, match=rf"^{folder}/train.beton: the image of sample {sample} does not decode"):
        epoch(load(folder, backend="torch", workers=2, **PHOTOS))


def test_loading_processes_change_nothing(photos: Path):
    colours = PHOTOS | {"color_jitter": (0.4, 0.4, 0.4), "cutout": 16}
    assert same(*(epoch(load(photos, backend="torch", workers=n, **colours)) for n in (1, 2)))


@pytest.mark.parametrize("victims", [1, 2])
def test_a_loading_process_that_is_killed_is_a_message_and_the_next_epoch_has_new_ones(photos: Path, victims: int):
    before = multiprocessing.active_children()
    loader = load(photos, backend="torch", workers=2, batch_size=1, **PHOTOS)
    batches = loader.epoch(0)
    next(batches)
    processes = [process for process in multiprocessing.active_children() if process not in before]
    assert len(processes) == 2
    for process in processes[:victims]:
        os.kill(process.pid, signal.SIGKILL)
    with pytest.raises(
        UserError, match=r"a loading process of .*train.beton \(pid \d+\) ended by SIGKILL.*data.workers"
    ):
        list(batches)
    assert same(epoch(loader, 1), epoch(load(photos, backend="torch", batch_size=1, **PHOTOS), 1))


class Stuck(torch_backend._Images):
    """What a file server that answers no more makes of a loading process."""

    def batch(self, *request: object) -> NoReturn:
        while True:
            time.sleep(60)


def test_loading_processes_that_stand_still_are_an_error(photos: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch_backend, "_Images", Stuck)
    data = config(photos, backend="torch", workers=2, **PHOTOS)
    loader = open_data(data, "train", batch_size=8, seed=0, stall_limit_s=2.0)
    with pytest.raises(UserError, match=r"a loading process of .*train.beton \(pid \d+\) made no batch for 2 s"):
        next(loader.epoch(0))


@pytest.fixture
def damaged(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, int]:
    """A copy with one JPEG cut short, and a manifest that does not know (as after `data write` on a failing disk)."""
    from harness.data import manifest
    from harness.data.beton import read_index

    folder = shutil.copytree(photos, tmp_path / "damaged")
    index = read_index(folder / "train.beton")
    sample = int(np.flatnonzero(index.modes == 0)[7])
    with (folder / "train.beton").open("r+b") as file:
        file.seek(int(index.offsets[sample]) + int(index.sizes[sample]) // 2)
        file.write(bytes(int(index.sizes[sample]) // 2))
    monkeypatch.setattr(manifest, "VERIFY_WHOLE_BYTES", 0)
    return folder, sample


@pytest.mark.ffcv
class TestFFCV:
    def test_batches_do_not_depend_on_the_number_of_threads(self, photos: Path):
        colours = PHOTOS | {"color_jitter": (0.4, 0.4, 0.4), "cutout": 16}
        for changes in (PHOTOS, colours):
            one, *others = (epoch(load(photos, workers=n, **changes)) for n in (1, 2, 3))
            assert all(same(one, other) for other in others)

    def test_streaming_delivers_what_mapping_does(self, pixels: Path):
        options = PHOTOS | {"order": "quasi_random"}
        for rank in range(2):
            place = {"batch_size": 4, "rank": rank, "world": 2}
            assert same(*(epoch(load(pixels, memory=m, **place, **options), 5) for m in ("cache", "stream")))

    def test_streaming_holds_few_pages(self, pixels: Path):
        loader = load(pixels, memory="stream", batch_size=4, **PHOTOS)
        assert loader.order == "quasi_random"
        batches = loader.epoch(0)
        for _ in range(10):
            next(batches)
        storage = loader._backend._active.storage_state
        assert 0 < len(storage._buffers) <= 3
        batches.close()

    def test_a_file_that_is_cut_while_it_streams_is_a_message(self, pixels: Path, tmp_path: Path):
        folder = shutil.copytree(pixels, tmp_path / "cut")
        loader = load(folder, memory="stream", **PHOTOS)
        with (folder / "train.beton").open("r+b") as file:
            file.truncate(3 << 20)
        with pytest.raises(UserError, match=r"train.beton ended at byte \d+ while it was read"):
            list(loader.epoch(0))
        loader.close()

    def test_torchs_threads_are_left_alone(self, photos: Path):
        before = torch.get_num_threads()
        epoch(load(photos, workers=2, **PHOTOS))
        assert torch.get_num_threads() == before

    def test_an_error_in_the_thread_reaches_the_caller(self, photos: Path, monkeypatch: pytest.MonkeyPatch):
        loader = load(photos, **PHOTOS)

        def fail(*args: object) -> None:
            raise ZeroDivisionError("in the loader's thread")

        monkeypatch.setattr(type(loader._pipeline), "plan", fail)
        with pytest.raises(ZeroDivisionError, match="in the loader's thread"):
            epoch(loader)

    def test_a_loader_that_stands_still_is_an_error(self, photos: Path, monkeypatch: pytest.MonkeyPatch):
        release = threading.Event()
        loader = open_data(config(photos, **PHOTOS), "train", batch_size=8, seed=0, stall_limit_s=1.0)
        monkeypatch.setattr(type(loader._pipeline), "plan", lambda *args: release.wait())
        try:
            with pytest.raises(
                UserError, match="the loader's thread made no batch for 1 s while it read .*train.beton"
            ):
                next(loader.epoch(0))
        finally:
            release.set()

    def test_without_ffcv_the_message_says_what_to_do(self, photos: Path, monkeypatch: pytest.MonkeyPatch):
        for name in [name for name in sys.modules if name.split(".")[0] == "ffcv"] + ["harness.data.ffcv_backend"]:
            monkeypatch.delitem(sys.modules, name)
        monkeypatch.setitem(sys.modules, "ffcv._libffcv", None)
        with pytest.raises(
            UserError, match=r"FFCV cannot be loaded here .*Build it with `make setup`, or set data.backend"
        ):
            load(photos)


class TestSettings:
    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            (
                {"batch_size": 100},
                r"has 60 images, less than one batch of 100 on each of 1 ranks: lower data.batch_size",
            ),
            (
                {"augment": "translate"},
                r"data.augment = 'translate' shifts .* data.image_size = 32, but .* different sizes",
            ),
            (
                {"memory": "stream", "order": "random"},
                r"data.order = 'random' reads train.beton all over, which streaming",
            ),
            (
                {"resize_schedule": ((0.0, 32),), "epochs": 4, "augment": "translate"},
                r"resize_schedule goes with 'resized_c",
            ),
            ({"resize_schedule": ((0.0, 32),)}, r"resize_schedule needs the stage's number of epochs"),
            ({"resize_schedule": ((0.5, 32), (0.0, 40)), "epochs": 4}, r"shares that begin at 0.0 and rise"),
        ],
    )
    def test_impossible_ones(self, photos: Path, changes: dict[str, object], message: str):
        with pytest.raises(UserError, match=message):
            load(photos, backend="torch", **changes)

    def test_shifts_want_images_of_the_output_size(self, digits: Path):
        with pytest.raises(UserError, match=r"image_size = 28, but .*train.beton has images of 32 x 32 pixels"):
            load(digits, augment="crop_flip", image_size=28, backend="torch")

    def test_the_choice_of_memory_is_logged(self, photos: Path, caplog: pytest.LogCaptureFixture):
        caplog.set_level(logging.INFO, "harness.data")
        load(photos, backend="torch").close()
        load(photos, backend="torch", memory="stream").close()
        texts = [record.getMessage() for record in caplog.records]
        assert texts[0].endswith("cached by the system, random order")
        assert texts[1].endswith("data.memory = 'stream': streamed in pages, quasi-random order")
        assert f"{os.path.getsize(photos / 'train.beton') / 2**30:.1f} GiB, memory" in texts[0]  # noqa: PTH202
