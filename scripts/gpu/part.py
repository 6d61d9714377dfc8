"""What every part is: a program that writes figures as they come, or says in its last line what is not here."""

import argparse
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from scripts.gpu import figures
from scripts.gpu.plan import SKIP_STATUS
from tests.benchmarks.__main__ import line
from tests.benchmarks.measure import NotHereError, Row


@dataclass(frozen=True)
class Options:
    """`device`: cuda, or cpu in a rehearsal, which is `tiny`; `work`: a folder that the parts of a run share."""

    device: str
    tiny: bool
    work: Path
    rest: tuple[str, ...]


def rehearsed(row: Row) -> Row:
    """Without its limit if it is a time, a size or a ratio, which mean nothing there; counts hold anywhere."""
    return replace(row, must=None, wanted=None) if row.unit else row


def main(rows: Callable[[Options], Iterator[Row]]) -> None:
    """Run a part from its command line; ends the process."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--figures", type=Path, required=True)
    given, rest = parser.parse_known_args()
    options = Options(given.device, given.tiny, given.work, tuple(rest))
    try:
        for row in rows(options):
            row = rehearsed(row) if options.tiny else row  # noqa: PLW2901 - the same figure
            figures.append(given.figures, row)
            print(line(row), flush=True)
    except NotHereError as reason:
        print(reason, flush=True)
        sys.exit(SKIP_STATUS)
