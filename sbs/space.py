"""What a search may choose: candidate bit-widths that nest, and channel groups.

A set of bit-widths b_1 < ... < b_K is valid when every step s_{b} = 1 / (2**b - 1) is an integer multiple of the
next one, so that each grid contains the coarser ones and the bits can be shared (SBS, section 3.1).
"""

import itertools
from dataclasses import dataclass

from sbs.errors import SbsError

FULL_PRECISION_BITS = 32
MAX_QUANTIZED_BITS = 16
EDGE_BITS = 8


def levels(bits: int) -> int:
    """Number of steps on [0, 1] of a `bits`-bit uniform grid: 2**bits - 1."""
    return 2**bits - 1


def check_bits(bits: tuple[int, ...], name: str) -> tuple[int, ...]:
    """Return `bits` as a tuple if the grids nest; raise SbsError naming the offending pair otherwise."""
    try:
        bits = tuple(bits)
    except TypeError:
        raise SbsError(f"{name}={bits!r}: give a sequence of bit-widths, for example (2, 4, 8)") from None
    if bits == (FULL_PRECISION_BITS,):
        return bits
    if not bits:
        raise SbsError(
            f"{name} is empty; give at least one bit-width, for example (2, 4, 8), or (32,) for full precision"
        )
    for b in bits:
        if isinstance(b, bool) or not isinstance(b, int) or not 1 <= b <= MAX_QUANTIZED_BITS:
            raise SbsError(
                f"{name}={bits}: {b!r} is not a bit-width; use integers from 1 to {MAX_QUANTIZED_BITS}, "
                f"or ({FULL_PRECISION_BITS},) alone for full precision"
            )
    for low, high in itertools.pairwise(bits):
        if low >= high:
            raise SbsError(f"{name}={bits}: {low} does not come before {high}; list the bit-widths in rising order")
        if levels(high) % levels(low):
            raise SbsError(
                f"{name}={bits}: the {low}-bit grid is not contained in the {high}-bit grid "
                f"(2**{high} - 1 = {levels(high)} is no multiple of 2**{low} - 1 = {levels(low)}); "
                f"each bit-width must divide the next, as in (2, 4, 8) or (1, 2, 4, 8)"
            )
    return bits


@dataclass(frozen=True)
class SearchSpace:
    """Candidates of one search.

    weight_bits, activation_bits: nesting bit-widths, or (32,) to leave that side in full precision.
    prune: whether groups of output channels may be removed. group_size: channels in a group.
    max_prune_share: at most this share of the groups of one layer can be closed, in [0, 1).
    edge_bits: bit-width of the first and last layers, weights and activations (32 where both sides are 32).
    """

    weight_bits: tuple[int, ...] = (2, 4, 8)
    activation_bits: tuple[int, ...] = (2, 4, 8)
    prune: bool = True
    group_size: int = 4
    max_prune_share: float = 0.5
    edge_bits: int = EDGE_BITS

    def __post_init__(self) -> None:
        object.__setattr__(self, "weight_bits", check_bits(self.weight_bits, "weight_bits"))
        object.__setattr__(self, "activation_bits", check_bits(self.activation_bits, "activation_bits"))
        if type(self.prune) is not bool:
            raise SbsError(f"prune={self.prune!r}: say True or False")
        if type(self.group_size) is not int or self.group_size < 1:
            raise SbsError(f"group_size={self.group_size!r}: give a whole number of channels, at least 1")
        if not isinstance(self.max_prune_share, int | float) or not 0 <= self.max_prune_share < 1:
            raise SbsError(f"max_prune_share={self.max_prune_share!r}: give a share in [0, 1), for example 0.5")
        if self.edge_bits != FULL_PRECISION_BITS:
            check_bits((self.edge_bits,), "edge_bits")

    @property
    def quantizes(self) -> bool:
        """Whether any side is quantised at all."""
        return (self.weight_bits, self.activation_bits) != ((FULL_PRECISION_BITS,), (FULL_PRECISION_BITS,))

    @property
    def first_last_bits(self) -> int:
        """Bits of the first and last layers: edge_bits, or 32 in a pure pruning search."""
        return self.edge_bits if self.quantizes else FULL_PRECISION_BITS

    def signature(self) -> tuple[int, ...]:
        """What the gates of a super-network mean, in figures; max_prune_share only limits how they may move."""
        bits = (len(self.weight_bits), *self.weight_bits, len(self.activation_bits), *self.activation_bits)
        return (*bits, self.first_last_bits, self.group_size if self.prune else 0)


def describe(signature: tuple[int, ...]) -> str:
    """A space's signature in words."""
    weights = signature[1 : 1 + signature[0]]
    activations = signature[2 + len(weights) : -2]
    groups = f"group_size={signature[-1]}" if signature[-1] else "prune=False"
    edges = f"first and last layers at {signature[-2]} bits"
    return f"weight_bits={weights}, activation_bits={activations}, {groups}, {edges}"
