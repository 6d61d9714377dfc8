"""Every source over a tiny copy of its layout: what it finds, in which order, and what it refuses."""

import io
import json
import os
import pickle
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from scipy.io import savemat

from harness.data.sources import Scan, parse_source
from harness.errors import UserError
from tests.unit.data.samples import WNIDS, file_bytes, image_folder, jpeg, picture

COUNTS = {"train": {"pear": 3, "Apple": 2, "fig": 4}, "val": {"pear": 1, "Apple": 2, "fig": 1}}


def scan(spec: str, **options: object) -> Scan:
    return parse_source(spec, **options).scan()


def first_pixel(spec: str, split: str, number: int) -> list[int]:
    source = parse_source(spec)
    content = source.read(source.scan().splits[split].refs[number])
    image = content if isinstance(content, np.ndarray) else np.asarray(Image.open(io.BytesIO(content)))
    return image[0, 0].tolist()


class TestSpecs:
    @pytest.mark.parametrize(
        ("spec", "message"),
        [
            ("imagefoldr:/x", "unknown source 'imagefoldr:/x': did you mean 'imagefolder:DIR'"),
            ("cifar10", "source 'cifar10' is not of the form cifar10:DIR"),
            ("digits:/x", "source 'digits:/x' is not of the form digits"),
        ],
    )
    def test_wrong_ones(self, spec: str, message: str):
        with pytest.raises(UserError, match=message):
            parse_source(spec)


class TestDigits:
    def test_a_fixed_stratified_split(self):
        found = scan("digits")
        sizes = {split: len(part.labels) for split, part in found.splits.items()}
        assert sizes == {"train": 1438, "val": 359}
        everyone = [ref for part in found.splits.values() for ref in part.refs]
        assert sorted(everyone) == list(range(1797))
        shares = np.bincount(found.splits["val"].labels) / (178, 182, 177, 183, 181, 182, 181, 179, 174, 180)
        assert np.allclose(shares, 0.2, atol=0.003)

    def test_images_are_the_digits_four_times_larger(self):
        from sklearn.datasets import load_digits

        image = parse_source("digits").read(0)
        assert image.shape == (32, 32, 3)
        means = image[..., 0].reshape(8, 4, 8, 4).mean(axis=(1, 3))
        assert np.corrcoef(means.ravel(), load_digits().images[0].ravel())[0, 1] > 0.95


