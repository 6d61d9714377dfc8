"""How the launchers of one life of a job find each other: small files in a private folder on shared storage."""

import contextlib
import secrets
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from slurm.files import make_private_dir, read_json, refresh, write_json, write_text

_BEAT_EVERY_S = 5.0


@dataclass
class Rendezvous:
    """The files of one life, seen by the launcher `rank` of `world`."""

    folder: Path
    rank: int
    world: int
    _last_beat: float = field(default=float("-inf"), init=False)
    _beats: dict[int, tuple[Any, float]] = field(default_factory=dict, init=False)
    _last_look: float = field(default=float("-inf"), init=False)

    def __post_init__(self) -> None:
        make_private_dir(self.folder)

    def put(self, name: str, tree: Any) -> None:
        """Publish `tree` under `name`."""
        write_json(self.folder / f"{name}.json", tree)

    def get(self, name: str) -> Any | None:
        """What was published under `name`, None if nothing was yet."""
        return read_json(self.folder / f"{name}.json")

    def ranks(self, kind: str) -> list[int]:
        """The ranks that published `<kind>-<rank>`."""
        refresh(self.folder)
        return sorted(int(path.stem.rpartition("-")[2]) for path in self.folder.glob(f"{kind}-*.json"))

    @property
    def token_file(self) -> Path:
        """The secret of this life's Ray cluster, mode 600."""
        return self.folder / "token"

    def make_token(self) -> None:
        """Draw a new secret."""
        write_text(self.token_file, secrets.token_hex(32))

    def beat(self) -> None:
        """Show the others, every few seconds, that this node is still there."""
        now = time.monotonic()
        if now - self._last_beat >= _BEAT_EVERY_S:
            self._last_beat = now
            with contextlib.suppress(OSError):  # a full or stalled disk: others wait for some beats before they worry
                self.put(f"beat-{self.rank}", {"count": now})

    def silent_ranks(self, limit_s: float) -> list[int]:
        """The other ranks whose sign of life has not changed for `limit_s` by this node's clock.

        Who has not looked for long (stopped by SLURM, or in a read from storage that hung for all) counts from now.
        """
        now = time.monotonic()
        if now - self._last_look >= _BEAT_EVERY_S:
            stood_still = now - self._last_look > max(limit_s / 2, 2 * _BEAT_EVERY_S)
            self._last_look = now
            for rank in set(range(self.world)) - {self.rank}:
                seen = self.get(f"beat-{rank}")
                if rank not in self._beats or self._beats[rank][0] != seen or stood_still:
                    self._beats[rank] = (seen, now)
        return sorted(rank for rank, (_, since) in self._beats.items() if now - since > limit_s)
