"""Files and manifests: what FFCV itself reads in them, and a sentence for every way in which they break."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from harness.data.beton import (
    ALLOCATION,
    FIELD,
    HEADER,
    SAMPLE,
    SAMPLES_START,
    DamagedFileError,
    head_bytes,
    read_index,
)  # fmt: skip
from harness.data.check import check
from harness.data.manifest import data_checksum, load_manifest, open_checked, save_manifest
from harness.data.writer import write
from harness.errors import UserError
from tests.unit.data.samples import HALF_JPEG, RAW, Listed, picture


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """8 + 8 images of different sizes, some JPEG and some raw, in three classes."""
    images = [picture(20 + k, 30 - k, k) for k in range(16)]
    write(Listed(images, [k % 3 for k in range(16)]), tmp_path, HALF_JPEG, workers=0)
    return tmp_path


@pytest.mark.ffcv
def test_ffcv_reads_the_same_tables(folder: Path):
    from ffcv.fields import IntField, RGBImageField
    from ffcv.reader import Reader

    import harness.data.ffcv_backend  # noqa: F401 - imports ffcv without its compilation

    reader, index = Reader(str(folder / "train.beton")), read_index(folder / "train.beton")
    assert {name: type(field) for name, field in reader.handlers.items()} == {"image": RGBImageField, "label": IntField}
    assert reader.num_samples == 8
    image = reader.metadata["f0"]
    assert (image["height"] == index.heights).all()
    assert (image["width"] == index.widths).all()
    assert (image["mode"] == index.modes).all()
    assert (image["data_ptr"] == index.offsets.astype(np.uint64)).all()
    assert reader.metadata["f1"].tolist() == [0, 1, 2, 0, 1, 2, 0, 1]
    assert (np.sort(reader.alloc_table["ptr"]) == np.sort(index.offsets.astype(np.uint64))).all()
    assert 0 < (index.modes == 0).sum() < 8


def test_the_manifest_tells_what_the_file_holds(folder: Path):
    manifest, _ = open_checked(folder, "train")
    assert manifest.num_samples == 8
    assert manifest.class_counts == (3, 3, 2)
    assert manifest.height_range == (20, 27)
    assert manifest.jpeg_images + manifest.raw_images == 8
    means = np.mean([picture(20 + k, 30 - k, k).mean(axis=(0, 1)) for k in range(8)], axis=0)
    assert np.allclose(manifest.mean, means, atol=1e-3)
    assert load_manifest(folder, "val").mean == manifest.mean


def cut(path: Path, size: int) -> None:
    with path.open("r+b") as file:
        file.truncate(size)


def overwrite(path: Path, offset: int, content: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(content)


def fit_manifest(folder: Path) -> None:
    """Make the manifest believe the file's size, so that the next check speaks."""
    manifest = load_manifest(folder, "train")
    save_manifest(folder, manifest.model_copy(update={"file_bytes": (folder / "train.beton").stat().st_size}))


def rename_field(path: Path) -> None:
    overwrite(path, HEADER.itemsize + 1, b"pixels\0")


def two_more_fields(path: Path) -> None:
    overwrite(path, 2, np.array([4], "<u2").tobytes())


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (Path.unlink, r"data set file not found: .*train.beton. Write it with"),
    "empty": (lambda path: path.write_bytes(b""), r"train.beton is empty \(0 bytes\)"),
    "cut header": (lambda path: cut(path, 100), r"is cut inside its header: 100 bytes, \d+ at least"),
    "cut records": (
        lambda path: cut(path, SAMPLES_START + 30),
        r"is cut: its header promises 8 samples, whose records alone need",
    ),
    "cut in half": (
        lambda path: cut(path, path.stat().st_size // 2),
        r"is cut or incomplete: its allocation table of 8",
    ),
    "cut allocation table": (
        lambda path: cut(path, path.stat().st_size - 24),
        r"allocation table of 8 entries should fill",
    ),
    "garbage": (
        lambda path: path.write_bytes(np.random.default_rng(0).bytes(5000)),
        r"is not an FFCV file of version 2: version \d+, pages of \d+ bytes",
    ),
    "other field": (rename_field, r"has the wrong fields \(pixels, label\); expected an RGB image `image`"),
    "more fields": (two_more_fields, r"has the wrong fields \(image, label, .*\)"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_named_by_the_file_itself(folder: Path, kind: str):
    harm, message = DAMAGE[kind]
    path = folder / "train.beton"
    harm(path)
    with pytest.raises(UserError, match=message):
        read_index(path)
    if path.exists():
        fit_manifest(folder)
        with pytest.raises(DamagedFileError, match=message + r".*Write it again: delete .* --source listed --out"):
            open_checked(folder, "train")


def tamper(path: Path, what: str) -> None:
    index = read_index(path)
    record, entry = SAMPLES_START + 2 * SAMPLE.itemsize, index.pages_end + 2 * ALLOCATION.itemsize
    changes = {
        "order": (entry, np.array([7], "<u8")),
        "offset": (entry + 8, index.offsets[2:3].astype("<u8") + np.uint64(1)),
        "outside": (entry + 16, np.array([1 << 40], "<u8")),
        "mode": (record, np.array([9], "<u1")),
        "sides": (record + 1, np.array([3000], "<u2")),
    }
    offset, value = changes[what]
    overwrite(path, offset, value.tobytes())


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("order", "the allocation table does not name every sample once"),
        ("offset", "the allocation table and the sample's record disagree"),
        ("outside", "an image lies outside the pages"),
        ("mode", "an image is neither JPEG nor raw"),
        ("sides", "a raw image has the wrong size"),
    ],
)
def test_tables_that_contradict_themselves(tmp_path: Path, what: str, message: str):
    write(Listed([picture(8, 8, k) for k in range(8)]), tmp_path, RAW, workers=0)
    tamper(tmp_path / "train.beton", what)
    with pytest.raises(DamagedFileError, match=f"train.beton is damaged: {message}"):
        read_index(tmp_path / "train.beton")


