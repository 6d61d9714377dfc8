"""The pixel operations of `kernel` again, in PIL and numpy: their oracle, and what runs without FFCV."""

import io

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from harness.data.augment import Plan
from harness.data.beton import JPEG


class UndecodableError(Exception):
    """A stored JPEG that does not decode."""


def decode(payload: memoryview | bytes, mode: int, height: int, width: int) -> NDArray[np.uint8]:
    """One stored image as (height, width, 3) bytes. Raises `UndecodableError`."""
    if mode != JPEG:
        return np.frombuffer(payload, np.uint8).reshape(height, width, 3)
    try:
        with Image.open(io.BytesIO(payload), formats=["JPEG"]) as stored:
            image = np.asarray(stored)
    except (OSError, SyntaxError, ValueError) as error:
        raise UndecodableError(f"does not decode ({error})") from None
    if image.shape != (height, width, 3):
        raise UndecodableError(f"decodes to {image.shape}, its record says {(height, width, 3)}")
    return image


def render(image: NDArray[np.uint8], plan: Plan, k: int, *, size: int, fill: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Carry out row `k` of a plan on one image; returns (size, size, 3) bytes."""
    top, left, rows, columns = plan.boxes[k].tolist()
    if (rows, columns) == (size, size):
        image = shift(image, top, left, size)
    else:
        image = area_resize(image[top : top + rows, left : left + columns], size)
    if plan.colours is not None:
        image = recolour(image, plan.colours[k])
    if plan.flips[k]:
        image = image[:, ::-1]
    top, left, bottom, right = plan.holes[k].tolist()
    if bottom > top and right > left:
        image = image.copy()
        image[top:bottom, left:right] = fill
    return np.ascontiguousarray(image)


def shift(image: NDArray[np.uint8], top: int, left: int, size: int) -> NDArray[np.uint8]:
    """A box of size x size pixels that may reach over the border, where it is black."""
    height, width = image.shape[:2]
    if 0 <= top <= height - size and 0 <= left <= width - size:
        return image[top : top + size, left : left + size]
    out = np.zeros((size, size, 3), np.uint8)
    first, last = max(top, 0), min(top + size, height)
    start, end = max(left, 0), min(left + size, width)
    out[first - top : last - top, start - left : end - left] = image[first:last, start:end]
    return out


def area_resize(image: NDArray[np.uint8], size: int) -> NDArray[np.uint8]:
    """Each output pixel is the mean of the area that it covers in the input, exactly (OpenCV's INTER_AREA)."""
    rows = _area_means(image.astype(np.float32), size)
    columns = _area_means(rows.transpose(1, 0, 2), size).transpose(1, 0, 2)
    return np.rint(columns).astype(np.uint8)


def _area_means(values: NDArray[np.float32], size: int) -> NDArray[np.float32]:
    """Means over `size` equal parts of the first axis: differences of its integral at the parts' edges."""
    length = len(values)
    integral = np.zeros((length + 1, *values.shape[1:]), np.float64)
    np.cumsum(values, axis=0, out=integral[1:], dtype=np.float64)
    edges = np.arange(size + 1) * (length / size)
    low = np.minimum(edges.astype(np.int64), length - 1)
    part = (edges - low)[:, None, None]
    at_edges = integral[low] + part * values[low]
    return (np.diff(at_edges, axis=0) * (size / length)).astype(np.float32)


def recolour(image: NDArray[np.uint8], factors: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Brightness, contrast, saturation in this order, each rounded to bytes, as torchvision does on PIL images."""
    brightness, contrast, saturation = factors
    image = _to_bytes(image * brightness)
    mean = np.float32(np.floor(_grey(image).mean() + 0.5))
    image = _to_bytes(mean + (image - mean) * contrast)
    grey = _grey(image).astype(np.float32)[..., None]
    return _to_bytes(grey + (image - grey) * saturation)


def _grey(image: NDArray[np.uint8]) -> NDArray[np.int64]:
    """PIL's luma."""
    return (image.astype(np.int64) @ np.array([19595, 38470, 7471]) + 0x8000) >> 16


def _to_bytes(values: NDArray[np.float32]) -> NDArray[np.uint8]:
    return np.clip(np.floor(values + np.float32(0.5)), 0, 255).astype(np.uint8)
