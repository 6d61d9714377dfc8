import pytest

from harness.config import load_recipe, recipe_names
from harness.errors import UserError
from harness.ray_cluster import Node
from slurm.profile import load_profile
from sweeps.resources import Demand, concurrency, idle_gpus, places


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
    assert Demand.of(recipe) == Demand(1, 2.0, 0.0, most_workers=2)


CLUSTER = [Node(64.0, 8.0)] * 4


def test_idle_gpus_are_told_with_their_arithmetic():
    """Nodes as in slurm/profiles/gpu_cluster.toml, and eight ranks of 12 CPUs each: 4 x 5 places make two trials."""
    assert idle_gpus(Demand(8, 12.0, 1.0), CLUSTER) == (
        "16 of 32 GPUs will stay idle: a trial wants 8 x (12 CPU + 1 GPU); a node with 64 CPU + 8 GPU has room for 5 "
        "such workers, all 4 for 20, which is 2 trial(s) at once. To use them, lower run.cpus_per_worker from 12 to 8."
    )


@pytest.mark.parametrize(
    ("demand", "nodes", "limit", "words"),
    [
        (Demand(8, 8.0, 1.0), CLUSTER, None, None),
        (Demand(1, 8.0, 1.0), CLUSTER, None, None),
        (Demand(1, 8.0, 0.5), CLUSTER, None, ["8 CPU + 0.5 GPU", "16 of 32 GPUs", "from 8 to 4"]),
        (Demand(8, 8.0, 1.0), CLUSTER, 3, ["8 of 32 GPUs", "raise max_concurrent = 3"]),
        (Demand(6, 8.0, 1.0), [Node(64.0, 8.0)], None, ["2 of 8 GPUs", "1 trial(s)", "[min, max]"]),
        (Demand(6, 8.0, 1.0, most_workers=8), [Node(64.0, 8.0)], None, None),
        (Demand(2, 4.0, 0.0), [Node(64.0, 8.0)], None, None),
        (Demand(2, 4.0, 1.0), [Node(64.0)], None, None),
    ],
)
def test_whether_gpus_stay_idle(demand: Demand, nodes: list[Node], limit: int | None, words: list[str] | None):
    text = idle_gpus(demand, nodes, limit)
    assert (text is None) == (words is None)
    for word in words or []:
        assert word in (text or "")


def test_the_imagenet_recipes_fill_the_nodes_of_the_profile_and_leave_the_launching_thread_a_cpu():
    profile = load_profile("gpu_cluster")
    nodes = [Node(float(profile.node.cpus or 0), float(profile.node.gpus))] * profile.job.nodes
    for name in (name for name in recipe_names() if name.startswith("imagenet")):
        recipe = load_recipe(name)
        assert idle_gpus(Demand.of(recipe), nodes) is None, name
        assert recipe.data.workers < recipe.run.cpus_per_worker, name
