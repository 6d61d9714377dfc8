import json
import subprocess
import sys
import typing
from pathlib import Path

import pytest

from harness.config import (
    ModelName,
    Recipe,
    TrialSpec,
    load_recipe,
    parse_recipe,
    recipe_names,
    scaled_lr,
)
from harness.errors import UserError
from harness.identity import identity, trial_key, trial_label
from harness.plan import stage_key


def digits(*overrides: str):
    return load_recipe("digits_resnet20", overrides)


def test_overrides_are_typed_as_toml():
    recipe = digits("search.lambda=0.25", "search.weight_bits=[4, 8]", "data.source=letters", "pretrain.clip_norm=null")
    assert recipe.search.lambda_ == 0.25
    assert recipe.search.weight_bits == (4, 8)
    assert recipe.data.source == "letters"
    assert recipe.pretrain.clip_norm is None


@pytest.mark.parametrize(
    ("override", "words"),
    [
        (
            "search.lamda=0.1",
            ["recipe digits_resnet20", "`search.lamda`", "did you mean 'lambda'", "max_prune_share"],
        ),
        ("serch.lambda=0.1", ["`serch`", "did you mean 'search'"]),
        ("search.epochs=many", ["`search.epochs`", "'many'", "integer"]),
        ("pretrain.lr=-1", ["`pretrain.lr` = -1", "greater than 0"]),
        ("model.name=resnet21", ["`model.name` = 'resnet21'", "'resnet20'", "'mobilenetv2'"]),
        ("search.method=uniform_3", ["`search.method`", "uniform_4"]),
        ("data.batch_size=63", ["data.batch_size = 63", "run.workers = 2", "multiple of 2"]),
        ("pretrain.schedule=step", ["step_epochs"]),
        ("pretrain.warmup_epochs=8", ["warmup_epochs = 8", "less than epochs = 8"]),
        ("run.gpus_per_worker=0.5", ["gpus_per_worker = 0.5", "workers = 2", "NCCL refuses", "gpus_per_worker = 1"]),
        ("run.gpus_per_worker=1.5", ["gpus_per_worker = 1.5", "no whole number", "set it to 1"]),
        ("search.lambda=null", ["`search`", "`lambda` is missing", "'sbs'"]),
        ("search.norm_batches=-1", ["`search.norm_batches` = -1", "greater than or equal to 0"]),
        ("search.method=policy", ["`policy` and `method = 'policy'` go together", "policy = 'policy.json'"]),
        ("search.policy=mine.json", ["`policy` and `method = 'policy'` go together", "choose another method"]),
        ("lambda", ["section.key=value"]),
        ("model.name.deep=1", ["'name' is a value"]),
    ],
)
def test_a_mistake_names_file_key_value_and_remedy(override: str, words: list[str]):
    with pytest.raises(UserError) as caught:
        digits(override)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize("key", ["bit_threshold_lr", "prune_threshold_lr"])
def test_rates_of_thresholds_are_refused_wherever_they_stand(key: str, tmp_path: Path):
    """A recipe from before that were read on without a word would search at another pace than it says."""
    words = [f"`search.{key}` = 20.0 is gone: remove it", "a pace of their own", "docs/method.md"]
    file = tmp_path / "old.toml"
    file.write_text(
        Path("harness/recipes/digits_resnet20.toml").read_text().replace("lambda =", f"{key} = 20.0\nlambda =")
    )
    for read, origin in (
        (lambda: digits(f"search.{key}=20.0"), "recipe digits_resnet20: "),
        (lambda: load_recipe(file), f"{file}: "),
    ):
        with pytest.raises(UserError) as caught:
            read()
        assert str(caught.value).startswith(origin)
        for word in words:
            assert word in str(caught.value)


def test_a_rank_alone_may_have_a_part_of_a_gpu():
    assert digits("run.gpus_per_worker=0.5", "run.workers=1").run.gpus_per_worker == 0.5
    with pytest.raises(UserError, match=r"gpus_per_worker = 0.25 with workers = \[1, 2\]"):
        digits("run.gpus_per_worker=0.25", "run.workers=[1, 2]")


