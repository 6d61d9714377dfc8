"""Writing in one process: what is stored, reported, refused, and gone on with."""

import errno
import fcntl
import json
import os
from pathlib import Path

import numpy as np
import pytest

from harness.data import chunks, data_checksum, ensure, writer
from harness.data.beton import JPEG, read_index
from harness.data.encode import WriteSettings
from harness.data.manifest import load_manifest
from harness.data.pixels import decode
from harness.data.writer import write
from harness.errors import UserError
from tests.unit.data.samples import HALF_JPEG, RAW, Listed, jpeg, picture


def stored_image(folder: Path, split: str, sample: int) -> np.ndarray:
    index = read_index(folder / f"{split}.beton")
    start, size = int(index.offsets[sample]), int(index.sizes[sample])
    payload = (folder / f"{split}.beton").read_bytes()[start : start + size]
    return decode(payload, int(index.modes[sample]), int(index.heights[sample]), int(index.widths[sample]))


def test_raw_images_come_back_bit_by_bit_and_jpegs_nearly(tmp_path: Path):
    images = [picture(40, 30, k) for k in range(40)]
    write(Listed(images, [k % 5 for k in range(40)]), tmp_path, HALF_JPEG, workers=0)
    index = read_index(tmp_path / "val.beton")
    assert index.labels.tolist() == [k % 5 for k in range(20, 40)]
    for k in range(20):
        difference = np.abs(stored_image(tmp_path, "val", k).astype(int) - images[20 + k].astype(int))
        assert difference.mean() <= (5 if index.modes[k] == JPEG else 0)


