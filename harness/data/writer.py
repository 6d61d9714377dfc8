"""Write a data set: scan, encode in parallel, finish atomically. A killed or failed run goes on where it stopped.

FFCV's own DatasetWriter waits for ever when an image raises, leaves shared memory behind and draws unseeded numbers,
so the files are written here. Processes fill pages of one file; for every finished chunk they leave a record of its
samples in `DIR/.partial-SPLIT`. Header and tables and then the manifest are written last.
"""

import errno
import fcntl
import hashlib
import json
import os
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from harness.data.beton import ALLOCATION, JPEG, SAMPLE, SAMPLES_START, head_bytes, page_align, read_index
from harness.data.chunks import ROW, Chunk, ChunkJob, chunk_path, run_chunks
from harness.data.encode import WriteSettings
from harness.data.manifest import (
    SPLITS,
    Manifest,
    Split,
    beton_path,
    load_manifest,
    manifest_path,
    open_checked,
    save_manifest,
)  # fmt: skip
from harness.data.sources import Scan, Source, SplitScan, parse_source
from harness.errors import UserError
from harness.version import DISTRIBUTION, own_version

# Called with (split, samples done, samples in all).
Progress = Callable[[str, int, int], None]
REPORT = "report.json"
_FULL_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_CHUNK_MIN, _CHUNK_MAX, _CHUNK_SMALL = 64, 1024, 8192


@dataclass(frozen=True)
class WriteReport:
    """What became of a source: sentences about everything that is not as it should be, changes made to images."""

    written: dict[Split, int]
    problems: tuple[str, ...]
    changes: dict[str, int]


def ensure(source: str, folder: str | Path) -> str:
    """Write a data set into `folder` unless it is there; safe for many callers at once. Returns its checksum."""
    from harness.data.manifest import data_checksum

    folder = Path(folder)
    if not _is_written(folder):
        with _lock(folder, patience_s=3600.0):
            if not _is_written(folder):
                _write(parse_source(source), folder, None, workers=None)
    return data_checksum(folder)


def write(
    source: Source,
    folder: Path,
    settings: WriteSettings | None = None,
    *,
    workers: int | None = None,
    strict: bool = False,
    limit_s: float = 600.0,
    progress: Progress = lambda _split, _done, _total: None,
) -> WriteReport:
    """Write both splits of `source` into `folder`. `settings` None: small images raw, others half JPEG.

    `strict` turns problems into errors. Raises `UserError` for everything a person can mend; what was finished is kept,
    and the same call goes on from there.
    """
    with _lock(folder, patience_s=0.0):
        return _write(source, folder, settings, workers=workers, strict=strict, limit_s=limit_s, progress=progress)


def default_settings(source: Source) -> WriteSettings:
    """Small images raw in small pages, others half of them JPEG at 500 pixels."""
    return WriteSettings(max_size=0, jpeg_share=0.0, page_bytes=2 << 20) if source.small else WriteSettings()


def _is_written(folder: Path) -> bool:
    return all(manifest_path(folder, split).is_file() and beton_path(folder, split).is_file() for split in SPLITS)