def test_missing_and_broken_files(tmp_path: Path):
    with pytest.raises(UserError, match=r"no recipe is named 'digits_resnet2': did you mean 'digits_resnet20'"):
        load_recipe("digits_resnet2")
    with pytest.raises(UserError, match=r"recipe not found: absent\.toml"):
        load_recipe("absent.toml")
    broken = tmp_path / "broken.toml"
    broken.write_text("[model\n")
    with pytest.raises(UserError, match=r"broken.toml is not valid TOML: .*line 1"):
        load_recipe(broken)
    broken.write_text("[model]\nname = 'resnet20'\nnum_classes = 10\n")
    with pytest.raises(UserError, match="`data` is missing"):
        load_recipe(broken)


def test_identity_leaves_out_what_cannot_change_the_result():
    key = trial_key(digits(), "data0")
    assert key == trial_key(digits("data.dir=/elsewhere", "run.checkpoint_every_s=1", "run.cpus_per_worker=2"), "data0")
    assert key == trial_key(digits("run.cuda_graph=false"), "data0")
    assert len(key) == 16
    for override in ["search.lambda=0.31", "run.seed=1", "run.workers=1", "finetune.lr=0.03", "data.augment=none"]:
        assert trial_key(digits(override), "data0") != key
    assert trial_key(digits(), "data1") != key


@pytest.mark.parametrize(
    ("method", "ignored", "minded"),
    [
        ("full_precision", ["search.lambda=9", "search.epochs=9", "finetune.epochs=9"], ["pretrain.epochs=9"]),
        ("uniform_4", ["search.lambda=9", "search.group_size=2"], ["search.epochs=9", "finetune.epochs=9"]),
        ("uniform_8", ["search.lr=9"], ["search.calibration_batches=2", "search.norm_batches=2"]),
        ("sbs", ["search.prune_only_bits=8"], ["search.norm_batches=2", "search.bop_gradient=alternate"]),
        ("sbs_quant", ["search.group_size=2", "search.max_prune_share=0.1"], ["search.weight_bits=[4,8]"]),
        ("sbs_prune", ["search.weight_bits=[4,8]"], ["search.group_size=2", "search.prune_only_bits=8"]),
    ],
)
def test_identity_holds_only_what_the_method_looks_at(method: str, ignored: list[str], minded: list[str]):
    key = trial_key(digits(f"search.method={method}"), "data")
    for override in ignored:
        assert trial_key(digits(f"search.method={method}", override), "data") == key
    for override in minded:
        assert trial_key(digits(f"search.method={method}", override), "data") != key


def test_methods_without_pressure_need_no_lambda():
    assert digits("search.method=full_precision", "search.lambda=null").search.lambda_ is None


@pytest.mark.parametrize(
    ("search", "words"),
    [
        ("lambda = 0.3\nbudget = 0.05", ["lambda and budget exclude one another", "keep one"]),
        ("lambda = 0.3\ngbops = 1.5", ["lambda and gbops exclude one another"]),
        ("gbops = 1.5\nbudget = 0.05", ["gbops and budget exclude one another"]),
        ("lambda = 0.0\nsnapshots = [0.05, 0.03]", ["lambda and budget exclude one another"]),
        ("snapshots = [0.03, 0.05]", ["snapshots = [0.03, 0.05] must fall"]),
        ("snapshots = [0.05, 0.05]", ["must fall"]),
        (
            "snapshots = [0.05, 0.03]\nbudget = 0.04",
            ["budget = 0.04 is none of snapshots = [0.05, 0.03]", "choose one"],
        ),
        ("snapshots = [1.5]", ["`search.snapshots.0` = 1.5"]),
        ("budget = 0.0", ["`search.budget` = 0.0"]),
        ("gbops = -1.0", ["`search.gbops` = -1.0"]),
        ('method = "prune_then_quant"\nbudget = 0.05', ["budget is for methods with one search", "a `lambda`"]),
        ('method = "prune_then_quant"\nsnapshots = [0.05]', ["budget is for methods with one search"]),
        ("", ["`lambda` is missing", "`budget` (share of full precision's BOPs)", "`gbops`"]),
    ],
)
def test_one_thing_drives_a_search(tmp_path: Path, search: str, words: list[str]):
    text = (
        Path("harness/recipes/digits_resnet20.toml")
        .read_text()
        .replace('method = "sbs"\nlambda = 0.3\n', f"{search}\n")
    )
    (tmp_path / "mine.toml").write_text(text)
    with pytest.raises(UserError) as caught:
        load_recipe(tmp_path / "mine.toml")
    for word in words:
        assert word in str(caught.value)


def drive(recipe: Recipe) -> dict[str, object]:
    values = {key: getattr(recipe.search, key) for key in ("lambda_", "gbops", "budget", "snapshots")}
    return {key: value for key, value in values.items() if value not in (None, ())}


