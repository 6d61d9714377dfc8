"""Budgets and snapshots in a sweep: which trials follow from them, what is refused, when torch is loaded."""

import subprocess
import sys
from pathlib import Path

import pytest

from harness.errors import UserError
from harness.identity import trial_key
from sweeps import driver
from sweeps.plan import Planner
from tests.unit.sweeps.test_plan import claim, planner

BUDGETS = (0.05, 0.03, 0.015)


def snapshots(tmp_path: Path, **changes: object) -> Planner:
    settings = {"axes": {}, "set": {"search.snapshots": list(BUDGETS)}}
    return planner(tmp_path, **(settings | changes))


def test_a_search_with_snapshots_becomes_a_trial_for_each(tmp_path: Path):
    plan = snapshots(tmp_path).plan()
    (full,) = plan.first
    assert [spec.recipe.search.budget for spec in plan.rest] == [0.015], "the last one searches, for all"
    assert [spec.recipe.search.budget for spec in plan.last] == [0.05, 0.03]
    assert plan.trials == plan.first + plan.rest + plan.last
    for spec in plan.rest + plan.last:
        assert spec.recipe.search.snapshots == BUDGETS
        assert spec.recipe.search.lambda_ is None
        assert spec.init == f"{full.run_dir}/weights.pt"
        assert spec.stage_cache == str(tmp_path / "s" / "stages")
        assert spec.key == trial_key(spec.recipe, "checksum")
    assert len({spec.key for spec in plan.trials}) == len({spec.run_dir for spec in plan.trials}) == 4
    assert full.recipe.search.snapshots == ()
    assert full.stage_cache is None
    assert full.key == planner(tmp_path).plan().first[0].key


def test_snapshots_leave_methods_without_a_search_alone(tmp_path: Path):
    methods = ("sbs", "uniform_4", "full_precision", "sbs_quant")
    plan = snapshots(tmp_path, methods=methods, seeds=(0, 1)).plan()
    assert [spec.recipe.search.method for spec in plan.first] == ["full_precision"] * 2
    count = {m: sum(spec.recipe.search.method == m for spec in plan.rest + plan.last) for m in methods}
    assert count == {"sbs": 6, "uniform_4": 2, "full_precision": 0, "sbs_quant": 6}
    assert {spec.recipe.search.method for spec in plan.last} == {"sbs", "sbs_quant"}
    lone = {spec.key for spec in planner(tmp_path, methods=("uniform_4",), seeds=(0, 1)).plan().rest}
    assert {spec.key for spec in plan.rest if spec.recipe.search.method == "uniform_4"} == lone


def test_the_search_of_a_snapshot_is_that_of_its_seed_and_method(tmp_path: Path):
    plan = snapshots(tmp_path, methods=("sbs", "sbs_quant"), seeds=(0, 1)).plan()
    assert len(plan.last) == 8
    for spec in plan.last:
        search = plan.search_of(spec)
        assert search in plan.rest
        assert search is not None
        assert search.recipe.run.seed == spec.recipe.run.seed
        assert search.recipe.search.method == spec.recipe.search.method


def test_a_list_of_snapshots_may_be_an_axis_and_budgets_may_be_named_one_by_one(tmp_path: Path):
    lists = {"search.snapshots": [[0.05, 0.03], [0.05, 0.02]]}
    plan = snapshots(tmp_path, axes=lists, set={}).plan()
    assert [spec.recipe.search.budget for spec in plan.rest] == [0.03, 0.02]
    assert [spec.recipe.search.budget for spec in plan.last] == [0.05, 0.05]
    assert [plan.search_of(spec) for spec in plan.last] == list(plan.rest)
    some = snapshots(tmp_path, axes={"search.budget": [0.05, 0.03]}).plan()
    assert (some.rest, len(some.last)) == ((), 2)
    assert [some.search_of(spec) for spec in some.last] == [None, None], "each searches, unless the other has"


def test_one_search_for_each_budget_needs_no_cache(tmp_path: Path):
    plan = planner(tmp_path, axes={"search.budget": list(BUDGETS)}).plan()
    assert [spec.recipe.search.budget for spec in plan.rest] == list(BUDGETS)
    assert plan.last == ()
    assert all(spec.stage_cache is None and spec.recipe.search.lambda_ is None for spec in plan.rest)
    assert [spec.label for spec in plan.rest] == [f"resnet20-sbs-budget{budget:g}-seed0" for budget in BUDGETS]


