"""The plan of augmentations against torchvision's published rule, written a second time for one image."""

import math

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from harness.data.augment import Augment, eval_plan, train_plan
from harness.data.randomness import keys, uniforms

RRC = Augment("resized_crop_flip")


def plan(augment: Augment, size: int, height: int, width: int, count: int, *, seed: int = 0, epoch: int = 0):
    heights, widths = np.full(count, height, np.int32), np.full(count, width, np.int32)
    return train_plan(augment, size, heights, widths, np.arange(count), seed=seed, epoch=epoch)


def random_resized_crop(draws: list[float], height: int, width: int) -> list[int]:
    """torchvision.transforms.RandomResizedCrop.get_params with its uniform numbers given."""
    for k in range(10):
        u, v, y, x = draws[4 * k : 4 * k + 4]
        area = height * width * (0.08 + 0.92 * u)
        aspect = math.exp(math.log(3 / 4) + (math.log(4 / 3) - math.log(3 / 4)) * v)
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            return [int(y * (height - h + 1)), int(x * (width - w + 1)), h, w]
    w, h = width, height
    if width / height < 3 / 4:
        h = round(w / (3 / 4))
    elif width / height > 4 / 3:
        w = round(h * (4 / 3))
    return [(height - h) // 2, (width - w) // 2, h, w]


@given(height=st.integers(1, 600), width=st.integers(1, 600), seed=st.integers(0, 50))
def test_random_resized_crops_follow_torchvision(height: int, width: int, seed: int):
    boxes = plan(RRC, 24, height, width, 4, seed=seed, epoch=3).boxes
    draws = uniforms(keys(seed, 3, np.arange(4)), 48)
    for box, numbers in zip(boxes.tolist(), draws.tolist(), strict=True):
        theirs = random_resized_crop(numbers, height, width)
        # The centre of a crop that fits nowhere may be rounded the other way.
        assert box[2:] == theirs[2:]
        assert max(abs(a - b) for a, b in zip(box, theirs, strict=True)) <= 1
        assert 0 <= box[0] <= height - box[2]
        assert 0 <= box[1] <= width - box[3]


def test_random_resized_crops_have_the_right_distribution():
    boxes = plan(RRC, 224, 400, 400, 20_000).boxes.astype(float)
    share, log_aspect = boxes[:, 2] * boxes[:, 3] / 400**2, np.log(boxes[:, 3] / boxes[:, 2])
    # A crop of share a fits if |log aspect| <= -log a, with probability p = min(1, -log a / log(4/3)), and is drawn
    # again otherwise; the integral of a p(a) over that of p(a) from 0.08 to 1 is 0.4778.
    assert abs(share.mean() - 0.4778) < 0.006
    assert share.min() > 0.078
    assert abs(log_aspect.mean()) < 0.01
    assert np.abs(log_aspect).max() < math.log(4 / 3) + 0.02
    centre = (boxes[:, :2] + boxes[:, 2:] / 2).mean(axis=0)
    assert np.allclose(centre, 200, atol=2)


def test_a_plan_depends_on_seed_epoch_and_sample_alone():
    heights, widths = np.full(50, 300, np.int32), np.full(50, 200, np.int32)
    samples = np.arange(50)
    whole = train_plan(RRC, 64, heights, widths, samples, seed=4, epoch=5)
    part = train_plan(RRC, 64, heights[:9], widths[:9], samples[20:29], seed=4, epoch=5)
    assert (whole.boxes[20:29] == part.boxes).all()
    assert (whole.flips[20:29] == part.flips).all()
    for other in ({"seed": 5, "epoch": 5}, {"seed": 4, "epoch": 6}):
        assert (train_plan(RRC, 64, heights, widths, samples, **other).boxes != whole.boxes).any()


def test_shifts_are_uniform_and_flips_belong_to_crop_flip():
    translate, crop_flip = (plan(Augment(kind, pad=2), 32, 32, 32, 10_000) for kind in ("translate", "crop_flip"))
    assert translate.flips.sum() == 0
    assert abs(crop_flip.flips.mean() - 0.5) < 0.02
    counts = np.unique(crop_flip.boxes[:, :2], axis=0, return_counts=True)[1]
    assert len(counts) == 25
    assert counts.min() > 10_000 / 25 * 0.8
    assert (crop_flip.boxes[:, 2:] == 32).all()


def test_colours_and_holes():
    augment = Augment("resized_crop_flip", jitter=(0.4, 0.2, 0.0), cutout=8)
    made = plan(augment, 32, 50, 50, 5000)
    assert made.colours is not None
    low, high = made.colours.min(axis=0), made.colours.max(axis=0)
    assert np.allclose(low, [0.6, 0.8, 1.0], atol=0.01)
    assert np.allclose(high, [1.4, 1.2, 1.0], atol=0.01)
    sides = made.holes[:, 2:] - made.holes[:, :2]
    assert made.holes.min() == 0
    assert made.holes.max() == 32
    assert sides.max() == 8
    assert sides.min() >= 4
    # A square whose centre is uniform covers 8 pixels a side but for those cut off at the borders.
    assert abs(sides.mean() - 7.5) < 0.1


def test_without_augmentation_training_sees_the_centre():
    assert plan(Augment("none"), 32, 40, 60, 2).boxes.tolist() == [[0, 10, 40, 40]] * 2


def test_eval_takes_the_centre_square():
    heights, widths = np.array([256, 300, 500], np.int32), np.array([400, 256, 375], np.int32)
    boxes = eval_plan(heights, widths, 224 / 256).boxes
    assert boxes.tolist() == [[16, 88, 224, 224], [38, 16, 224, 224], [86, 23, 328, 328]]