class TestImageFolder:
    def test_classes_and_images_stand_in_torchvisions_order(self, tmp_path: Path):
        found = scan(f"imagefolder:{image_folder(tmp_path, COUNTS)}")
        assert found.classes == ("Apple", "fig", "pear")  # sorted(): capitals first
        assert found.splits["train"].labels.tolist() == [0] * 2 + [1] * 4 + [2] * 3
        assert found.splits["train"].refs[:3] == ["train/Apple/000.jpg", "train/Apple/001.jpg", "train/fig/000.jpg"]
        assert found.splits["val"].labels.tolist() == [0, 0, 1, 2]
        assert found.problems == ()

    def test_an_empty_class_and_other_files_are_problems(self, tmp_path: Path):
        image_folder(tmp_path, COUNTS)
        (tmp_path / "train" / "grape").mkdir()
        (tmp_path / "train" / "fig" / "notes.txt").write_text("x")
        found = scan(f"imagefolder:{tmp_path}")
        assert found.classes == ("Apple", "fig", "grape", "pear")
        assert found.problems == (
            "train/fig: 1 file(s) are no images, such as train/fig/notes.txt",
            "train: class 'grape' (label 2) has no images",
            "val: class 'grape' (label 2) has no images",
        )

    def test_a_validation_class_that_is_not_in_training(self, tmp_path: Path):
        image_folder(tmp_path, {"train": {"a": 1}, "val": {"a": 1, "b": 1}})
        with pytest.raises(UserError, match="validation classes that are not in training: b"):
            scan(f"imagefolder:{tmp_path}")

    def test_a_validation_class_whose_training_folder_is_empty(self, tmp_path: Path):
        image_folder(tmp_path, {"train": {"a": 1, "b": 0}, "val": {"a": 1, "b": 1}})
        with pytest.raises(UserError, match="validation has classes without a training image: 'b'"):
            scan(f"imagefolder:{tmp_path}")

    def test_no_images_at_all(self, tmp_path: Path):
        image_folder(tmp_path, {"train": {"a": 0, "b": 0}, "val": {"a": 1}})
        with pytest.raises(UserError, match="no images at all for the train split"):
            scan(f"imagefolder:{tmp_path}")

    def test_missing_folders(self, tmp_path: Path):
        (tmp_path / "train").mkdir()
        with pytest.raises(UserError, match=r"there is no folder .*/val; expected .*/train/CLASS/IMAGE"):
            scan(f"imagefolder:{tmp_path}")
        (tmp_path / "val").mkdir()
        with pytest.raises(UserError, match=r"no class folders in .*/train"):
            scan(f"imagefolder:{tmp_path}")

    def test_an_unreadable_folder(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        image_folder(tmp_path, COUNTS)
        real = os.scandir

        def scandir(path: str | Path):  # the tests may run as root, whom no mode bits stop
            if str(path).endswith("train/fig"):
                raise PermissionError(13, "Permission denied", str(path))
            return real(path)

        monkeypatch.setattr(os, "scandir", scandir)
        with pytest.raises(UserError, match="folder .*/train/fig cannot be read: Permission denied"):
            scan(f"imagefolder:{tmp_path}")


# ILSVRC2012_ID, WNID, words, gloss, num_children: ids in another order than the sorted names, and one inner node.
SYNSETS = [
    (1, WNIDS[2], "w", "g", 0),
    (2, WNIDS[0], "w", "g", 0),
    (3, WNIDS[1], "w", "g", 0),
    (4, "n09999999", "w", "g", 2),
]


class TestFlatValidationFolder:
    @pytest.fixture
    def root(self, tmp_path: Path) -> Path:
        image_folder(tmp_path, {"train": dict.fromkeys(WNIDS, 1)})
        (tmp_path / "val").mkdir()
        for number in range(1, 5):
            content = jpeg(picture(20, 20, number))
            (tmp_path / "val" / f"ILSVRC2012_val_{number:08d}.JPEG").write_bytes(content)
        return tmp_path

    def labels(self, root: Path, **options: object) -> list[int]:
        return scan(f"imagefolder:{root}", **options).splits["val"].labels.tolist()

    def test_the_devkit_numbers_classes_in_the_order_of_its_mat_file(self, root: Path):
        devkit = root / "ILSVRC2012_devkit_t12" / "data"
        devkit.mkdir(parents=True)
        kinds = [("ILSVRC2012_ID", "O"), ("WNID", "O"), ("words", "O"), ("gloss", "O"), ("num_children", "O")]
        savemat(devkit / "meta.mat", {"synsets": np.array(SYNSETS, kinds)})
        (devkit / "ILSVRC2012_validation_ground_truth.txt").write_text("2\n3\n1\n1\n")
        assert self.labels(root) == [0, 1, 2, 2]

    def test_the_ground_truth_alone_is_not_enough(self, root: Path):
        (root / "ILSVRC2012_validation_ground_truth.txt").write_text("2\n3\n1\n1\n")
        with pytest.raises(UserError, match=r"order of the devkit's meta.mat, which was not found"):
            self.labels(root)

    def test_a_broken_mat_file(self, root: Path):
        (root / "ILSVRC2012_validation_ground_truth.txt").write_text("2\n3\n1\n1\n")
        (root / "meta.mat").write_bytes(b"nothing")
        with pytest.raises(UserError, match=r"meta.mat is not the devkit's meta.mat"):
            self.labels(root)

    def test_a_synset_per_line(self, root: Path):
        (root / "imagenet_2012_validation_synset_labels.txt").write_text("\n".join([WNIDS[k] for k in (1, 0, 2, 1)]))
        assert self.labels(root) == [1, 0, 2, 1]

    def test_kaggles_table_names_images(self, root: Path):
        lines = [f"ILSVRC2012_val_{n:08d},{WNIDS[k]} 1 2 3 4 " for n, k in ((3, 2), (1, 1), (2, 0), (4, 0))]
        (root / "LOC_val_solution.csv").write_text("ImageId,PredictionString\n" + "\n".join(lines))
        assert self.labels(root) == [1, 0, 2, 0]

    def test_names_with_numbers_of_sorted_synsets(self, root: Path, tmp_path: Path):
        path = tmp_path / "elsewhere.txt"
        path.write_text("".join(f"ILSVRC2012_val_{n:08d}.JPEG {k}\n" for n, k in ((1, 2), (2, 1), (3, 0), (4, 2))))
        assert self.labels(root, val_labels=path) == [2, 1, 0, 2]

    def test_no_labels(self, root: Path):
        with pytest.raises(UserError, match="no file gives their labels: put one of LOC_val_solution.csv"):
            self.labels(root)

    def test_too_few_labels(self, root: Path):
        (root / "val.txt").write_text(f"{WNIDS[0]}\n")
        with pytest.raises(UserError, match=r"val.txt has 1 labels, but .*/val has 4 images"):
            self.labels(root)

    def test_a_label_that_is_no_class(self, root: Path):
        (root / "val.txt").write_text(f"{WNIDS[0]}\nn0\n{WNIDS[0]}\n{WNIDS[0]}\n")
        with pytest.raises(
            UserError, match=r"val.txt, line 2: 'n0' is neither a class folder of training nor a number"
        ):
            self.labels(root)


def parquet(path: Path, labels: list[int], names: list[str] | None = None, column: str = "image") -> None:
    colour = [file_bytes(np.full((8, 8, 3), 10 * (k % 25), np.uint8), "PNG") for k in range(len(labels))]
    table = pa.table({column: [{"bytes": c, "path": None} for c in colour], "label": labels})
    if names is not None:
        features = {"info": {"features": {"label": {"names": names, "_type": "ClassLabel"}}}}
        table = table.replace_schema_metadata({"huggingface": json.dumps(features)})
    pq.write_table(table, path, row_group_size=2)


class TestParquet:
    def test_shards_row_groups_and_class_names(self, tmp_path: Path):
        names = ["tench", "goldfish", "shark"]
        parquet(tmp_path / "train-00000-of-00002.parquet", [2, 0, 1], names)
        parquet(tmp_path / "train-00001-of-00002.parquet", [1], names)
        parquet(tmp_path / "validation-00000-of-00001.parquet", [0, 1, 2], names)
        parquet(tmp_path / "test-00000-of-00001.parquet", [-1], names)
        spec = f"parquet:{tmp_path}/*.parquet"
        found = scan(spec)
        assert found.classes == ("tench", "goldfish", "shark")  # the numbering of the labels, not sorted
        assert found.splits["train"].labels.tolist() == [2, 0, 1, 1]
        assert found.splits["val"].labels.tolist() == [0, 1, 2]
        assert [first_pixel(spec, "train", k)[0] for k in range(4)] == [0, 10, 20, 0]

    def test_synset_names_are_sorted_as_torchvision_does(self, tmp_path: Path):
        names = [WNIDS[1], WNIDS[2], WNIDS[0]]
        parquet(tmp_path / "train.parquet", [0, 1, 2], names)
        parquet(tmp_path / "val.parquet", [2, 0, 1], names)
        found = scan(f"parquet:{tmp_path}/*.parquet")
        assert found.classes == WNIDS
        assert found.splits["train"].labels.tolist() == [1, 2, 0]
        assert found.splits["val"].labels.tolist() == [0, 1, 2]

    def test_a_gap_in_the_labels_is_a_problem(self, tmp_path: Path):
        parquet(tmp_path / "train.parquet", [0, 2])
        parquet(tmp_path / "val.parquet", [0])
        assert scan(f"parquet:{tmp_path}/*.parquet").problems[0] == "train: class '1' (label 1) has no images"

    @pytest.mark.parametrize(("labels", "names"), [([0, -1, 1], None), ([0, 5, 1], ["a", "b"])])
    def test_a_label_outside(self, tmp_path: Path, labels: list[int], names: list[str] | None):
        parquet(tmp_path / "train.parquet", labels, names)
        parquet(tmp_path / "val.parquet", [0])
        with pytest.raises(UserError, match=rf"label {labels[1]} of train image number 1 lies outside 0\.\.1"):
            scan(f"parquet:{tmp_path}/*.parquet")

    def test_refusals(self, tmp_path: Path):
        spec = f"parquet:{tmp_path}/*.parquet"
        with pytest.raises(UserError, match=r"no parquet file of the train split \(no file matches\)"):
            scan(spec)
        parquet(tmp_path / "val.parquet", [0])
        parquet(tmp_path / "train.parquet", [0], column="pixels")
        with pytest.raises(UserError, match="has the columns pixels, label; expected images in image or img"):
            scan(spec)
        (tmp_path / "train.parquet").write_bytes(b"PAR1 cut")
        with pytest.raises(UserError, match="is not a parquet file that can be read"):
            scan(spec)


def tar(path: Path, members: list[tuple[str, bytes]]) -> None:
    with tarfile.open(path, "w") as archive:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))


