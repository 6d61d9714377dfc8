"""Parquet files in Hugging Face's layout: a column of encoded images (bytes in a struct) and a column of labels."""

import json
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from harness.data.manifest import Split
from harness.data.sources.base import Scan, SplitScan, checked, shards
from harness.errors import UserError

_IMAGE_COLUMNS, _LABEL_COLUMNS = ("image", "img"), ("label", "labels", "fine_label")
# Path of the file, row group, row in it.
_Ref = tuple[str, int, int]


@dataclass(frozen=True)
class Parquet:
    """Files named train-*, and val-* or validation-*; others (test) are left alone."""

    pattern: str
    small: bool = False

    @property
    def spec(self) -> str:
        """See `Source.spec`."""
        return f"parquet:{self.pattern}"

    def scan(self) -> Scan:
        """See `Source.scan`; labels as numbered in the files (imagenet-1k's are those of sorted WordNet ids)."""
        splits: dict[Split, SplitScan] = {}
        names: list[str] = []
        for split, files in shards(self.spec, self.pattern, "parquet").items():
            refs: list[_Ref] = []
            labels = []
            for path in files:
                file, _, label_column = _open(path)
                names = names or _class_names(file, label_column)
                for group in range(file.num_row_groups):
                    column = file.read_row_group(group, columns=[label_column]).column(0)
                    if column.null_count:
                        raise UserError(f"{path}: row group {group} has images without a label")
                    labels.append(column.to_numpy().astype(np.int64))
                    refs += [(path, group, row) for row in range(len(column))]
            splits[split] = SplitScan(refs, np.concatenate(labels) if labels else np.zeros(0, np.int64))
        if not names:
            most = max(int(part.labels.max(initial=-1)) for part in splits.values())
            names = [str(label) for label in range(most + 1)]
        return checked(self.spec, names, splits)

    def read(self, ref: _Ref) -> bytes:
        """See `Source.read`."""
        path, group, row = ref
        value = _images(path, group)[row].as_py()
        content = value.get("bytes") if isinstance(value, dict) else value
        if not isinstance(content, bytes):
            raise OSError("the row holds no image bytes")
        return content

    def describe(self, ref: _Ref) -> str:
        """See `Source.describe`."""
        path, group, row = ref
        return f"{path} row group {group} row {row}"


@lru_cache(maxsize=2)
def _open(path: str) -> tuple[Any, str, str]:
    """The file and its columns of images and labels."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(path)
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"{path} is not a parquet file that can be read: {error}") from None
    names = file.schema_arrow.names
    image = next((name for name in _IMAGE_COLUMNS if name in names), None)
    label = next((name for name in _LABEL_COLUMNS if name in names), None)
    if image is None or label is None:
        raise UserError(
            f"{path} has the columns {', '.join(names)}; expected images in {' or '.join(_IMAGE_COLUMNS)} and "
            f"labels in {' or '.join(_LABEL_COLUMNS)}"
        )
    return file, image, label


@lru_cache(maxsize=1)
def _images(path: str, group: int) -> Any:
    import pyarrow as pa

    file, column, _ = _open(path)
    try:
        return file.read_row_group(group, columns=[column]).column(0)
    except pa.ArrowException as error:
        raise OSError(str(error)) from None


def _class_names(file: Any, label_column: str) -> list[str]:
    """Names that Hugging Face's datasets leaves in the schema, or none."""
    text = (file.schema_arrow.metadata or {}).get(b"huggingface", b"{}")
    feature = json.loads(text).get("info", {}).get("features", {}).get(label_column, {})
    return [str(name) for name in feature.get("names", [])]