@contextmanager
def _lock(folder: Path, patience_s: float) -> Iterator[None]:
    """Hold a data set folder for writing."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / ".lock").open("a+b")
    except OSError as error:
        raise UserError(f"cannot write into {folder}: {error.strerror}") from None
    with file:
        deadline = time.monotonic() + patience_s
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() >= deadline:
                    raise UserError(
                        f"another process is writing a data set into {folder}: wait for it to end"
                    ) from None
                time.sleep(0.2)
        yield


def _write(
    source: Source,
    folder: Path,
    settings: WriteSettings | None,
    *,
    workers: int | None,
    strict: bool = False,
    limit_s: float = 600.0,
    progress: Progress = lambda _split, _done, _total: None,
) -> WriteReport:
    settings = settings or default_settings(source)
    if workers is None:
        workers = 0 if source.small else len(os.sched_getaffinity(0))
    scan = source.scan()
    problems = list(scan.problems)
    if strict and problems:
        raise UserError(_strict_message(source, problems))
    written: dict[Split, int] = {}
    of_split: dict[str, dict[str, Any]] = {}
    before = _report_before(folder)
    try:
        for split in SPLITS:
            work = _SplitWork(source, scan, folder, split, settings)
            rows = None
            if manifest_path(folder, split).exists():
                written[split] = _already_written(source, folder, split, settings)
                notes = [before[split]] if split in before else []
            else:
                work.encode(workers, limit_s, progress)
                rows, notes = work.finished()
                written[split] = len(rows)
            of_split[split] = _merge(notes)
            problems += [f"{split}: {problem}" for problem in of_split[split]["problems"]]
            if strict and problems:
                raise UserError(_strict_message(source, problems))
            if written[split] == 0:
                raise UserError(
                    f"{source.spec}: no image of the {split} split can be used; {len(problems)} problems, the first: "
                    f"{problems[0].removeprefix(split + ': ')}"
                )
            report = _report(folder, written, problems, of_split)
            if rows is not None:
                work.finish(rows, len(problems))
    except OSError as error:
        if error.errno not in _FULL_DISK:
            raise
        raise UserError(
            f"no space left for {folder} ({error.strerror}): free some and run the same command again, it goes on "
            f"where it stopped; or delete {folder}"
        ) from None
    return report


def _merge(notes: list[dict[str, Any]]) -> dict[str, Any]:
    """What several chunks, or an earlier run, found out about the images of one split."""
    changes: Counter[str] = Counter()
    for note in notes:
        changes.update(note["changes"])
    return {"problems": [problem for note in notes for problem in note["problems"]], "changes": dict(changes)}


def _report(
    folder: Path, written: dict[Split, int], problems: list[str], of_split: dict[str, dict[str, Any]]
) -> WriteReport:
    """Write down what is known so far, before the manifest that makes an end of the split."""
    changes = sum((Counter(part["changes"]) for part in of_split.values()), Counter())
    tree = {"written": written, "changes": changes, "problems": problems, "splits": of_split}
    partial = folder / f".{REPORT}.partial"
    partial.write_text(json.dumps(tree, indent=1) + "\n", encoding="utf-8")
    partial.rename(folder / REPORT)
    return WriteReport(dict(written), tuple(problems), dict(changes))


def _report_before(folder: Path) -> dict[str, dict[str, Any]]:
    """What an earlier run wrote down about the images of each split."""
    try:
        found: dict[str, dict[str, Any]] = json.loads((folder / REPORT).read_text(encoding="utf-8")).get("splits", {})
    except (FileNotFoundError, json.JSONDecodeError):
        return {}
    return found


def _strict_message(source: Source, problems: list[str]) -> str:
    first = "\n  ".join(problems[:10])
    more = f"\n  and {len(problems) - 10} more" if len(problems) > 10 else ""
    return f"{source.spec} has {len(problems)} problem(s), and --strict allows none:\n  {first}{more}"


def _already_written(source: Source, folder: Path, split: Split, settings: WriteSettings) -> int:
    manifest = load_manifest(folder, split)
    if (manifest.source, manifest.settings) != (source.spec, settings.to_dict()):
        raise UserError(
            f"{folder} already holds the {split} split of {manifest.source}, written with {manifest.settings}: "
            "choose another --out, or delete it"
        )
    return open_checked(folder, split)[0].num_samples


class _SplitWork:
    """The writing of one split: a partial file, and a folder of records of finished chunks."""

    def __init__(self, source: Source, scan: Scan, folder: Path, split: Split, settings: WriteSettings) -> None:
        self.source, self.classes, self.folder, self.split, self.settings = (
            source,
            scan.classes,
            folder,
            split,
            settings,
        )
        self.part: SplitScan = scan.splits[split]
        self.records = folder / f".partial-{split}"
        self.file = folder / f".partial-{split}.beton"
        count = len(self.part.labels)
        self.pages_start = page_align(SAMPLES_START + count * SAMPLE.itemsize, settings.page_bytes)
        self.chunk_size = _CHUNK_SMALL if source.small else min(max(count // 64, _CHUNK_MIN), _CHUNK_MAX)

    def encode(self, workers: int, limit_s: float, progress: Progress) -> None:
        """Write all chunks that an earlier run has not finished."""
        self._begin()
        count, size = len(self.part.labels), self.chunk_size
        numbers = range(-(-count // size))
        todo = [number for number in numbers if not chunk_path(self.records, number).exists()]
        done = count - sum(min(size, count - number * size) for number in todo)
        progress(self.split, done, count)

        def count_up(samples: int) -> None:
            nonlocal done
            done += samples
            progress(self.split, done, count)

        chunks = (
            Chunk(n, n * size, self.part.refs[n * size : (n + 1) * size], self.part.labels[n * size : (n + 1) * size])
            for n in todo
        )
        job = ChunkJob(self.source, self.settings, self.file, self.records, self.pages_start)
        workers = min(workers, len(todo))
        run_chunks(job, chunks, first_page=self._first_free_page(), workers=workers, limit_s=limit_s, done=count_up)

    def _begin(self) -> None:
        """Keep the records of an earlier run if it was this very one, else begin anew."""
        plan_file = self.records / "plan.json"
        plan = json.dumps(
            {
                "source": self.source.spec, "settings": self.settings.to_dict(), "classes": self.classes,
                "images": _digest_of_scan(self.part), "pillow": version("pillow"), "chunk": self.chunk_size,
            }
        )  # fmt: skip
        if plan_file.is_file() and self.file.is_file() and plan_file.read_text(encoding="utf-8") == plan:
            return
        shutil.rmtree(self.records, ignore_errors=True)
        self.records.mkdir()
        self.file.write_bytes(b"")
        plan_file.write_text(plan, encoding="utf-8")

    def finished(self) -> tuple[NDArray[np.void], list[dict[str, Any]]]:
        """The records of all finished chunks, in order of position: samples, notes."""
        rows, notes = [np.zeros(0, ROW)], []
        for path in sorted(self.records.glob("chunk-*.npz")):
            with np.load(path) as record:
                rows.append(record["rows"])
                notes.append(json.loads(str(record["notes"])))
        return np.concatenate(rows), notes

    def _first_free_page(self) -> int:
        rows, _ = self.finished()
        used = rows["offset"].max(initial=0)
        return int(used - self.pages_start) // self.settings.page_bytes + 1 if used else 0

    def finish(self, rows: NDArray[np.void], problems: int) -> None:
        """Tables, header, name, manifest: in this order, so that a set is whole or not there."""
        page = self.settings.page_bytes
        table_start = page_align(int((rows["offset"] + rows["size"]).max()), page)
        samples, table = np.zeros(len(rows), SAMPLE), np.zeros(len(rows), ALLOCATION)
        for name in ("mode", "width", "height", "offset"):
            samples["f0"][name] = rows[name]
        samples["f1"] = rows["label"]
        table["sample"], table["offset"], table["size"] = np.arange(len(rows)), rows["offset"], rows["size"]
        with self.file.open("r+b") as file:
            file.truncate(table_start)
            file.write(head_bytes(samples, page, table_start))
            file.seek(table_start)
            file.write(table.tobytes())
            file.flush()
            os.fsync(file.fileno())
        path = beton_path(self.folder, self.split)
        self.file.rename(path)
        save_manifest(self.folder, self._manifest(path, rows, problems))
        shutil.rmtree(self.records)

    def _manifest(self, path: Path, rows: NDArray[np.void], problems: int) -> Manifest:
        from harness.data.beton import index_digest

        mean, std = self._normalisation(rows)
        jpeg = int((rows["mode"] == JPEG).sum())
        return Manifest(
            split=self.split,
            file=path.name,
            file_bytes=path.stat().st_size,
            num_samples=len(rows),
            classes=self.classes,
            class_counts=tuple(np.bincount(rows["label"], minlength=len(self.classes)).tolist()),
            height_range=(int(rows["height"].min()), int(rows["height"].max())),
            width_range=(int(rows["width"].min()), int(rows["width"].max())),
            jpeg_images=jpeg,
            raw_images=len(rows) - jpeg,
            mean=mean,
            std=std,
            source=self.source.spec,
            settings=self.settings.to_dict(),
            problems=problems,
            checksums={
                "index": index_digest(path, read_index(path)),
                "images": hashlib.sha256(rows["digest"].tobytes()).hexdigest(),
            },
            written_by={DISTRIBUTION: own_version(), "pillow": version("pillow")},
        )

    def _normalisation(self, rows: NDArray[np.void]) -> tuple[Any, Any]:
        """Mean and deviation of the training images, also for the validation split."""
        if self.split != "train":
            train = load_manifest(self.folder, "train")
            return train.mean, train.std
        mean = rows["total"].mean(axis=0)
        std = np.sqrt(np.maximum(rows["square"].mean(axis=0) - mean**2, 1.0))
        return tuple(np.round(mean, 3).tolist()), tuple(np.round(std, 3).tolist())


def _digest_of_scan(part: SplitScan) -> str:
    digest = hashlib.sha256(part.labels.tobytes())
    for ref in part.refs:
        digest.update(repr(ref).encode())
    return digest.hexdigest()
