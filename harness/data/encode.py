"""From what a source delivers to what stands in the file: one upright RGB image, shrunk, as JPEG or as raw pixels."""

import io
import warnings
from dataclasses import asdict, dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, UnidentifiedImageError

from harness.data.beton import JPEG, MAX_SIDE, RAW
from harness.data.randomness import keys, uniforms

_JPEG_CHOICE = 3
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}  # fmt: skip
# PIL modes whose 16-bit or floating values `convert` would clip instead of scale.
_DEEP_MODES = {"I;16", "I;16B", "I;16L", "I;16N", "I"}


class BadImageError(Exception):
    """One image that cannot be stored; the text says why."""


@dataclass(frozen=True)
class WriteSettings:
    """How images are stored. `max_size`: longest side in pixels, 0: no limit; `jpeg_share`: 0 to 1, the rest is raw."""

    max_size: int = 500
    jpeg_share: float = 0.5
    quality: int = 90
    seed: int = 0
    page_bytes: int = 8 << 20

    def to_dict(self) -> dict[str, int | float | str | bool]:
        """For the manifest."""
        return asdict(self)


@dataclass(frozen=True)
class Encoded:
    """One image as stored; `change` says what had to be done to make it RGB and upright, if anything."""

    mode: int
    height: int
    width: int
    payload: bytes
    pixels: NDArray[np.uint8]
    change: str | None


def encode(raw: bytes | NDArray[np.uint8], settings: WriteSettings, position: int) -> Encoded:
    """Store one image; `position` in the split decides by chance whether as JPEG. Raises `BadImageError`."""
    image, change = _open(raw)
    longest = max(image.size)
    if settings.max_size and longest > settings.max_size:
        size = [max(1, round(side * settings.max_size / longest)) for side in image.size]
        image = image.resize((size[0], size[1]), Image.Resampling.LANCZOS, reducing_gap=3.0)
    if max(image.size) > MAX_SIDE:
        raise BadImageError(
            f"is {image.width} x {image.height} pixels, FFCV's limit is {MAX_SIDE} a side: give --max-size"
        )
    pixels = np.asarray(image)
    as_jpeg = uniforms(keys(settings.seed, _JPEG_CHOICE, position), 1)[0] < settings.jpeg_share
    if as_jpeg:
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=settings.quality, restart_marker_blocks=restart_interval(image.width))
        payload = buffer.getvalue()
    else:
        payload = pixels.tobytes()
    if len(payload) > settings.page_bytes:
        raise BadImageError(
            f"needs {len(payload)} bytes at {image.width} x {image.height} pixels, more than one of FFCV's pages "
            f"({settings.page_bytes} bytes): give a smaller --max-size or a larger --page-mib"
        )
    return Encoded(JPEG if as_jpeg else RAW, image.height, image.width, payload, pixels, change)


def restart_interval(width: int) -> int:
    """Blocks of 16 x 16 pixels between restart markers: a part of a row that divides it, about 64 pixels long.

    At these markers a decoder may begin, so a crop costs only the parts that it touches (`kernel`); they add some 1%.
    """
    blocks = -(-width // 16)
    return next((part for part in (4, 5, 3, 6, 2) if blocks % part == 0), blocks)


def _open(raw: bytes | NDArray[np.uint8]) -> tuple[Image.Image, str | None]:
    if not isinstance(raw, bytes):
        return Image.fromarray(raw), None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            image = Image.open(io.BytesIO(raw))
            image.load()
            return _upright_rgb(image)
    except MemoryError:
        raise
    except UnidentifiedImageError:
        raise BadImageError("does not decode: it is no image file") from None
    except Exception as error:  # noqa: BLE001 - on foreign bytes decoders raise what they like, struct.error included
        raise BadImageError(f"does not decode: {str(error) or type(error).__name__}") from None


def _turn(image: Image.Image) -> Image.Transpose | None:
    """What makes an image upright as its EXIF says; None where that says nothing, or cannot be read."""
    try:
        return _TURNS.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # noqa: BLE001 - the pixels are good all the same
        return None


def _upright_rgb(image: Image.Image) -> tuple[Image.Image, str | None]:
    """RGB as torchvision's loader makes it, 16-bit values scaled to bytes, turned as the camera says."""
    changes = []
    turn = _turn(image)
    upright = image if turn is None else image.transpose(turn)
    if turn is not None:
        changes.append("turned upright")
    if upright.mode in _DEEP_MODES:
        deep = np.asarray(upright).astype(np.int64)
        changes.append("16 bit")
        upright = Image.fromarray(np.clip(deep >> 8 if deep.max(initial=0) > 255 else deep, 0, 255).astype(np.uint8))
    if upright.mode != "RGB":
        if not changes or changes[-1] != "16 bit":
            changes.append(upright.mode)
        upright = upright.convert("RGB")
    return upright, ", ".join(changes) or None
