"""Images: written once to FFCV files with manifests, read back through FFCV (or torch and PIL) in an order of our own.

`ensure` writes a set once, `open_data` gives the batches of one rank, `data_checksum` names a set's content.
"""

from typing import TYPE_CHECKING, Any

from harness.data.manifest import data_checksum
from harness.data.writer import ensure

if TYPE_CHECKING:
    from harness.data.loader import Loader, open_data

__all__ = ["Loader", "data_checksum", "ensure", "open_data"]


def __getattr__(name: str) -> Any:
    """Loaders need torch; writing and checking do not wait for it."""
    if name in ("Loader", "open_data"):
        from harness.data import loader

        return getattr(loader, name)
    raise AttributeError(name)
