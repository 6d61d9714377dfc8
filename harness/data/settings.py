"""What follows for a loader from a recipe's [data] section."""

from harness.config import DataConfig
from harness.data.augment import Augment
from harness.errors import UserError


def augment_of(data: DataConfig) -> Augment:
    """The random part of the training pipeline."""
    return Augment(kind=data.augment, pad=data.pad, scale=data.crop_scale, jitter=data.color_jitter, cutout=data.cutout)


def sizes_of(data: DataConfig, epochs: int | None) -> tuple[tuple[int, int], ...]:
    """(first epoch, side in pixels) of each step of a progressive resizing; shares of the epochs become epochs."""
    if not data.resize_schedule:
        return ()
    if epochs is None:
        raise UserError("data.resize_schedule needs the stage's number of epochs, which was not given to open_data")
    shares = [share for share, _ in data.resize_schedule]
    if shares != sorted(shares) or shares[0] != 0.0:
        raise UserError(
            f"data.resize_schedule = {[list(step) for step in data.resize_schedule]}: give [share of the epochs, size] "
            "with shares that begin at 0.0 and rise, e.g. [[0.0, 160], [0.75, 192]]"
        )
    return tuple((round(share * epochs), size) for share, size in data.resize_schedule)
