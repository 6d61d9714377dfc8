"""Every kind of image that turns up in image folders, and what becomes of it."""

import numpy as np
import pytest
from PIL import Image

from harness.data.beton import JPEG, RAW
from harness.data.encode import BadImageError, Encoded, WriteSettings, encode
from tests.unit.data.samples import RAW as AS_PIXELS
from tests.unit.data.samples import file_bytes, jpeg, picture

COLOURS = picture(20, 30, 1)
GREY = COLOURS[..., 0]


def stored(content: bytes) -> Encoded:
    return encode(content, AS_PIXELS, 0)


def pixels(image: Encoded) -> np.ndarray:
    assert image.mode == RAW
    return np.frombuffer(image.payload, np.uint8).reshape(image.height, image.width, 3)


def test_rgb_stays_as_it_is():
    image = stored(file_bytes(COLOURS, "PNG"))
    assert (pixels(image) == COLOURS).all()
    assert image.change is None


def test_grayscale_fills_three_channels():
    image = stored(file_bytes(GREY, "PNG"))
    assert (pixels(image) == GREY[..., None]).all()
    assert image.change == "L"


def test_grayscale_jpeg():
    image = stored(jpeg(GREY, quality=100))
    assert np.abs(pixels(image).astype(int) - GREY[..., None]).max() < 12
    assert image.change == "L"


def test_cmyk_jpeg():
    image = stored(jpeg(Image.fromarray(COLOURS).convert("CMYK"), quality=100))
    assert np.abs(pixels(image).astype(int) - COLOURS).mean() < 8
    assert image.change == "CMYK"


def test_rgba_loses_its_transparency_as_in_torchvision():
    alpha = np.full((20, 30, 1), 7, np.uint8)
    image = stored(file_bytes(np.concatenate([COLOURS, alpha], axis=2), "PNG"))
    assert (pixels(image) == COLOURS).all()
    assert image.change == "RGBA"


def test_palette():
    palette = Image.fromarray(COLOURS).quantize(16)
    image = stored(file_bytes(palette, "PNG"))
    assert (pixels(image) == np.asarray(palette.convert("RGB"))).all()
    assert image.change == "P"


def test_sixteen_bit_is_scaled_not_clipped():
    deep = (GREY.astype(np.uint16) << 8) + 77
    image = stored(file_bytes(Image.fromarray(deep), "PNG"))
    assert (pixels(image) == GREY[..., None]).all()
    assert image.change == "16 bit"


@pytest.mark.parametrize(("orientation", "turns"), [(3, 2), (6, 3), (8, 1)])
def test_exif_rotation_is_undone(orientation: int, turns: int):
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = stored(file_bytes(COLOURS, "PNG", exif=exif))
    assert (pixels(image) == np.rot90(COLOURS, turns)).all()
    assert image.change == "turned upright"


def test_broken_exif_neither_ends_the_run_nor_costs_the_image():
    """Cameras write tags of the wrong type: PIL's own exif_transpose raises struct.error on them."""
    exif = Image.Exif()
    exif[0x0112], exif[0x0131] = 6, "program"
    content = jpeg(COLOURS, exif=exif)
    place = content.index(b"\x01\x31\x00\x02") + 3
    image = stored(content[:place] + b"\x03" + content[place + 1 :])
    assert (image.height, image.width) == (COLOURS.shape[1], COLOURS.shape[0])
    assert image.change == "turned upright"


@pytest.mark.parametrize("error", [RuntimeError("a decoder's own"), KeyError("tag")])
def test_whatever_a_decoder_raises_is_one_bad_image(monkeypatch: pytest.MonkeyPatch, error: Exception):
    def load(_image: object) -> None:
        raise error

    monkeypatch.setattr("PIL.PngImagePlugin.PngImageFile.load", load)
    with pytest.raises(BadImageError, match="does not decode"):
        stored(file_bytes(COLOURS, "PNG"))


@pytest.mark.parametrize("keep", [0.0, 0.3, 0.9])
def test_truncated_jpeg_is_refused(keep: float):
    content = jpeg(picture(64, 64, 3))
    with pytest.raises(BadImageError, match="does not decode"):
        stored(content[: int(keep * len(content))])


def test_no_image_at_all_is_refused():
    with pytest.raises(BadImageError, match="does not decode: it is no image file"):
        stored(b"<html>not found</html>")


def test_an_image_larger_than_a_page_is_refused_with_the_remedy():
    with pytest.raises(
        BadImageError, match=r"needs 3000000 bytes at 1000 x 1000 pixels, more than one of FFCV's pages "
    ):
        stored(file_bytes(np.zeros((1000, 1000, 3), np.uint8), "BMP"))


def test_sides_beyond_ffcv_are_refused():
    with pytest.raises(BadImageError, match="FFCV's limit is 65535 a side"):
        stored(file_bytes(np.zeros((1, 70_000), np.uint8), "PNG"))


def test_large_images_shrink_to_the_longest_side():
    image = encode(file_bytes(picture(300, 600, 1), "PNG"), WriteSettings(max_size=200, jpeg_share=0.0), 0)
    assert (image.height, image.width) == (100, 200)
    assert abs(pixels(image).mean() - picture(300, 600, 1).mean()) < 2
    assert encode(COLOURS, WriteSettings(max_size=200), 0).width == 30


def test_the_share_of_jpeg_is_drawn_from_the_seed():
    def modes(seed: int) -> list[int]:
        return [encode(COLOURS, WriteSettings(jpeg_share=0.3, seed=seed), k).mode for k in range(400)]

    assert modes(0) == modes(0) != modes(1)
    assert 0.23 < modes(0).count(JPEG) / 400 < 0.37


def test_jpeg_quality():
    sizes = [len(encode(picture(100, 100, 2), WriteSettings(jpeg_share=1.0, quality=q), 0).payload) for q in (30, 95)]
    assert 2 * sizes[0] < sizes[1]
