"""Pixel operations: numpy against brute force and PIL, the compiled kernel against numpy."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageEnhance

from harness.data.augment import Plan
from harness.data.beton import JPEG
from harness.data.encode import WriteSettings, encode
from harness.data.pixels import area_resize, decode, recolour, render, shift
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


def compiled(images: list[np.ndarray | bytes], plan: Plan, size: int, table: np.ndarray, side: int = 0) -> np.ndarray:
    """What the kernel makes of raw images, or of JPEG files of `side` x `side` pixels; zeros where it refuses."""
    from harness.data.ffcv_backend import IMDECODE
    from harness.data.kernel import render as kernel

    count = len(images)
    stored = [np.frombuffer(image, np.uint8) if isinstance(image, bytes) else image for image in images]
    sides = [(side, side) if isinstance(image, bytes) else image.shape[:2] for image in images]
    records = np.array(
        [[s.ctypes.data, s.nbytes, not side, *hw] for s, hw in zip(stored, sides, strict=True)], np.int64
    )
    out = np.zeros((count, size, size, 3), table.dtype)
    colours = np.zeros((0, 3), np.float32) if plan.colours is None else plan.colours
    scratch = np.zeros((3, 1 << 20), np.uint8)
    status = np.zeros(count, np.int64)
    work = (plan.boxes, plan.flips, colours, plan.holes, GREY_FILL, table)
    kernel(IMDECODE, records, *work, scratch, status, out, 0, count)
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
    # Single against double precision: a level where a mean lies half-way between two, which colours may amplify.
    difference = np.abs(theirs.astype(int) - ours.astype(int))
    assert difference.max() <= (3 if recoloured else 1)
    assert (difference > 0).mean() < 0.002
    copied = [k for k, box in enumerate(BOXES) if box[2:] == (16, 16)]
    assert recoloured or difference[copied].max() == 0


@pytest.mark.ffcv
def test_the_kernel_looks_numbers_up():
    image = picture(16, 16, 2)
    plan = Plan(np.array([[0, 0, 16, 16]], np.int32), np.zeros(1, np.uint8), None, np.zeros((1, 4), np.int32))
    table = np.random.default_rng(1).normal(size=(3, 256)).astype(np.float32)
    assert (compiled([image], plan, 16, table)[0] == table[np.arange(3), image]).all()


IDENTITY = np.tile(np.arange(256, dtype=np.uint8), (3, 1))


def crops(boxes: list[tuple[int, int, int, int]]) -> Plan:
    count = len(boxes)
    return Plan(np.array(boxes, np.int32), np.zeros(count, np.uint8), None, np.zeros((count, 4), np.int32))


def stored_jpeg(side: int, seed: int) -> bytes:
    encoded = encode(picture(side, side, seed), WriteSettings(max_size=0, jpeg_share=1.0), 0)
    assert encoded.mode == JPEG
    return encoded.payload


@pytest.mark.ffcv
@pytest.mark.parametrize("side", [64, 176, 192, 203, 224, 240])  # 4, 11, 12, 13, 14, 15 blocks of 16
def test_a_cut_jpeg_decodes_to_the_same_pixels_as_the_whole(side: int):
    content = stored_jpeg(side, side)
    whole = compiled([content], crops([(0, 0, side, side)]), side, IDENTITY, side)[0]
    size = 32
    places = [
        (top, left) for top in (0, 1, 15, 16, 17, side - 33, side - 32) for left in (0, 7, 14, side // 2, side - 32)
    ]
    parts = compiled([content] * len(places), crops([(*place, size, size) for place in places]), size, IDENTITY, side)
    for (top, left), part in zip(places, parts, strict=True):
        assert (part == whole[top : top + size, left : left + size]).all()


@pytest.mark.ffcv
def test_cutting_happens():
    from harness.data.kernel import _cut_jpeg

    content = np.frombuffer(stored_jpeg(480, 0), np.uint8)
    out = np.zeros(1 << 20, np.uint8)
    length, top, left, height, width = _cut_jpeg(content, 480, 480, (200, 300, 100, 50), out)
    assert (top, left, height, width) == (192, 290 // 80 * 80, 112, 160)
    assert 0 < length < len(content) / 6
    part = decode(out[:length].tobytes(), JPEG, height, width)  # also a JPEG file for others
    whole = decode(content.tobytes(), JPEG, 480, 480)
    assert np.abs(part[8:108, 60:110].astype(int) - whole[200:300, 300:350].astype(int)).max() <= 2


@pytest.mark.ffcv
@given(position=st.integers(0, 10_000), value=st.binary(min_size=1, max_size=40), keep=st.integers(1, 10_000))
@settings(max_examples=300)
def test_no_damage_to_a_jpeg_does_harm(position: int, value: bytes, keep: int):
    """Whatever the bytes, the kernel returns: with pixels or with the decoder's complaint."""
    content = stored_jpeg(96, 7)
    position %= len(content)
    damaged = (content[:position] + value + content[position + len(value) :])[: max(keep % len(content), 1)]
    out = compiled([damaged, content], crops([(30, 30, 16, 16)] * 2), 16, IDENTITY, 96)
    assert (out[1] == compiled([content], crops([(30, 30, 16, 16)]), 16, IDENTITY, 96)[0]).all()