@pytest.mark.parametrize(
    ("overrides", "left"),
    [
        (["search.budget=0.05"], {"budget": 0.05}),
        (["search.gbops=1.5"], {"gbops": 1.5}),
        (["search.snapshots=[0.05, 0.03]"], {"snapshots": (0.05, 0.03)}),
        (["search.snapshots=[0.05, 0.03]", "search.budget=0.05"], {"snapshots": (0.05, 0.03), "budget": 0.05}),
        (["search.lambda=0.7"], {"lambda_": 0.7}),
        (["finetune.epochs=1"], {"lambda_": 0.3}),
    ],
)
def test_an_override_of_one_drive_replaces_the_recipes_other(overrides: list[str], left: dict[str, object]):
    assert drive(digits(*overrides)) == left


def test_drives_replace_each_other_in_turn():
    """As in a sweep: a base that is whole, and points over it."""
    base = digits("search.snapshots=[0.05, 0.03]").to_dict()
    for override, left in [
        ("search.lambda=0.1", {"lambda_": 0.1}),
        ("search.gbops=2", {"gbops": 2.0}),
        ("search.budget=0.03", {"snapshots": (0.05, 0.03), "budget": 0.03}),
        ("search.snapshots=[0.04]", {"snapshots": (0.04,)}),
    ]:
        assert drive(parse_recipe(base, "base", [override])) == left
    chosen = parse_recipe(base, "base", ["search.budget=0.03"]).to_dict()
    assert drive(parse_recipe(chosen, "base", ["search.snapshots=[0.04, 0.02]"])) == {"snapshots": (0.04, 0.02)}
    assert drive(parse_recipe(chosen, "base", ["search.snapshots=[]", "search.budget=0.04"])) == {"budget": 0.04}
    assert drive(parse_recipe(chosen, "base", ["search.lambda=null"])) == drive(parse_recipe(chosen, "base"))
    with pytest.raises(UserError, match="lambda and budget exclude"):
        digits("search.lambda=0.1", "search.budget=0.05")


def test_identity_tells_drives_apart_and_leaves_idle_ones_out():
    drives = ["lambda=0.05", "budget=0.05", "gbops=0.05", "snapshots=[0.05]", "snapshots=[0.05, 0.03]"]
    keys = [trial_key(digits(f"search.{drive}"), "data") for drive in drives]
    assert len(set(keys)) == len(drives)
    assert not {"budget", "gbops", "snapshots"} & set(identity(digits(), "data")["search"])
    two = "search.snapshots=[0.05, 0.03]"
    assert trial_key(digits(two), "data") == trial_key(digits(two, "search.budget=0.03"), "data")
    assert trial_key(digits(two), "data") != trial_key(digits(two, "search.budget=0.05"), "data")
    full = digits("search.method=full_precision")
    assert trial_key(full, "data") == trial_key(digits("search.method=full_precision", two), "data")


@pytest.mark.parametrize(
    ("overrides", "label"),
    [
        (["search.lambda=0.3"], "resnet20-sbs-lambda0.3-seed0"),
        (["search.budget=0.05"], "resnet20-sbs-budget0.05-seed0"),
        (["search.gbops=35"], "resnet20-sbs-gbops35-seed0"),
        (["search.snapshots=[0.05, 0.03]"], "resnet20-sbs-snapshot0.03-seed0"),
        (["search.snapshots=[0.05, 0.03]", "search.budget=0.05"], "resnet20-sbs-snapshot0.05-seed0"),
        (["search.method=uniform_4", "search.budget=0.05"], "resnet20-uniform_4-seed0"),
    ],
)
def test_labels_name_what_drives_the_search(overrides: list[str], label: str):
    assert trial_label(digits(*overrides)) == label


def with_policy(path: Path, *overrides: str) -> Recipe:
    return digits("search.method=policy", f"search.policy={path}", *overrides)


