"""Labels for ImageNet's flat validation folder, from any of the files in which they are handed on."""

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path

from harness.errors import UserError

_GROUND_TRUTH = "ILSVRC2012_validation_ground_truth.txt"
_LABEL_FILES = (
    "LOC_val_solution.csv", "imagenet_2012_validation_synset_labels.txt", "val.txt", "val_labels.txt", _GROUND_TRUTH,
)  # fmt: skip
_FOLDERS = (".", "val", "devkit/data", "ILSVRC2012_devkit_t12/data", "data")


def labels_of_flat_folder(
    root: Path, names: Sequence[str], classes: Mapping[str, int], labels: Path | None, synsets: Path | None
) -> list[int]:
    """Class numbers of the sorted image `names`; `classes` numbers the folder names (WordNet ids) of training.

    Understood are: Kaggle's LOC_val_solution.csv; lines `name wnid` or `name number` (0-based, sorted ids); lines
    `wnid` in order of file names; the devkit's ground truth (ILSVRC2012_ID per line), which numbers classes in the
    order of meta.mat. Raises `UserError` naming file and line.
    """
    path = labels or _look_for(root, _LABEL_FILES)
    if path is None:
        raise UserError(
            f"{root / 'val'} holds images without class folders and no file gives their labels: put one of "
            f"{', '.join(_LABEL_FILES)} into {root}, or name it with --val-labels"
        )
    rows = _rows(path)
    if len(rows) != len(names) and len(rows[0]) == 1:
        raise UserError(f"{path} has {len(rows)} labels, but {root / 'val'} has {len(names)} images")
    if len(rows[0]) == 1:
        if rows[0][0].isdigit():
            ids = _synset_ids(root, synsets, path)
            return [_class(path, line, ids.get(row[0], row[0]), classes) for line, row in enumerate(rows, 1)]
        return [_class(path, line, row[0], classes) for line, row in enumerate(rows, 1)]
    by_name = {Path(row[0]).stem: (line, row[1]) for line, row in enumerate(rows, 1)}
    missing = [name for name in names if Path(name).stem not in by_name]
    if missing:
        raise UserError(f"{path} gives no label for {len(missing)} image(s) of {root / 'val'}, such as {missing[0]}")
    return [_class(path, *by_name[Path(name).stem], classes) for name in names]


def _rows(path: Path) -> list[list[str]]:
    """The words of each line; of Kaggle's table, image and WordNet id."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"the labels in {path} cannot be read: {error}") from None
    if path.suffix == ".csv":
        rows = [[row[0], row[1].split()[0]] for row in csv.reader(text.splitlines()[1:]) if len(row) > 1]
    else:
        rows = [line.split()[:2] for line in text.splitlines() if line.strip()]
    if not rows:
        raise UserError(f"{path} holds no labels")
    return rows


def _class(path: Path, line: int, word: str, classes: Mapping[str, int]) -> int:
    if word in classes:
        return classes[word]
    if word.isdigit() and int(word) < len(classes):
        return int(word)
    raise UserError(
        f"{path}, line {line}: {word!r} is neither a class folder of training nor a number below {len(classes)}"
    )


def _synset_ids(root: Path, synsets: Path | None, labels: Path) -> dict[str, str]:
    """ILSVRC2012_ID -> WordNet id, from the devkit's meta.mat (leaves of the tree only)."""
    path = synsets or _look_for(root, ("meta.mat",))
    if path is None:
        raise UserError(
            f"{labels} numbers classes in the order of the devkit's meta.mat, which was not found: put it beside that "
            "file, or name it with --synsets"
        )
    from scipy.io import loadmat
    from scipy.io.matlab import MatReadError

    try:
        table = loadmat(path, squeeze_me=True)["synsets"]
        return {str(int(row[0])): str(row[1]) for row in table if int(row[4]) == 0}
    except (OSError, ValueError, KeyError, TypeError, IndexError, NotImplementedError, MatReadError) as error:
        raise UserError(f"{path} is not the devkit's meta.mat ({error})") from None


def _look_for(root: Path, names: Sequence[str]) -> Path | None:
    places = (root / folder / name for name in names for folder in _FOLDERS)
    return next((place for place in places if place.is_file()), None)
