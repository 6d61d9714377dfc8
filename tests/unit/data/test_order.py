import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness.data.order import eval_order, quasi_random_order, train_batches, train_order

COUNTS = {"count": st.integers(1, 400), "batch": st.integers(1, 17), "world": st.integers(1, 5)}


@given(**COUNTS, seed=st.integers(0, 2**40), epoch=st.integers(0, 100))
def test_training_ranks_share_the_set_in_equal_batches(count: int, batch: int, world: int, seed: int, epoch: int):
    orders = [train_order(count, batch, seed=seed, epoch=epoch, rank=r, world=world) for r in range(world)]
    assert {len(order) for order in orders} == {train_batches(count, batch, world) * batch}
    everyone = np.concatenate(orders)
    assert len(set(everyone.tolist())) == len(everyone)
    assert count - len(everyone) < batch * world
    assert ((everyone >= 0) & (everyone < count)).all()


def test_global_batches_do_not_depend_on_how_ranks_share_them():
    def global_batch(batch: int, world: int, number: int) -> set[int]:
        part = slice(number * batch, (number + 1) * batch)
        return {k for r in range(world) for k in train_order(100, batch, seed=1, epoch=2, rank=r, world=world)[part]}

    for number in range(8):
        assert global_batch(12, 1, number) == global_batch(6, 2, number) == global_batch(3, 4, number)


def test_epochs_and_seeds_differ_and_leave_out_different_samples():
    place = {"rank": 0, "world": 1}
    orders = [train_order(103, 10, seed=s, epoch=e, **place) for s in (0, 1) for e in (0, 1)]
    assert len({tuple(order) for order in orders}) == 4
    assert len({frozenset(order.tolist()) for order in orders}) == 4


@given(count=st.integers(0, 300), world=st.integers(1, 9))
def test_validation_is_every_sample_once_without_padding(count: int, world: int):
    shards = [eval_order(count, rank=r, world=world) for r in range(world)]
    assert np.concatenate(shards).tolist() == list(range(count))
    assert max(map(len, shards)) - min(map(len, shards)) <= 1


@given(**COUNTS, pages=st.integers(1, 40), seed=st.integers(0, 99))
def test_quasi_random_ranks_share_the_set_too(count: int, batch: int, world: int, pages: int, seed: int):
    page_of = np.arange(count) * pages // count
    orders = [
        quasi_random_order(page_of, batch, seed=seed, epoch=7, rank=r, world=world, window=3 * batch)
        for r in range(world)
    ]
    assert {len(order) for order in orders} == {train_batches(count, batch, world) * batch}
    everyone = np.concatenate(orders)
    assert len(set(everyone.tolist())) == len(everyone)


@pytest.fixture
def page_of():
    return np.arange(6000) // 50  # 120 pages of 50 samples


def test_quasi_random_needs_few_pages_at_a_time(page_of: np.ndarray):
    place = {"seed": 0, "epoch": 3, "rank": 1, "world": 2}
    order = quasi_random_order(page_of, 25, window=400, **place)
    first, last = {}, {}
    for position, page in enumerate(page_of[order].tolist()):
        first.setdefault(page, position)
        last[page] = position
    alive = [sum(first[p] <= at <= last[p] for p in first) for at in range(0, len(order), 25)]
    assert max(alive) <= 400 // 50 + 2
    assert len(first) <= 61  # half of the pages, and one that is shared with the other rank


def test_quasi_random_mixes_pages_and_epochs(page_of: np.ndarray):
    place = {"seed": 0, "rank": 0, "world": 1}
    first = quasi_random_order(page_of, 25, window=400, epoch=0, **place)
    second = quasi_random_order(page_of, 25, window=400, epoch=1, **place)
    pages_of_batches = [len(set(page_of[first[at : at + 25]].tolist())) for at in range(0, 6000, 25)]
    assert np.mean(pages_of_batches) > 6  # of the 8 that a window holds
    assert (first == second).mean() < 0.01
    assert set(page_of[first[:400]]) != set(page_of[second[:400]])
