"""Writing with several processes, and what becomes of it when they are killed, stall, or the disk is full."""

import multiprocessing
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from harness.data import data_checksum
from harness.data.beton import read_index
from harness.data.encode import WriteSettings
from harness.data.writer import write
from harness.errors import UserError
from tests.unit.data.samples import RAW, Listed, image_folder, picture
from tests.unit.data.test_sources import colour, parquet, tar

pytestmark = pytest.mark.integration
WRITE = [
    sys.executable,
    "-c",
    "from harness.data.cli import app; from harness.errors import run_cli; run_cli(app)",
    "write",
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An image folder of 800 + 40 photos."""
    root = tmp_path_factory.mktemp("photos")
    counts = {"train": {"ant": 400, "bee": 400}, "val": {"ant": 20, "bee": 20}}
    return image_folder(root, counts, side=(150, 300))


def wait_for(condition, limit_s: float = 60.0) -> None:
    deadline = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.02)


def children_of(pid: int) -> list[int]:
    found = []
    for entry in Path("/proc").glob("[0-9]*/stat"):
        try:
            if int(entry.read_text().rsplit(")", 1)[1].split()[1]) == pid:
                found.append(int(entry.parent.name))
        except (OSError, IndexError):
            continue
    return found


def gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"
    except OSError:
        return True


def test_a_killed_writer_leaves_nothing_running_and_goes_on(folders: Path, tmp_path: Path):
    command = [*WRITE, "--source", f"imagefolder:{folders}", "--out", str(tmp_path / "set"), "--workers", "2"]
    shared = set(os.listdir("/dev/shm"))  # noqa: PTH208
    writer = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    try:
        wait_for(lambda: list((tmp_path / "set" / ".partial-train").glob("chunk-*.npz")) or writer.poll() is not None)
        children = children_of(writer.pid)
    finally:
        writer.send_signal(signal.SIGKILL)
        writer.wait(30)
    assert writer.returncode == -signal.SIGKILL
    assert children
    wait_for(lambda: all(map(gone, children)))
    assert set(os.listdir("/dev/shm")) <= shared  # noqa: PTH208
    kept = list((tmp_path / "set" / ".partial-train").glob("chunk-*.npz"))
    assert not (tmp_path / "set" / "train.manifest.json").exists()
    with pytest.raises(UserError, match="no train data set in"):
        data_checksum(tmp_path / "set")

    again = subprocess.run(command, capture_output=True, text=True, timeout=100, check=True)
    assert f"train: {64 * len(kept)}/800 images" in again.stderr.splitlines()[0]
    assert "train: 800 images in" in again.stdout
    write(_source(folders), tmp_path / "whole", workers=0)
    assert data_checksum(tmp_path / "set") == data_checksum(tmp_path / "whole")


def _source(folders: Path):
    from harness.data.sources import parse_source

    return parse_source(f"imagefolder:{folders}")


def test_a_disk_that_fills_up(folders: Path, tmp_path: Path):
    """A limit on the size of files stands for the disk: the workers inherit it."""
    command = [*WRITE, "--source", f"imagefolder:{folders}", "--out", str(tmp_path / "set"), "--workers", "2"]
    limit = 12 << 20
    full = subprocess.run(
        command,
        capture_output=True, text=True, timeout=100, check=False,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY)),
    )  # fmt: skip
    assert full.returncode == 2, full.stderr
    assert f"error: no space left for {tmp_path / 'set'} (File too large): free some and run the same" in full.stderr
    assert "Traceback" not in full.stderr
    again = subprocess.run(command, capture_output=True, text=True, timeout=100, check=True)
    assert "train: 800 images in" in again.stdout


class Stuck(Listed):
    """Images of a storage that stops answering, or kills who asks."""

    def __init__(self, end: str) -> None:
        super().__init__([picture(8, 8, k) for k in range(300)], small=False)
        self.end = end

    def read(self, ref: int) -> object:
        if ref == 100:
            time.sleep(600) if self.end == "silent" else os._exit(9)
        return super().read(ref)


def test_storage_that_does_not_answer_ends_in_a_message(tmp_path: Path):
    began = time.monotonic()
    with pytest.raises(UserError, match=r"no progress for 4 s while writing images from image 64 on: does the storage"):
        write(Stuck("silent"), tmp_path, RAW, workers=2, limit_s=4.0)
    assert time.monotonic() - began < 60
    assert multiprocessing.active_children() == []


def test_a_writing_process_that_dies_ends_in_a_message(tmp_path: Path):
    with pytest.raises(UserError, match=r"a writing process died \(killed, or out of memory\)"):
        write(Stuck("deadly"), tmp_path, RAW, workers=2)
    assert multiprocessing.active_children() == []


def test_the_number_of_processes_changes_nothing(tmp_path: Path):
    source = Listed([picture(30, 40, k) for k in range(300)], [k % 3 for k in range(300)], small=False)
    settings = WriteSettings(max_size=35, jpeg_share=0.5, page_bytes=2 << 20)
    for workers in (0, 3):
        write(source, tmp_path / str(workers), settings, workers=workers)
    assert data_checksum(tmp_path / "0") == data_checksum(tmp_path / "3")


@pytest.mark.parametrize("kind", ["parquet", "tar"])
def test_shards_are_written_by_several_processes(tmp_path: Path, kind: str):
    """From command line to pixels: labels and colours arrive in the order of the shards."""
    labels = [k % 3 for k in range(150)]
    if kind == "parquet":
        parquet(tmp_path / "train-0.parquet", labels)
        parquet(tmp_path / "validation-0.parquet", [0, 1, 2])
    else:
        members = [(colour(k % 25), label) for k, label in enumerate(labels)]
        pairs = [((f"{k}.png", image), (f"{k}.cls", b"%d" % label)) for k, (image, label) in enumerate(members)]
        tar(tmp_path / "train-0.tar", [member for pair in pairs for member in pair])
        tar(tmp_path / "val-0.tar", [member for pair in pairs[:3] for member in pair])
    source = f"{kind}:{tmp_path}/*.{kind}"
    options = ["--jpeg-share", "0", "--workers", "2"]
    command = [*WRITE, "--source", source, "--out", str(tmp_path / "set"), *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=True)
    assert done.stdout.splitlines()[0] == f"train: 150 images in {tmp_path / 'set' / 'train.beton'}"
    index = read_index(tmp_path / "set" / "train.beton")
    content = (tmp_path / "set" / "train.beton").read_bytes()
    assert index.labels.tolist() == labels
    assert [content[offset] for offset in index.offsets] == [10 * (k % 25) for k in range(150)]
