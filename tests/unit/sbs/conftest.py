"""None of these tests needs the compiled kernels."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

import sbs


@pytest.fixture(autouse=True)
def _eager_kernels() -> Iterator[None]:
    before = sbs.use_compiled(False)
    yield
    sbs.use_compiled(before)


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> Iterator[None]:
    """Tensors are small here: threads that wait for each other on a busy machine cost more than they bring."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