def colour(k: int) -> bytes:
    return file_bytes(np.full((8, 8, 3), 10 * k, np.uint8), "PNG")


class TestTar:
    def test_labels_beside_images(self, tmp_path: Path):
        tar(
            tmp_path / "imagenet1k-train-0000.tar",
            [("a.png", colour(1)), ("a.cls", b"1"), ("b.cls", b"0\n"), ("b.png", colour(2))],
        )
        tar(tmp_path / "imagenet1k-train-0001.tar", [("c/d.png", colour(3)), ("c/d.json", b'{"label": 2}')])
        tar(tmp_path / "imagenet1k-validation-00.tar", [("x.png", colour(4)), ("x.cls", b"2")])
        spec = f"tar:{tmp_path}/*.tar"
        found = scan(spec)
        assert found.classes == ("0", "1", "2")
        assert found.splits["train"].labels.tolist() == [1, 0, 2]
        assert [first_pixel(spec, "train", k)[0] for k in range(3)] == [10, 20, 30]
        assert found.splits["val"].labels.tolist() == [2]
        assert parse_source(spec).describe(found.splits["train"].refs[2]).endswith("train-0001.tar:c/d.png")

    def test_an_image_without_a_label_is_a_problem(self, tmp_path: Path):
        tar(tmp_path / "train.tar", [("a.png", colour(1)), ("a.cls", b"0"), ("b.png", colour(2))])
        tar(tmp_path / "val.tar", [("a.png", colour(1)), ("a.cls", b"0")])
        (problem,) = scan(f"tar:{tmp_path}/*.tar").problems
        assert "train.tar: b.png has no label" in problem

    def test_a_json_that_tells_something_else_is_no_label(self, tmp_path: Path):
        caption = ("a.json", b'{"caption": "an ant"}')
        tar(tmp_path / "train.tar", [("a.png", colour(1)), ("a.cls", b"0"), caption])
        tar(tmp_path / "val.tar", [("a.png", colour(1)), caption, ("b.png", colour(2)), ("b.cls", b"0")])
        found = scan(f"tar:{tmp_path}/*.tar")
        assert {split: part.labels.tolist() for split, part in found.splits.items()} == {"train": [0], "val": [0]}
        assert "val.tar: a.png has no label" in found.problems[0]

    def test_a_cut_shard_and_a_label_that_is_none(self, tmp_path: Path):
        tar(tmp_path / "val.tar", [("a.png", colour(1)), ("a.cls", b"0")])
        tar(tmp_path / "train.tar", [("a.png", colour(1)), ("a.cls", b"zero")])
        with pytest.raises(UserError, match=r"train.tar: a.cls holds no label: b'zero'"):
            scan(f"tar:{tmp_path}/*.tar")
        tar(tmp_path / "train.tar", [("a.png", bytes(5000)), ("a.cls", b"0")])
        (tmp_path / "train.tar").write_bytes((tmp_path / "train.tar").read_bytes()[:3000])
        with pytest.raises(UserError, match=r"train.tar is not a whole, uncompressed tar file"):
            scan(f"tar:{tmp_path}/*.tar")


