"""Our files and loader against FFCV's own writer and loader; loaders in other processes; memory over many epochs."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest

from harness.data.beton import read_index
from harness.data.encode import WriteSettings
from harness.data.writer import write
from tests.unit.data.samples import HALF_JPEG, Listed, picture

pytestmark = [pytest.mark.integration, pytest.mark.ffcv]
PIXELS = [picture(40, 40, k) for k in range(24)]
LABELS = [k % 5 for k in range(24)]


def run(code: str, *arguments: str | Path, **environ: str) -> str:
    """The output of a new Python process."""
    command = [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)]
    place = os.environ | environ
    done = subprocess.run(command, capture_output=True, text=True, timeout=110, check=False, env=place)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_ffcvs_own_loader_reads_our_files(tmp_path: Path):
    """The whole of FFCV, compiled as it comes, delivers the images and labels that we wrote."""
    write(Listed(PIXELS, LABELS), tmp_path, HALF_JPEG, workers=0)
    code = """
        import sys, numpy as np
        from ffcv.fields.basics import IntDecoder
        from ffcv.fields.rgb_image import SimpleRGBImageDecoder
        from ffcv.loader import Loader, OrderOption
        pipelines = {"image": [SimpleRGBImageDecoder()], "label": [IntDecoder()]}
        loader = Loader(sys.argv[1], 12, 1, order=OrderOption.SEQUENTIAL, pipelines=pipelines)
        (images, labels), = loader
        np.savez(sys.argv[2], images=images, labels=labels)
    """
    run(code, tmp_path / "train.beton", tmp_path / "read.npz")
    with np.load(tmp_path / "read.npz") as read:
        assert read["labels"].ravel().tolist() == LABELS[:12]
        difference = np.abs(read["images"].astype(int) - np.stack(PIXELS[:12]).astype(int)).mean(axis=(1, 2, 3))
    jpeg = read_index(tmp_path / "train.beton").modes == 0
    assert 0 < jpeg.sum() < 12
    assert difference[~jpeg].max() == 0
    assert difference[jpeg].max() < 5


def test_we_read_the_files_of_ffcvs_own_writer(tmp_path: Path):
    np.savez(tmp_path / "pixels.npz", images=np.stack(PIXELS), labels=LABELS)
    code = """
        import sys, numpy as np
        from ffcv.fields import IntField, RGBImageField
        from ffcv.writer import DatasetWriter
        with np.load(sys.argv[1]) as file:
            samples = list(zip(file["images"], file["labels"].tolist()))
        fields = {"image": RGBImageField(write_mode="raw"), "label": IntField()}
        DatasetWriter(sys.argv[2], fields, page_size=1 << 21, num_workers=1).from_indexed_dataset(samples)
    """
    run(code, tmp_path / "pixels.npz", tmp_path / "theirs.beton")
    index = read_index(tmp_path / "theirs.beton")
    assert index.labels.tolist() == LABELS
    content = (tmp_path / "theirs.beton").read_bytes()
    for sample, (start, size) in enumerate(zip(index.offsets.tolist(), index.sizes.tolist(), strict=True)):
        assert content[start : start + size] == PIXELS[sample].tobytes()


READ = """
    import hashlib, multiprocessing, sys
    from harness.data.loader import open_data
    from tests.unit.data.samples import config

    def digest(folder, results):
        data = config(folder, augment="resized_crop_flip")
        loader = open_data(data, "train", batch_size=4, seed=0)
        whole = hashlib.sha256()
        for images, labels in loader.epoch(0):
            whole.update(images.numpy().tobytes())
        loader.close()
        results.put(whole.hexdigest())
"""


@pytest.mark.parametrize("method", ["spawn", "fork"])
def test_loaders_work_in_other_processes(tmp_path: Path, method: str):
    """Also after a fork, as long as the parent's own loader is closed or the child opens one of its own."""
    write(Listed(PIXELS, LABELS), tmp_path, WriteSettings(0, 0.5, page_bytes=2 << 20), workers=0)
    (tmp_path / "reads.py").write_text(textwrap.dedent(READ))
    code = f"""
        import multiprocessing, sys
        sys.path.insert(0, sys.argv[1])
        from reads import digest
        if __name__ == "__main__":
            context = multiprocessing.get_context("{method}")
            results = context.Queue()
            digest(sys.argv[1], results)
            children = [context.Process(target=digest, args=(sys.argv[1], results)) for _ in range(2)]
            for child in children: child.start()
            print(len({{results.get(timeout=60) for _ in range(3)}}))
            for child in children: child.join(30)
    """
    (tmp_path / "main.py").write_text(textwrap.dedent(code))
    command = [sys.executable, str(tmp_path / "main.py"), str(tmp_path)]
    path = os.environ | {"PYTHONPATH": str(Path(__file__).parents[3])}
    done = subprocess.run(command, capture_output=True, text=True, timeout=110, check=False, env=path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["1"]


@pytest.mark.parametrize("memory", ["cache", "stream"])
def test_memory_stays_flat_over_fifty_epochs(digits: Path, memory: str):
    """Training and validation over the digits: one batch kept an epoch would show as 12 MiB.

    With the allocator told to give everything larger than 64 KiB back at once: else its free lists vary by 20 MiB.
    """
    code = """
        import sys
        from harness.data.loader import open_data
        from tests.unit.data.samples import config

        def resident_mib():
            with open("/proc/self/statm") as file:
                return int(file.read().split()[1]) * 4096 / 2**20

        data = config(sys.argv[1], augment="crop_flip", memory=sys.argv[2])
        loaders = [open_data(data, split, batch_size=32, seed=0) for split in ("train", "val")]
        sizes = []
        for epoch in range(50):
            for loader in loaders:
                for images, labels in loader.epoch(epoch):
                    pass
            sizes.append(resident_mib())
        print(sum(sizes[35:]) / 15 - sum(sizes[5:20]) / 15)
    """
    assert float(run(code, digits, memory, MALLOC_MMAP_THRESHOLD_="65536")) < 2
