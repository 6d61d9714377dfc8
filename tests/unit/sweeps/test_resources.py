import pytest

from harness.config import load_recipe
from harness.errors import UserError
from harness.ray_cluster import Node
from sweeps.resources import Demand, concurrency, places


@pytest.mark.parametrize(
    ("demand", "node", "expected"),
    [
        (Demand(2, 1.0, 0.0), Node(2.0), 2),
        (Demand(2, 0.5, 0.0), Node(2.0), 4),
        (Demand(2, 0.1, 0.0), Node(0.3), 3),  # 0.3 / 0.1 is 2.9999999999999996 in floating point
        (Demand(2, 1.0, 1.0), Node(16.0, 4.0), 4),
        (Demand(2, 8.0, 1.0), Node(16.0, 4.0), 2),
        (Demand(2, 1.0, 1.0), Node(16.0), 0),
    ],
)
def test_places(demand: Demand, node: Node, expected: int):
    assert places(demand, node) == expected


def test_concurrency_counts_whole_trials():
    assert concurrency(Demand(2, 1.0, 0.0), [Node(2.0)], "s") == 1
    assert concurrency(Demand(2, 1.0, 0.0), [Node(5.0)], "s") == 2
    assert concurrency(Demand(2, 1.0, 0.0), [Node(5.0)], "s", limit=1) == 1
    # A trial may span nodes, a worker may not: 3 + 3 places of 4-CPU workers make 1 trial of 5.
    assert concurrency(Demand(5, 4.0, 0.0), [Node(14.0), Node(15.0)], "s") == 1
    assert concurrency(Demand(8, 7.0, 1.0), [Node(64.0, 8.0)] * 4, "s") == 4


def test_the_impossible_is_refused_with_its_arithmetic():
    with pytest.raises(UserError) as caught:
        concurrency(Demand(4, 1.0, 0.0), [Node(2.0)], "digits")
    message = str(caught.value)
    for words in ["'digits'", "4 x (1 CPU)", "machine (2 CPU) has room for 2 such workers", "Lower run.workers to 2"]:
        assert words in message
    with pytest.raises(UserError, match=r"1 x \(1 CPU \+ 1 GPU\), and the 2 nodes \(8 CPU, 4 CPU\) have room for 0"):
        concurrency(Demand(1, 1.0, 1.0), [Node(8.0), Node(4.0)], "digits")


def test_an_elastic_trial_needs_its_least():
    recipe = load_recipe("digits_resnet20", ["run.workers=[1, 2]", "run.cpus_per_worker=2"])
    assert Demand.of(recipe) == Demand(1, 2.0, 0.0)
