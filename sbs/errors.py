"""The one exception that sbs raises for input it cannot accept."""


class SbsError(ValueError):
    """A network, bit set or policy that cannot be handled; the message names it, the reason and the remedy."""
