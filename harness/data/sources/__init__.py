"""Where images come from: `parse_source` turns a command line's `kind:place` into a `Source`."""

from harness.data.sources.base import Ref, Scan, Source, SplitScan
from harness.data.sources.digits import Digits
from harness.errors import UserError, nearest

KINDS = {
    "digits": "scikit-learn's handwritten digits; needs no place",
}


def parse_source(spec: str) -> Source:
    """The source that `spec` names; `UserError` lists the kinds."""
    kind, _, place = spec.partition(":")
    if kind not in KINDS:
        raise UserError(f"unknown source {spec!r}: {nearest(kind, list(KINDS))}")
    if kind == "digits":
        if place:
            raise UserError(f"source {spec!r}: digits takes no place, write just `digits`")
        return Digits()
    raise AssertionError(kind)


__all__ = ["KINDS", "Ref", "Scan", "Source", "SplitScan", "parse_source"]
