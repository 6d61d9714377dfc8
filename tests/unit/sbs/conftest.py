"""None of these tests needs the compiled kernels."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

import sbs


@pytest.fixture(autouse=True)
def _eager_kernels() -> Iterator[None]:
    before = sbs.use_compiled(False)
    yield
    sbs.use_compiled(before)