class Python2Pickler(pickle._Pickler):
    """Writes byte strings as Python 2 wrote them, and with it the official archives."""

    dispatch = dict(pickle._Pickler.dispatch)  # noqa: RUF012 - pickle's way

    def save_bytes(self, content: bytes) -> None:
        self.write(pickle.BINSTRING + len(content).to_bytes(4, "little") + content)

    dispatch[bytes] = save_bytes


def pickled(content: object, kind: type = Python2Pickler) -> bytes:
    buffer = io.BytesIO()
    kind(buffer, protocol=2).dump(content)
    return buffer.getvalue()


def cifar10(folder: Path, *, test: object = None, fine: bool = False, kind: type = Python2Pickler) -> Path:
    """A tiny copy of the official layout, pickled as the original is: byte strings as keys, protocol 2."""
    rng = np.random.default_rng(0)

    def batch(count: int) -> dict[bytes, object]:
        label = b"fine_labels" if fine else b"labels"
        return {b"data": rng.integers(0, 256, (count, 3072)).astype(np.uint8), label: [k % 3 for k in range(count)]}

    inner = folder / ("cifar-100-python" if fine else "cifar-10-batches-py")
    inner.mkdir(parents=True)
    names = {b"fine_label_names" if fine else b"label_names": [b"plane", b"car", b"bird"]}
    files = (
        {"meta": names, "train": batch(6)}
        if fine
        else {"batches.meta": names} | {f"data_batch_{k}": batch(3) for k in range(1, 6)}
    )
    files["test" if fine else "test_batch"] = test if test is not None else batch(4)
    for name, content in files.items():
        (inner / name).write_bytes(pickled(content, kind))
    return inner


