from pathlib import Path

import numpy as np
import pytest

from harness.data import ensure
from harness.data.writer import write
from tests.unit.data.samples import HALF_JPEG, RAW, Listed, picture


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The digits, written once."""
    folder = tmp_path_factory.mktemp("digits")
    ensure("digits", folder)
    return folder


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 + 60 smooth images of 60 to 140 pixels, half of them JPEG, in four classes."""
    folder = tmp_path_factory.mktemp("photos")
    sides = np.random.default_rng(0).integers(60, 140, (120, 2)).tolist()
    images = [picture(height, width, k) for k, (height, width) in enumerate(sides)]
    write(Listed(images, [k % 4 for k in range(120)]), folder, HALF_JPEG, workers=0)
    return folder


@pytest.fixture(scope="session")
def pixels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """90 + 90 raw images of 100 to 120 pixels in pages of 2 MiB: several pages."""
    folder = tmp_path_factory.mktemp("pixels")
    sides = np.random.default_rng(0).integers(100, 120, (180, 2)).tolist()
    write(Listed([picture(*side, k) for k, side in enumerate(sides)]), folder, RAW, workers=0)
    return folder