def test_a_file_of_another_size_than_its_manifest_says(folder: Path):
    cut(folder / "train.beton", 5_000_000)
    with pytest.raises(DamagedFileError, match=r"has 5000000 bytes but its manifest says \d+: it was cut or replaced"):
        open_checked(folder, "train")


def test_changed_labels_do_not_match_the_manifest(folder: Path):
    overwrite(folder / "train.beton", SAMPLES_START + 16, np.array([2], "<i8").tobytes())
    with pytest.raises(DamagedFileError, match="records and tables do not match the manifest's checksum"):
        open_checked(folder, "train")


def test_changed_pixels_do_not_match_the_manifest(folder: Path):
    index = read_index(folder / "train.beton")
    raw = int(np.flatnonzero(index.modes == 1)[0])
    overwrite(folder / "train.beton", int(index.offsets[raw]) + 5, b"\x00\x01\x02")
    with pytest.raises(DamagedFileError, match="the image bytes do not match the manifest's checksum"):
        open_checked(folder, "train")
    with pytest.raises(UserError, match="the image bytes do not match"):
        check(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_samples": 7}, "has 8 samples but its manifest says 7"),
        ({"classes": ["a"], "class_counts": [8]}, "labels run from 0 to 2, but the manifest names 1 classes"),
    ],
)
def test_a_manifest_of_something_else(folder: Path, change: dict[str, object], message: str):
    path = folder / "train.manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(DamagedFileError, match=message):
        open_checked(folder, "train")


@pytest.mark.parametrize("text", ["{}", "not json", '{"schema": 99}'])
def test_a_manifest_that_is_none(folder: Path, text: str):
    (folder / "train.manifest.json").write_text(text)
    with pytest.raises(DamagedFileError, match="is not a manifest of schema 1"):
        load_manifest(folder, "train")


def test_a_file_without_a_manifest_is_no_data_set(folder: Path):
    (folder / "val.manifest.json").unlink()
    with pytest.raises(
        UserError, match=r"no val data set in .*; val.manifest.json is missing, so the file beside it is not"
    ):
        open_checked(folder, "val")
    with pytest.raises(UserError, match=r"no train data set in .*nowhere. Write it with `python -m harness data write"):
        data_checksum(folder / "nowhere")


def test_the_checksum_names_content_not_places(tmp_path: Path, folder: Path):
    images = [picture(9, 9, k) for k in range(4)]
    places = [tmp_path / name for name in ("a", "b", "c", "d")]
    sources = [Listed(images), Listed(images), Listed(images[::-1]), Listed(images, [0, 1, 0, 1])]
    sources[1].spec = "elsewhere"
    for place, source in zip(places, sources, strict=True):
        write(source, place, RAW, workers=0)
    first, second, *others = [data_checksum(place) for place in places]
    assert first == second
    assert len({first, *others}) == 3


def test_check_deep_names_damaged_jpegs(folder: Path):
    heard: list[str] = []
    checked = check(folder, deep=True, progress=lambda what, _done, _total: heard.append(what))
    assert [each.decoded for each in checked] == [8, 8]
    assert {"train, decoding", "val, decoding"} <= set(heard)
    index = read_index(folder / "val.beton")
    sample = int(np.flatnonzero(index.modes == 0)[1])
    overwrite(folder / "val.beton", int(index.offsets[sample]) + int(index.sizes[sample]) // 2, bytes(400))
    pretend = check.__globals__["images_digest"](index)
    manifest = load_manifest(folder, "val")
    save_manifest(folder, manifest.model_copy(update={"checksums": manifest.checksums | {"images": pretend}}))
    with pytest.raises(UserError, match=rf"val.beton: \d+ image\(s\) do not decode: sample {sample} does not decode"):
        check(folder, deep=True)


def test_head_bytes_has_the_published_layout():
    head = head_bytes(np.zeros(3, SAMPLE), 1 << 21, 12345)
    assert HEADER.itemsize == 24
    assert FIELD.itemsize == 1 + 16 + 1024
    assert SAMPLE.itemsize == 24
    assert len(head) == 24 + 2 * 1041 + 3 * 24
    header = np.frombuffer(head, HEADER, 1)[0]
    assert header.item() == (2, 2, 1 << 21, 3, 12345)