def test_budgets_may_be_added_to_a_sweep(tmp_path: Path):
    claim(snapshots(tmp_path))
    claim(snapshots(tmp_path, set={"search.snapshots": [0.05, 0.02]}))
    claim(planner(tmp_path, axes={"search.budget": [0.05]}))
    claim(planner(tmp_path))
    with pytest.raises(UserError, match="search.group_size: 4 before, 2 now"):
        claim(snapshots(tmp_path, set={"search.snapshots": [0.05], "search.group_size": 2}))


@pytest.mark.parametrize(
    ("changes", "overrides", "words"),
    [
        (
            {"axes": {"search.budget": [0.05]}, "set": {"search.lambda": 0.3}},
            (),
            "varies search.budget, and search.lambda",
        ),
        (
            {"axes": {"search.budget": [0.05]}, "set": {}},
            ("search.lambda=0.3",),
            "varies search.budget, and search.lambda",
        ),
        ({"axes": {"search.lambda": [0.3]}}, (), "varies search.lambda, and search.snapshots"),
        ({"axes": {"search.lambda": [0.3], "search.budget": [0.05]}, "set": {}}, (), "lambda and budget exclude"),
        ({"methods": ("sbs", "prune_then_quant")}, (), "is for methods with one search"),
        ({"scheduler": {"name": "asha"}}, (), "'asha' would stop a search together with all of its snapshots"),
        ({"scheduler": {"name": "asha"}, "set": {}}, ("search.snapshots=[0.05]",), "'asha' would stop"),
        ({"search": {"algorithm": "optuna", "samples": 2}}, (), "optuna asks for one network at a time"),
        (
            {"search": {"algorithm": "optuna", "samples": 2}, "axes": {"search.snapshots": [[0.05]]}, "set": {}},
            (),
            "optuna asks for one network at a time",
        ),
    ],
)
def test_drives_that_do_not_go_together_are_refused(
    tmp_path: Path, changes: dict[str, object], overrides: tuple[str, ...], words: str
):
    with pytest.raises(UserError, match=words):
        planner(tmp_path, overrides, **({"axes": {}, "set": {"search.snapshots": list(BUDGETS)}} | changes)).plan()


def test_a_change_on_the_command_line_replaces_what_a_space_sets(tmp_path: Path):
    settings = {"axes": {}, "set": {"search.snapshots": list(BUDGETS)}}
    (lone,) = planner(tmp_path, ("search.lambda=0.7",), **settings).plan().rest
    assert (lone.recipe.search.lambda_, lone.recipe.search.snapshots) == (0.7, ())
    chosen = planner(tmp_path, ("search.budget=0.05",), **settings).plan()
    assert [spec.recipe.search.budget for spec in chosen.trials] == [None, 0.05]


def test_budgets_out_of_reach_are_refused_before_anything_starts(tmp_path: Path):
    def refusal(made: Planner) -> str:
        with pytest.raises(UserError) as caught:
            driver.check_budgets(made, made.plan())
        return str(caught.value)

    assert "0.09 of full precision's" in refusal(planner(tmp_path, axes={"search.budget": [0.05, 0.09]}))
    assert "0.001 of" in refusal(snapshots(tmp_path, set={"search.snapshots": [0.05, 0.001]}))
    draws = {"search.budget": {"log_uniform": [0.01, 0.2]}}
    optuna = planner(tmp_path, axes=draws, search={"algorithm": "optuna", "samples": 2})
    assert "0.2 of full precision's" in refusal(optuna)
    for fine in (snapshots(tmp_path), planner(tmp_path), planner(tmp_path, axes={"search.gbops": [1.0, 2.5]})):
        driver.check_budgets(fine, fine.plan())


def test_torch_is_loaded_for_budgets_alone(tmp_path: Path):
    code = (
        "import sys; from sweeps import driver; from sweeps.plan import Planner; from sweeps.space import *\n"
        "space = load_space(sys.argv[1]); from pathlib import Path\n"
        "made = Planner(space, base_recipe(space), Path('x'), 'c'); driver.check_budgets(made, made.plan())\n"
        "print('torch' in sys.modules)"
    )
    for space, loaded in (("digits_baselines", "False"), ("digits_snapshots", "True")):
        command = [sys.executable, "-c", code, space]
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
        assert done.stdout.strip() == loaded
