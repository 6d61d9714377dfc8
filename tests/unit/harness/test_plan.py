import pytest

from harness.config import load_recipe
from harness.plan import budgets, chosen_budget, plan, remark_on_gates, stage_config, stage_key, takes_budget
from sbs.gates import PACE


def recipe(*overrides: str):
    return load_recipe("digits_resnet20", overrides)


@pytest.mark.parametrize(
    ("method", "epochs"),
    [
        ("full_precision", {"pretrain": 8}),
        ("sbs", {"pretrain": 8, "search": 5, "compress": None, "finetune": 4}),
        ("uniform_2", {"pretrain": 8, "compress": None, "finetune": 9}),
        ("policy", {"pretrain": 8, "compress": None, "finetune": 9}),
        ("prune_then_quant", {"pretrain": 8, "prune": 2, "search": 3, "compress": None, "finetune": 4}),
    ],
)
def test_every_method_gets_the_same_epochs_after_pretraining(method: str, epochs: dict[str, int | None]):
    """5 of the search and 4 of the finetune."""
    policy = ["search.policy=mine.json"] if method == "policy" else []
    made = recipe(f"search.method={method}", "search.epochs=5", *policy)
    configs = {stage: stage_config(made, stage) for stage in plan(made)}
    assert {stage: config and config.epochs for stage, config in configs.items()} == epochs


@pytest.mark.parametrize(
    ("override", "changed"),
    [
        ("data.batch_size=32", {"pretrain", "search", "finetune"}),
        ("pretrain.lr=0.2", {"pretrain", "search", "finetune"}),
        ("search.lambda=0.7", {"search", "finetune"}),
        ("finetune.lr=0.7", {"finetune"}),
        ("run.stall_limit_s=7", set()),
    ],
)
def test_the_key_of_a_stage_holds_what_it_depends_on(override: str, changed: set[str]):
    def keys(*overrides: str) -> dict[str, str]:
        return {stage: stage_key(recipe(*overrides), stage, "data") for stage in ("pretrain", "search", "finetune")}

    before, after = keys(), keys(override)
    assert {stage for stage in before if before[stage] != after[stage]} == changed
    assert len(set(before.values())) == 3


def test_given_weights_take_the_place_of_the_pretraining_in_the_key():
    assert stage_key(recipe(), "search", "d", "w") == stage_key(recipe("pretrain.lr=0.7"), "search", "d", "w")
    assert stage_key(recipe(), "search", "d", "w") != stage_key(recipe(), "search", "d", "v")


def test_methods_share_their_pretraining():
    keys = {stage_key(recipe(f"search.method={m}"), "pretrain", "d") for m in ("full_precision", "sbs", "uniform_4")}
    assert len(keys) == 1


CALM = {
    "gates/flips": 40.0,
    "gates/flips_per_gate": 0.2,
    "search/train_top1": 60.0,
    "search/top1": 58.0,
}


def test_a_search_that_does_what_it_should_is_not_remarked_upon():
    for step in (1, 10, 20):
        assert remark_on_gates(recipe().search, step, 20, CALM) is None


def test_a_search_whose_gates_stand_still_is_remarked_upon_from_its_middle_on():
    still = CALM | {"gates/flips": 0.0, "gates/flips_per_gate": 0.0}
    search = recipe("search.lambda=0.2").search
    assert remark_on_gates(search, 49, 100, still) is None
    text = remark_on_gates(search, 50, 100, still)
    assert text is not None
    for words in ["no gate has moved after 50 of 100 steps", "the loss gains more", "raise search.lambda (now 0.2)"]:
        assert words in text
    assert remark_on_gates(search, 50, 100, still | {"gates/flips": 1.0}) is None
    assert remark_on_gates(recipe("search.lambda=0").search, 50, 100, still) is None, "nothing presses, nothing moves"
    budget = remark_on_gates(recipe("search.budget=0.03").search, 50, 100, still)
    assert budget is not None
    assert budget.endswith("raise the epochs"), "there is no lambda to raise"


def test_a_search_too_short_for_its_gates_is_told_so():
    """Lambda would not help: a gate is judged by two thirds of the least window, and may not move before."""
    assert 2 / 3 * PACE.fewest == 16
    still = CALM | {"gates/flips": 0.0, "gates/flips_per_gate": 0.0}
    for search in (recipe("search.lambda=0.2").search, recipe("search.budget=0.03").search):
        text = remark_on_gates(search, 12, 24, still)
        assert text is not None
        for words in ["after 12 of 24 steps", "looked at for 16 steps first", "raise the epochs"]:
            assert words in text


def test_gates_that_chatter_are_remarked_upon():
    """Trying a gate and taking that back are two flips; three flips of every gate are more than that."""
    search = recipe().search
    assert remark_on_gates(search, 5, 20, CALM | {"gates/flips_per_gate": 3.0}) is None
    text = remark_on_gates(search, 5, 20, CALM | {"gates/flips_per_gate": 3.25})
    assert text is not None
    for words in ["gates chatter: 3.2 flips per gate after 5 of 20 steps", "data.batch_size", "lower search.lr"]:
        assert words in text


def test_norms_of_other_networks_are_remarked_upon_where_nobody_estimates_them_anew():
    search, apart = recipe("search.norm_batches=0").search, CALM | {"search/top1": 49.5}
    text = remark_on_gates(search, 5, 20, apart)
    assert text is not None
    for words in ["validation is 10.5 points below training", "running statistics", "set search.norm_batches"]:
        assert words in text
    assert remark_on_gates(search, 5, 20, apart | {"search/top1": 50.0}) is None
    assert remark_on_gates(recipe().search, 5, 20, apart) is None, "they are estimated anew: the gap has another cause"


TWO = "search.snapshots=[0.05, 0.03]"


def test_snapshots_share_their_search_and_nothing_behind_it():
    trials = [recipe(TWO, f"search.budget={budget}") for budget in (0.05, 0.03)] + [recipe(TWO)]
    searches = {stage_key(made, "search", "d") for made in trials}
    assert len(searches) == 1
    for stage in ("compress", "finetune"):
        first, second, default = (stage_key(made, stage, "d") for made in trials)
        assert first != second == default
    others = ["search.budget=0.03", "search.snapshots=[0.05, 0.02]", "search.lambda=0.03", "search.gbops=0.03"]
    assert len({stage_key(recipe(other), "search", "d") for other in others} | searches) == len(others) + 1
    assert stage_key(recipe(TWO, "search.lr=0.5"), "search", "d") not in searches


def test_the_last_snapshot_is_what_the_search_ends_with():
    assert chosen_budget(recipe(TWO, "search.budget=0.05").search) == 0.05
    assert chosen_budget(recipe(TWO, "search.budget=0.03").search) is None
    assert chosen_budget(recipe(TWO).search) is None
    assert chosen_budget(recipe("search.budget=0.05").search) is None
    assert chosen_budget(recipe().search) is None


def test_budgets_are_falling_shares():
    assert budgets(recipe(TWO, "search.budget=0.05").search, 1e9) == (0.05, 0.03)
    assert budgets(recipe("search.gbops=2").search, 40e9) == (0.05,)
    assert budgets(recipe("search.budget=0.05").search, 40e9) == (0.05,)
    assert [takes_budget(recipe(o).search) for o in (TWO, "search.gbops=2", "search.lambda=0")] == [True, True, False]
    assert not takes_budget(recipe("search.method=uniform_4", "search.budget=0.05").search)