def test_images_never_cross_a_page(tmp_path: Path):
    images = [np.full((600, 1000, 3), k, np.uint8) for k in range(8)]  # 1.8 MB in pages of 2 MiB
    write(Listed(images), tmp_path, RAW, workers=0)
    index = read_index(tmp_path / "train.beton")
    assert (index.offsets // index.page_bytes).tolist() == [1, 2, 3, 4]
    assert [int(stored_image(tmp_path, "train", k)[0, 0, 0]) for k in range(4)] == [0, 1, 2, 3]


def test_damaged_images_are_left_out_and_reported(tmp_path: Path):
    good = [picture(8, 8, k) for k in range(8)]
    images = [good[0], b"nonsense", jpeg(picture(64, 64, 3))[:900], good[1], good[2], jpeg(good[3][..., 0]), *good[:2]]
    report = write(Listed(images, [0, 1, 1, 1, 0, 0, 1, 1]), tmp_path, RAW, workers=0)
    assert report.written == {"train": 2, "val": 4}
    assert [problem.split(" does")[0] for problem in report.problems] == ["train: image 1", "train: image 2"]
    assert report.changes == {"L": 1}
    assert read_index(tmp_path / "train.beton").labels.tolist() == [0, 1]
    assert json.loads((tmp_path / "report.json").read_text())["problems"] == list(report.problems)
    assert load_manifest(tmp_path, "train").problems == 2


def test_strict_finishes_nothing(tmp_path: Path):
    images = [picture(8, 8, 0), b"nonsense", picture(8, 8, 1), picture(8, 8, 2)]
    with pytest.raises(
        UserError, match=r"listed has 1 problem\(s\), and --strict allows none:\n  train: image 1 does not"
    ):
        write(Listed(images), tmp_path, RAW, workers=0, strict=True)
    assert not list(tmp_path.glob("*.json"))
    assert not list(tmp_path.glob("[!.]*.beton"))


def test_no_usable_image(tmp_path: Path):
    with pytest.raises(
        UserError, match="listed: no image of the train split can be used; 2 problems, the first: image 0"
    ):
        write(Listed([b"x"] * 4), tmp_path, RAW, workers=0)


def test_the_same_command_again_changes_nothing(tmp_path: Path):
    source = Listed([picture(8, 8, k) for k in range(4)])
    write(source, tmp_path, RAW, workers=0)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*.beton")}
    assert write(source, tmp_path, RAW, workers=0).written == {"train": 2, "val": 2}
    assert {path: path.stat().st_mtime_ns for path in tmp_path.glob("*.beton")} == before


def test_what_was_found_out_survives_a_kill_between_the_splits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    good = [picture(8, 8, k) for k in range(8)]
    images = [good[0], b"nonsense", jpeg(good[1][..., 0]), good[2], b"more nonsense", jpeg(good[3][..., 0]), *good[:2]]
    source = Listed(images)
    whole = write(source, tmp_path / "whole", RAW, workers=0)

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as kill:
        finish = writer._SplitWork.finish
        kill.setattr(
            writer._SplitWork, "finish", lambda work, *a: killed() if work.split == "val" else finish(work, *a)
        )
        with pytest.raises(KeyboardInterrupt):
            write(source, tmp_path / "killed", RAW, workers=0)
    for _ in range(2):  # going on, and once more when all is there
        assert write(source, tmp_path / "killed", RAW, workers=0) == whole
        report = json.loads((tmp_path / "killed" / "report.json").read_text())
        assert report == json.loads((tmp_path / "whole" / "report.json").read_text())
    assert [problem.split(" does")[0] for problem in whole.problems] == ["train: image 1", "val: image 4"]
    assert whole.changes == {"L": 2}
    with pytest.raises(UserError, match=r"listed has 1 problem\(s\), and --strict allows none:\n  train: image 1 does"):
        write(source, tmp_path / "killed", RAW, workers=0, strict=True)


def test_another_set_is_not_overwritten(tmp_path: Path):
    write(Listed([picture(8, 8, k) for k in range(4)]), tmp_path, RAW, workers=0)
    with pytest.raises(
        UserError, match=r"already holds the train split of listed, written with .*choose another --out"
    ):
        write(Listed([picture(8, 8, k) for k in range(4)]), tmp_path, HALF_JPEG, workers=0)


def test_a_broken_off_run_goes_on_and_ends_as_if_nothing_happened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    images = [picture(8, 8, k) for k in range(400)]
    write(Listed(images, small=False), tmp_path / "whole", RAW, workers=0)
    read: list[int] = []

    class Breaks(Listed):
        def read(self, ref: int) -> object:
            read.append(ref)
            if ref == 150 and len(read) < 200:
                raise KeyboardInterrupt
            return super().read(ref)

    source = Breaks(images, small=False)
    with pytest.raises(KeyboardInterrupt):
        write(source, tmp_path / "broken", RAW, workers=0)
    assert not list((tmp_path / "broken").glob("*.json"))
    read[:] = range(200)
    write(source, tmp_path / "broken", RAW, workers=0)
    assert read[200:] == list(range(128, 400))  # chunks of 64 were kept
    assert data_checksum(tmp_path / "broken") == data_checksum(tmp_path / "whole")
    assert sorted(path.name for path in (tmp_path / "broken").iterdir()) == [
        ".lock", "report.json", "train.beton", "train.manifest.json", "val.beton", "val.manifest.json",
    ]  # fmt: skip


def test_a_run_with_other_settings_begins_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    class Breaks(Listed):
        broken = False

        def read(self, ref: int) -> object:
            if ref == 150 and not Breaks.broken:
                Breaks.broken = True
                raise KeyboardInterrupt
            return super().read(ref)

    images = [picture(8, 8, k) for k in range(400)]
    with pytest.raises(KeyboardInterrupt):
        write(Breaks(images, small=False), tmp_path, RAW, workers=0)
    write(Breaks(images, small=False), tmp_path, WriteSettings(0, 1.0, page_bytes=2 << 20), workers=0)
    assert load_manifest(tmp_path, "train").jpeg_images == 200


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int):
    def fsync(descriptor: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(chunks.os, "fsync", fsync)
    with pytest.raises(UserError, match=rf"no space left for .* \({os.strerror(code)}\): free some and run the same"):
        write(Listed([picture(8, 8, k) for k in range(4)]), tmp_path, RAW, workers=0)


def test_a_folder_that_cannot_be_made(tmp_path: Path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match=r"cannot write into .*file/data: Not a directory"):
        write(Listed([picture(8, 8, 0)] * 2), tmp_path / "file" / "data", RAW, workers=0)


def test_two_writers_do_not_meet(tmp_path: Path):
    with (tmp_path / ".lock").open("a+b") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="another process is writing a data set into"):
            write(Listed([picture(8, 8, 0)] * 2), tmp_path, RAW, workers=0)


def test_ensure_writes_digits_once(tmp_path: Path):
    checksum = ensure("digits", tmp_path)
    before = (tmp_path / "train.beton").stat().st_mtime_ns
    assert ensure("digits", tmp_path) == checksum == data_checksum(tmp_path)
    assert (tmp_path / "train.beton").stat().st_mtime_ns == before
    # Published with the demo's figures: another value means that the same command trains on other data.
    assert checksum == "96b71d4e9f41ccfa"
