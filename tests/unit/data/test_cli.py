"""The command line: `python -m harness data write | check`."""

import subprocess
import sys
from pathlib import Path

import pytest

from harness.data import cli
from harness.data.sources import KINDS
from tests.unit.data.samples import image_folder


def harness(*argv: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "harness", "data", *map(str, argv)]
    return subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)


def test_write_and_check_an_image_folder(tmp_path: Path):
    images = image_folder(tmp_path / "photos", {"train": {"a": 5, "b": 3}, "val": {"a": 2, "b": 1}})
    (images / "train" / "b" / "broken.jpg").write_bytes(b"\xff\xd8 no more")
    out = tmp_path / "set"
    options = ["--max-size", "50", "--jpeg-share", "1", "--workers", "0"]
    written = harness("write", "--source", f"imagefolder:{images}", "--out", out, *options)
    assert written.returncode == 0, written.stderr
    assert written.stdout.splitlines()[:2] == [
        f"train: 8 images in {out / 'train.beton'}",
        f"val: 3 images in {out / 'val.beton'}",
    ]
    assert "problem: train: " in written.stdout
    assert "broken.jpg does not decode" in written.stdout
    assert "train: 9/9 images, " in written.stderr

    checked = harness("check", out, "--deep")
    assert checked.returncode == 0, checked.stderr
    assert checked.stdout.splitlines()[:2] == ["train: 8 images, ok, 8 decoded", "val: 3 images, ok, 3 decoded"]

    (out / "val.beton").write_bytes((out / "val.beton").read_bytes()[:-1])
    checked = harness("check", out)
    assert checked.returncode == 2
    assert checked.stderr.splitlines()[-1].startswith("error: ")
    assert "bytes but its manifest says" in checked.stderr


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("--source", "imagenet:/x"), "error: unknown source 'imagenet:/x'"),
        (("--source", "digits", "--page-mib", "3"), "error: --page-mib 3: FFCV's pages are powers of two"),
        (("--source", "digits", "--val-labels", "x"), "error: source 'digits': --val-labels and --synsets belong to"),
    ],
)
def test_wrong_options_end_in_one_message(tmp_path: Path, argv: tuple[str, ...], message: str):
    done = harness("write", "--out", tmp_path / "set", *argv)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_the_help_names_every_kind_of_source():
    assert tuple(KINDS.values()) == cli.SOURCE_KINDS
