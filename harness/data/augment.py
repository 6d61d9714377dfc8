"""What happens to each image, decided in numpy before any pixel is touched; both backends carry out the same plan.

A plan is a function of (seed, epoch, sample): no loader thread, batch size or rank has a part in it.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from harness.data.randomness import keys, uniforms

Kind = Literal["none", "translate", "crop_flip", "resized_crop_flip"]
_ATTEMPTS = 10
# Draws of one sample: 4 for each attempt at a crop, then flip, shift (2), colour (3), hole (2).
_FLIP, _SHIFT, _COLOUR, _HOLE, _DRAWS = 40, 41, 43, 46, 48


@dataclass(frozen=True)
class Augment:
    """The random part of the training pipeline. Sides in pixels, the rest as shares.

    translate: zero-padded by `pad` and cropped back; crop_flip: the same and a flip; resized_crop_flip: a crop of
    `scale` of the area at an aspect `ratio` (torchvision's RandomResizedCrop) and a flip. `jitter` bounds the changes
    of brightness, contrast and saturation; `cutout` is the side of a square set to the mean colour.
    """

    kind: Kind = "none"
    pad: int = 4
    flip: float = 0.5
    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    jitter: tuple[float, float, float] = (0.0, 0.0, 0.0)
    cutout: int = 0


@dataclass(frozen=True)
class Plan:
    """What to do with a batch of n images.

    boxes: int32 (n, 4), top, left, height, width of the part that is resized to the output (a box of the output's own
    size is copied and may reach over the border, where it is black). flips: uint8 (n,). colours: float32 (n, 3),
    factors of brightness, contrast, saturation, or None. holes: int32 (n, 4), top, left, bottom, right in the output
    (empty if equal).
    """

    boxes: NDArray[np.int32]
    flips: NDArray[np.uint8]
    colours: NDArray[np.float32] | None
    holes: NDArray[np.int32]


def eval_plan(heights: NDArray[np.int32], widths: NDArray[np.int32], crop_share: float) -> Plan:
    """The centre square of `crop_share` of the shorter side, nothing random."""
    side = np.maximum((np.minimum(heights, widths) * crop_share).astype(np.int32), 1)
    boxes = np.stack([(heights - side) // 2, (widths - side) // 2, side, side], axis=1).astype(np.int32)
    return Plan(boxes, np.zeros(len(side), np.uint8), None, np.zeros((len(side), 4), np.int32))


def train_plan(
    augment: Augment,
    size: int,
    heights: NDArray[np.int32],
    widths: NDArray[np.int32],
    samples: NDArray[np.int64],
    *,
    seed: int,
    epoch: int,
) -> Plan:
    """The plan of some training samples at an output of size x size pixels."""
    if augment.kind == "none":
        return eval_plan(heights, widths, 1.0)
    draws = uniforms(keys(seed, epoch, samples), _DRAWS)
    if augment.kind == "resized_crop_flip":
        boxes = _random_resized_crops(augment, heights, widths, draws)
    else:
        shift = np.floor(draws[:, _SHIFT : _SHIFT + 2] * (2 * augment.pad + 1)).astype(np.int32) - augment.pad
        boxes = np.concatenate([shift, np.full_like(shift, size)], axis=1)
    flips = draws[:, _FLIP] < (0.0 if augment.kind == "translate" else augment.flip)
    colours = None
    if any(augment.jitter):
        bounds = np.asarray(augment.jitter)
        colours = (1.0 + bounds * (2.0 * draws[:, _COLOUR : _COLOUR + 3] - 1.0)).astype(np.float32)
    return Plan(boxes.astype(np.int32), flips.astype(np.uint8), colours, _holes(augment.cutout, size, draws))


def _random_resized_crops(
    augment: Augment, heights: NDArray[np.int32], widths: NDArray[np.int32], draws: NDArray[np.float64]
) -> NDArray[np.int32]:
    """torchvision's rule: the first of ten tries that fits, else the largest centre crop of an allowed ratio."""
    tries = draws[:, :_FLIP].reshape(-1, _ATTEMPTS, 4)
    height, width = heights.astype(np.float64)[:, None], widths.astype(np.float64)[:, None]
    low, high = augment.scale
    area = height * width * (low + (high - low) * tries[..., 0])
    log_low, log_high = np.log(augment.ratio)
    aspect = np.exp(log_low + (log_high - log_low) * tries[..., 1])
    w, h = np.rint(np.sqrt(area * aspect)), np.rint(np.sqrt(area / aspect))
    fits = (w > 0) & (w <= width) & (h > 0) & (h <= height)
    first = np.argmax(fits, axis=1)
    row = np.arange(len(first))
    w, h, found = w[row, first], h[row, first], fits[row, first]
    own = widths / heights
    w = np.where(found, w, np.where(own > augment.ratio[1], np.rint(heights * augment.ratio[1]), widths))
    h = np.where(found, h, np.where(own < augment.ratio[0], np.rint(widths / augment.ratio[0]), heights))
    place = np.where(found[:, None], tries[row, first, 2:], 0.5)
    top = np.minimum(np.floor(place[:, 0] * (heights - h + 1)), heights - h)
    left = np.minimum(np.floor(place[:, 1] * (widths - w + 1)), widths - w)
    return np.stack([top, left, h, w], axis=1).astype(np.int32)


def _holes(side: int, size: int, draws: NDArray[np.float64]) -> NDArray[np.int32]:
    """Squares whose centres are uniform over the image (DeVries and Taylor 2017); parts outside fall away."""
    if not side:
        return np.zeros((len(draws), 4), np.int32)
    start = np.floor(draws[:, _HOLE : _HOLE + 2] * size).astype(np.int32) - side // 2
    return np.clip(np.concatenate([start, start + side], axis=1), 0, size).astype(np.int32)