def test_a_policy_counts_by_content_and_not_by_its_path(tmp_path: Path):
    first, second = tmp_path / "a.json", tmp_path / "elsewhere.json"
    for file in (first, second):
        file.write_text("one policy")
    key, label = trial_key(with_policy(first), "data"), trial_label(with_policy(first))
    assert (trial_key(with_policy(second), "data"), trial_label(with_policy(second))) == (key, label)
    # the start of the text's SHA-256, as sha256sum gives it
    assert label == "resnet20-policy-b2b72e-seed0"
    second.write_text("another policy")
    assert trial_key(with_policy(second), "data") != key
    assert trial_label(with_policy(second)) != label
    for ignored in ("search.lambda=9", "search.lr=9", "search.group_size=2"):
        assert trial_key(with_policy(first, ignored), "data") == key
    for minded in ("search.epochs=9", "search.norm_batches=0", "finetune.epochs=9"):
        assert trial_key(with_policy(first, minded), "data") != key
    first.unlink()
    with pytest.raises(UserError, match=rf"search\.policy not found: {first}\. Give the policy\.json of a trial"):
        trial_key(with_policy(first), "data")


def test_batches_for_norms_count_in_a_pretraining_with_averaged_weights():
    for method in ("full_precision", "sbs"):
        few, many = (
            digits(f"search.method={method}", f"search.norm_batches={count}", "pretrain.ema_decay=0.9")
            for count in (4, 8)
        )
        assert stage_key(few, "pretrain", "data") != stage_key(many, "pretrain", "data")
        assert trial_key(few, "data") != trial_key(many, "data")
    few, many = (digits(f"search.norm_batches={count}", "search.method=full_precision") for count in (4, 8))
    assert stage_key(few, "pretrain", "data") == stage_key(many, "pretrain", "data")
    assert trial_key(few, "data") == trial_key(many, "data")


def test_weights_count_by_content(tmp_path: Path):
    first, second = tmp_path / "a.pt", tmp_path / "b.pt"
    first.write_bytes(b"1")
    second.write_bytes(b"1")
    key = trial_key(digits(f"model.weights={first}"), "data")
    assert trial_key(digits(f"model.weights={second}"), "data") == key
    second.write_bytes(b"2")
    assert trial_key(digits(f"model.weights={second}"), "data") != key


def test_key_is_stable_across_processes():
    code = (
        "from harness.config import load_recipe; from harness.identity import trial_key; "
        "print(trial_key(load_recipe('digits_resnet20'), 'c'))"
    )
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert other.stdout.strip() == trial_key(digits(), "c")


def test_recipe_survives_json():
    recipe = digits("run.workers=[1, 2]")
    assert parse_recipe(json.loads(json.dumps(recipe.to_dict())), "json") == recipe
    spec = TrialSpec(recipe=recipe, key="k", label="l", run_dir="/r")
    assert TrialSpec.model_validate_json(spec.model_dump_json(by_alias=True)) == spec
    assert (recipe.run.min_workers, recipe.run.max_workers) == (1, 2)
    assert "dir" not in identity(recipe, "c")["data"]


SETS = [(2,), (2, 4, 8), (1, 2, 4, 8), (4, 8), (2, 4, 8, 16), (5, 15), (32,)]
REFUSED = [(3, 4), (8, 4), (4, 4), (2, 32), (20,), (4, 6)]


@pytest.mark.parametrize("bits", [*SETS, *REFUSED])
def test_bit_widths_are_refused_as_the_method_refuses_them(bits: tuple[int, ...]):
    from sbs import SbsError, SearchSpace

    try:
        SearchSpace(weight_bits=bits)
        allowed = True
    except SbsError:
        allowed = False
    override = f"search.weight_bits={list(bits)}"
    if allowed:
        assert digits(override).search.weight_bits == bits
    else:
        with pytest.raises(UserError, match="weight_bits = "):
            digits(override)


def test_model_names_are_those_of_the_zoo():
    import sbs

    assert typing.get_args(ModelName) == sbs.models.NAMES


def test_labels():
    assert trial_label(digits("search.lambda=0.30")) == "resnet20-sbs-lambda0.3-seed0"
    assert trial_label(digits("search.method=uniform_4")) == "resnet20-uniform_4-seed0"


def test_learning_rate_scales_linearly_with_the_global_batch():
    stage = digits("pretrain.lr=0.5", "pretrain.lr_batch_size=256").pretrain
    assert scaled_lr(stage, 1024) == 2.0
    assert scaled_lr(digits("pretrain.lr=0.5").pretrain, 1024) == 0.5


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_loads_and_its_header_tells_command_expectation_and_cost(name: str):
    load_recipe(name)
    header = (Path("harness/recipes") / f"{name}.toml").read_text().split("\n\n")[0]
    assert f"python -m harness train {name}" in header
    assert "# Expected: " in header
    assert "# Cost: " in header


def test_config_starts_without_torch():
    code = "import sys, harness.config, harness.run_dir; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=60).returncode == 0
