from pathlib import Path

import pytest

from harness.errors import UserError
from harness.identity import trial_key
from sweeps import folder
from sweeps.plan import Planner
from sweeps.space import Space, base_recipe


def planner(tmp_path: Path, overrides: tuple[str, ...] = (), **changes: object) -> Planner:
    settings = {"name": "s", "recipe": "digits_resnet20", "axes": {"search.lambda": [0.0, 0.3]}} | changes
    space = Space.model_validate(settings)
    return Planner(space, base_recipe(space, overrides), tmp_path / "s", "checksum")


def test_full_precision_comes_first_and_gives_its_weights(tmp_path: Path):
    plan = planner(tmp_path).plan()
    (full,) = plan.first
    assert full.recipe.search.method == "full_precision"
    assert [spec.recipe.search.lambda_ for spec in plan.rest] == [0.0, 0.3]
    assert all(spec.init == f"{full.run_dir}/weights.pt" for spec in plan.rest)
    assert full.init is None
    assert all(spec.key == trial_key(spec.recipe, "checksum") for spec in plan.trials)
    assert all(spec.run_dir.endswith(f"trials/{spec.label}-{spec.key[:8]}") for spec in plan.trials)


def test_methods_without_a_search_run_once_whatever_lambda(tmp_path: Path):
    plan = planner(tmp_path, methods=("full_precision", "uniform_4", "sbs", "sbs_quant")).plan()
    methods = [spec.recipe.search.method for spec in plan.trials]
    assert sorted(methods) == ["full_precision", "sbs", "sbs", "sbs_quant", "sbs_quant", "uniform_4"]


def test_every_seed_and_model_has_its_own_full_precision_network(tmp_path: Path):
    axes = {"search.lambda": [0.1, 0.2], "model.name": ["resnet20", "resnet32"]}
    plan = planner(tmp_path, axes=axes, seeds=(0, 1)).plan()
    assert len(plan.first) == 4
    assert len(plan.rest) == 8
    weights = {spec.init: (spec.recipe.model.name, spec.recipe.run.seed) for spec in plan.rest}
    full = {f"{spec.run_dir}/weights.pt": (spec.recipe.model.name, spec.recipe.run.seed) for spec in plan.first}
    assert weights == full


def test_labels_tell_other_axes_apart(tmp_path: Path):
    axes = {"search.lambda": [0.1], "search.clip_lr": [0.01, 0.1], "search.weight_bits": [[2, 4]]}
    labels = [spec.label for spec in planner(tmp_path, axes=axes).plan().rest]
    assert labels == [
        "resnet20-sbs-lambda0.1-seed0-clip_lr0.01-weight_bits2_4",
        "resnet20-sbs-lambda0.1-seed0-clip_lr0.1-weight_bits2_4",
    ]


def test_a_trial_keeps_its_folder_under_a_new_label(tmp_path: Path):
    spec = planner(tmp_path).plan().rest[0]
    before = Path(spec.run_dir).with_name(f"older-{spec.key[:8]}")
    before.mkdir(parents=True)
    again = planner(tmp_path).plan().rest[0]
    assert Path(again.run_dir) == before


def test_paths_are_absolute_for_other_processes(tmp_path: Path):
    spec = planner(tmp_path, ("data.dir=some/data",)).plan().rest[0]
    assert spec.recipe.data.dir == str(Path("some/data").resolve())


def claim(made: Planner) -> None:
    folder.claim(made.folder, made.space, made.base, made.checksum, made.plan().trials)


def test_points_may_be_added_the_base_may_not_change(tmp_path: Path):
    claim(planner(tmp_path))
    claim(planner(tmp_path))
    claim(planner(tmp_path, axes={"search.lambda": [0.0, 0.3, 1.0]}, seeds=(0, 1), methods=("sbs", "uniform_4")))
    claim(planner(tmp_path, ("data.dir=elsewhere",)))
    with pytest.raises(UserError) as caught:
        claim(planner(tmp_path, ("search.epochs=9",)))
    for words in ["'s'", "search.epochs: 4 before, 9 now", "--name", str(tmp_path)]:
        assert words in str(caught.value)


def test_another_data_set_is_another_configuration(tmp_path: Path):
    made = planner(tmp_path)
    claim(made)
    with pytest.raises(UserError, match="data: 'checksum' before, 'other' now"):
        folder.claim(made.folder, made.space, made.base, "other", [])


def test_one_driver_at_a_time(tmp_path: Path):
    second = folder.held(tmp_path / "s")
    with folder.held(tmp_path / "s"), pytest.raises(UserError, match="another `sweeps run` works in"):
        second.__enter__()
    with folder.held(tmp_path / "s"):
        pass


def test_a_start_that_is_refused_leaves_no_folder(tmp_path: Path):
    with pytest.raises(UserError), folder.held(tmp_path / "runs" / "s"):
        raise UserError("refused")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "runs" / "other").mkdir(parents=True)
    with pytest.raises(UserError), folder.held(tmp_path / "runs" / "s"):
        raise UserError("refused")
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["other"]


def test_a_failed_start_keeps_what_lies_in_the_folder(tmp_path: Path):
    def fail_after_writing() -> None:
        with folder.held(tmp_path / "s"):
            (tmp_path / "s" / "sweep.json").write_text("{}")
            raise UserError("failed")

    for _ in range(2):
        with pytest.raises(UserError, match="failed"):
            fail_after_writing()
        assert (tmp_path / "s" / "sweep.json").exists()
