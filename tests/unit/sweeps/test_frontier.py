import math
import statistics

from hypothesis import given
from hypothesis import strategies as st

from sweeps.frontier import Row, build, hypervolume, over_seeds, pareto, reference
from tests.unit.sweeps.rows import row

POINTS = st.lists(
    st.tuples(st.integers(min_value=1, max_value=6), st.integers(min_value=80, max_value=86)), min_size=1, max_size=12
)


def rows_of(points: list[tuple[int, int]]) -> list[Row]:
    return [
        row(key=f"k{i}", gbops=float(gbops), top1=float(top1), bop_reduction=64.0 / gbops)
        for i, (gbops, top1) in enumerate(points)
    ]


def dominated(one: Row, other: Row) -> bool:
    no_worse = other.top1 >= one.top1 and other.gbops <= one.gbops
    return no_worse and (other.top1 > one.top1 or other.gbops < one.gbops)


@given(POINTS)
def test_pareto_set_by_its_definition(points: list[tuple[int, int]]):
    rows = rows_of(points)
    expected = {one.trial for one in rows if not any(dominated(one, other) for other in rows)}
    assert {chosen.trial for chosen in pareto(rows)} == expected


def test_rows_are_sorted_by_model_gbops_trial_and_families_do_not_compete():
    rows = [
        row(key="c", model="resnet20", gbops=2.0, top1=95.0),
        row(key="b", model="resnet20", gbops=2.0, top1=95.0),
        row(key="d", model="mobilenetv2", gbops=1.0, top1=99.0),
        row(key="a", model="resnet20", gbops=3.0, top1=94.0),
        row(key="e", model="resnet20", data="letters", gbops=9.0, top1=50.0),
    ]
    frontier = build(["e"], rows)
    assert [r.trial for r in frontier.rows] == ["d", "b", "c", "a", "e"]
    # The ties stay both, the dominated one does not, and neither another model nor another data set dominates.
    assert [frontier.is_best(r) for r in frontier.rows] == [True, True, True, False, True]


def test_hypervolume_by_hand():
    rows = [
        row(key="f", method="full_precision", top1=90.0, gbops=64.0, bop_reduction=1.0),
        row(key="a", top1=89.0, gbops=4.0, bop_reduction=16.0),  # 4 doublings, 9 points above the reference of 80
        row(key="b", top1=85.0, gbops=1.0, bop_reduction=64.0),  # 6 doublings, 5 points
        row(key="c", top1=84.0, gbops=8.0, bop_reduction=8.0),  # dominated: adds nothing
        row(key="d", top1=70.0, gbops=0.5, bop_reduction=128.0),  # below the reference: adds nothing
    ]
    assert reference(rows) == (1.0, 80.0)
    assert hypervolume(rows) == 6 * 5 + 4 * (9 - 5)


@given(POINTS)
def test_hypervolume_by_counting_cells(points: list[tuple[int, int]]):
    # Reductions 2^a and integer accuracies make every dominated cell a unit square; no full precision: reference at 0.
    rows = [row(key=f"k{i}", gbops=2.0**-a, bop_reduction=2.0**a, top1=float(t)) for i, (a, t) in enumerate(points)]
    cells = {(x, y) for a, t in points for x in range(a) for y in range(t)}
    assert math.isclose(hypervolume(rows), len(cells))


def test_seeds_are_grouped_by_point():
    rows = [row(key=f"k{s}", seed=s, point="p", top1=t, gbops=g) for s, t, g in [(0, 90.0, 1.0), (1, 93.0, 1.2)]]
    rows.append(row(key="x", point="q", top1=80.0, gbops=9.0))
    pair, single = over_seeds(rows)
    assert (pair.seeds, pair.top1_mean, round(pair.top1_std, 6)) == (2, 91.5, round(statistics.stdev([90, 93]), 6))
    assert (single.seeds, single.top1_std, single.gbops_mean) == (1, 0.0, 9.0)


def test_frontier_follows_from_the_printed_figures():
    # Differences below the printed precision must not decide.
    a, b = row(key="a", gbops=1.00000001, top1=90.0), row(key="b", gbops=1.0, top1=90.00000001)
    frontier = build(["e"], [a, b])
    assert all(frontier.is_best(r) for r in frontier.rows)


def test_a_trial_that_is_given_twice_counts_once():
    rows = [row(key="a", gbops=1.0), row(key="b", seed=1, gbops=1.1)]
    frontier = build(["e", "e"], [*rows, *rows, row(key="a", experiment="f")])
    assert (frontier.experiments, len(frontier.rows)) == (("e",), 3)
    assert [group.seeds for group in over_seeds(frontier.rows)] == [2, 1]
