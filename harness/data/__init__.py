"""Images: written once to FFCV files with manifests, read back through FFCV (or torch and PIL) in an order of our own.

`ensure` writes a set once, `open_data` gives the batches of one rank, `data_checksum` names a set's content.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from harness.data.loader import Loader, open_data
    from harness.data.manifest import data_checksum
    from harness.data.writer import ensure

__all__ = ["Loader", "data_checksum", "ensure", "open_data"]

_HOMES = {"Loader": "loader", "open_data": "loader", "data_checksum": "manifest", "ensure": "writer"}


def __getattr__(name: str) -> Any:
    """Loaders need torch, the writer PIL: neither is imported before it is used."""
    if name not in _HOMES:
        raise AttributeError(name)
    return getattr(import_module(f"harness.data.{_HOMES[name]}"), name)
