"""Pixel operations: numpy against brute force and PIL, the compiled kernel against numpy."""

import numpy as np
import pytest
from PIL import Image, ImageEnhance

from harness.data.augment import Plan
from harness.data.pixels import area_resize, recolour, render, shift
from tests.unit.data.samples import picture

GREY_FILL = np.array([10, 20, 30], np.uint8)


def area_mean(image: np.ndarray, size: int) -> np.ndarray:
    """Mean over the covered area, one output pixel at a time."""
    height, width = image.shape[:2]
    out = np.zeros((size, size, 3))
    for i in range(size):
        for j in range(size):
            y = np.clip(
                np.minimum(np.arange(height) + 1, (i + 1) * height / size)
                - np.maximum(np.arange(height), i * height / size),
                0,
                None,
            )
            x = np.clip(
                np.minimum(np.arange(width) + 1, (j + 1) * width / size)
                - np.maximum(np.arange(width), j * width / size),
                0,
                None,
            )
            out[i, j] = np.einsum("i,j,ijc->c", y, x, image) / (y.sum() * x.sum())
    return out


@pytest.mark.parametrize("shape", [(40, 30), (16, 16), (5, 33), (7, 9), (1, 1), (48, 48)])
def test_area_resize_is_the_mean_of_the_covered_area(shape: tuple[int, int]):
    image = picture(*shape, 3)
    assert np.abs(area_resize(image, 16).astype(float) - area_mean(image, 16)).max() <= 0.5 + 1e-4


def test_shift_is_a_crop_of_the_padded_image():
    image = picture(12, 12, 1)
    padded = np.pad(image, ((3, 3), (3, 3), (0, 0)))
    for top in range(-3, 4):
        for left in range(-3, 4):
            assert (shift(image, top, left, 12) == padded[top + 3 : top + 15, left + 3 : left + 15]).all()


@pytest.mark.parametrize("factors", [(1.3, 1.0, 1.0), (1.0, 0.7, 1.0), (1.0, 1.0, 1.4), (0.8, 1.2, 0.6)])
def test_colours_are_those_of_pil(factors: tuple[float, float, float]):
    image = picture(30, 20, 5)
    theirs = Image.fromarray(image)
    for enhance, factor in zip(
        (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color), factors, strict=True
    ):
        theirs = enhance(theirs).enhance(factor)
    ours = recolour(image, np.array(factors, np.float32))
    # PIL cuts the fraction off where we round: up to one level for each of the three steps.
    assert np.abs(ours.astype(int) - np.asarray(theirs).astype(int)).max() <= sum(f != 1.0 for f in factors) + 1


def compiled(images: list[np.ndarray], plan: Plan, size: int, table: np.ndarray) -> np.ndarray:
    from harness.data.ffcv_backend import FUNCTIONS
    from harness.data.kernel import render as kernel

    count = len(images)
    records = np.array([[i.ctypes.data, i.nbytes, 1, *i.shape[:2]] for i in images], np.int64)
    out = np.zeros((count, size, size, 3), table.dtype)
    colours = np.zeros((0, 3), np.float32) if plan.colours is None else plan.colours
    scratch = np.zeros((3, 1 << 20), np.uint8)
    status = np.zeros(count, np.int64)
    work = (plan.boxes, plan.flips, colours, plan.holes, GREY_FILL, table)
    kernel(FUNCTIONS, records, *work, scratch, status, out, 0, count)
    return out


BOXES = [
    (0, 0, 40, 30), (3, 5, 16, 16), (-2, 20, 16, 16), (30, -5, 16, 16), (2, 2, 10, 28), (1, 1, 20, 9), (5, 5, 7, 7),
    (0, 0, 17, 16),
]  # fmt: skip


@pytest.mark.ffcv
@pytest.mark.parametrize("recoloured", [False, True])
def test_the_kernel_does_what_numpy_does(recoloured: bool):
    images = [picture(40, 30, seed) for seed in range(len(BOXES))]
    rng = np.random.default_rng(0)
    colours = rng.uniform(0.6, 1.4, (len(BOXES), 3)).astype(np.float32) if recoloured else None
    holes = np.array([[0, 0, 0, 0], [2, 3, 9, 10]] * (len(BOXES) // 2), np.int32)
    plan = Plan(np.array(BOXES, np.int32), rng.integers(0, 2, len(BOXES)).astype(np.uint8), colours, holes)
    identity = np.tile(np.arange(256, dtype=np.uint8), (3, 1))
    theirs = compiled(images, plan, 16, identity)
    ours = np.stack([render(image, plan, k, size=16, fill=GREY_FILL) for k, image in enumerate(images)])
    # OpenCV rounds in fixed point, and twice where one side shrinks and the other grows; colours amplify a level.
    difference = np.abs(theirs.astype(int) - ours.astype(int))
    assert difference.max() <= (4 if recoloured else 1)
    assert (difference > 0).mean() < 0.05 + 0.2 * recoloured
    copied = [k for k, box in enumerate(BOXES) if box[2:] == (16, 16)]
    assert recoloured or difference[copied].max() == 0


@pytest.mark.ffcv
def test_the_kernel_looks_numbers_up():
    image = picture(16, 16, 2)
    plan = Plan(np.array([[0, 0, 16, 16]], np.int32), np.zeros(1, np.uint8), None, np.zeros((1, 4), np.int32))
    table = np.random.default_rng(1).normal(size=(3, 256)).astype(np.float32)
    assert (compiled([image], plan, 16, table)[0] == table[np.arange(3), image]).all()
