import pytest

from harness.config import load_recipe
from harness.plan import budgets, chosen_budget, idle_gates, plan, stage_config, stage_key, takes_budget


def recipe(*overrides: str):
    return load_recipe("digits_resnet20", overrides)


@pytest.mark.parametrize(
    ("method", "epochs"),
    [
        ("full_precision", {"pretrain": 8}),
        ("sbs", {"pretrain": 8, "search": 5, "compress": None, "finetune": 4}),
        ("uniform_2", {"pretrain": 8, "compress": None, "finetune": 9}),
        ("prune_then_quant", {"pretrain": 8, "prune": 2, "search": 3, "compress": None, "finetune": 4}),
    ],
)
def test_every_method_gets_the_same_epochs_after_pretraining(method: str, epochs: dict[str, int | None]):
    made = recipe(f"search.method={method}", "search.epochs=5")
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


def test_a_search_whose_gates_stand_still_is_remarked_upon():
    search = recipe("search.lambda=0.2").search
    still = {
        "gates/flips": 0.0,
        "gates/margin_weight": 0.8,
        "gates/margin_activation": 0.25,
        "gates/margin_channel": 0.5,
    }
    assert idle_gates(search, 9, 20, still) is None
    text = idle_gates(search, 10, 20, still)
    assert text is not None
    rates = "search.bit_threshold_lr / search.prune_threshold_lr (now 20 / 40)"
    for words in ["after 10 of 20 steps", "margin 0.25", f"raise search.lambda (now 0.2) or {rates}"]:
        assert words in text
    assert idle_gates(search, 10, 20, still | {"gates/flips": 1.0}) is None
    assert idle_gates(recipe("search.lambda=0").search, 10, 20, still) is None


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
