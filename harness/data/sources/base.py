"""What a source of images is: a scan that finds everything, and a reader of one image that runs in any process."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from harness.data.manifest import Split

# Whatever `read` needs to find one image: small and picklable.
Ref = Any


@dataclass(frozen=True)
class SplitScan:
    """The images of one split: references and labels 0..n-1, in the order in which they are written."""

    refs: Sequence[Ref]
    labels: NDArray[np.int64]


@dataclass(frozen=True)
class Scan:
    """All that a source holds. Class names stand in torchvision's order; problems are sentences for the report."""

    classes: tuple[str, ...]
    splits: Mapping[Split, SplitScan]
    problems: tuple[str, ...] = field(default=())


class Source(Protocol):
    """Images with labels in two splits. Instances are picklable: `read` is called in other processes."""

    @property
    def spec(self) -> str:
        """The text that names this source on a command line."""

    @property
    def small(self) -> bool:
        """Whether images are so small that JPEG and several processes are no gain."""

    def scan(self) -> Scan:
        """Look at everything but the pixels. Raises `UserError` where the source is not what it should be."""

    def read(self, ref: Ref) -> bytes | NDArray[np.uint8]:
        """One image: the bytes of an image file, or an array (height, width, 3)."""

    def describe(self, ref: Ref) -> str:
        """What messages call this image."""