class Harmful:
    def __reduce__(self):
        return os.system, ("touch harmed",)


class TestCifar:
    @pytest.mark.parametrize("packed", [False, True])
    def test_images_and_names(self, tmp_path: Path, packed: bool):
        inner = cifar10(tmp_path)
        with (inner / "data_batch_2").open("rb") as file:
            expected = pickle.load(file, encoding="bytes")[b"data"][1].reshape(3, 32, 32).transpose(1, 2, 0)  # noqa: S301
        if packed:
            with tarfile.open(tmp_path / "cifar-10-python.tar.gz", "w:gz") as archive:
                archive.add(inner, inner.name)
            for file in inner.iterdir():
                file.unlink()
            inner.rmdir()
        source = parse_source(f"cifar10:{tmp_path}")
        found = source.scan()
        assert found.classes == ("plane", "car", "bird")
        assert found.splits["train"].labels.tolist() == [0, 1, 2] * 5
        assert (source.read(found.splits["train"].refs[4]) == expected).all()

    def test_cifar100_takes_the_fine_labels(self, tmp_path: Path):
        cifar10(tmp_path, fine=True, kind=pickle._Pickler)
        assert scan(f"cifar100:{tmp_path}").splits["train"].labels.tolist() == [0, 1, 2, 0, 1, 2]

    def test_pickled_code_is_refused_and_not_run(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.chdir(tmp_path)
        cifar10(tmp_path / "set", test=Harmful())
        with pytest.raises(UserError, match=r"the pickle test_batch was refused.*it wants to run (posix|nt)\.system"):
            scan(f"cifar10:{tmp_path / 'set'}")
        assert not (tmp_path / "harmed").exists()

    def test_something_else_in_its_place(self, tmp_path: Path):
        with pytest.raises(UserError, match=r"found neither .*cifar-10-python.tar.gz nor the folder"):
            scan(f"cifar10:{tmp_path / 'nothing'}")
        cifar10(tmp_path, test={b"pixels": 0})
        with pytest.raises(UserError, match="the archive is not cifar10's: KeyError b'data'"):
            scan(f"cifar10:{tmp_path}")
