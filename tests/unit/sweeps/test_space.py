import math
from pathlib import Path

import pytest

from harness.errors import UserError
from sweeps.space import Space, base_recipe, load_space, recipe_at, space_names

HEAD = 'name = "s"\nrecipe = "digits_resnet20"\n'


def space(tmp_path: Path, text: str, head: str = HEAD) -> Space:
    path = tmp_path / "space.toml"
    path.write_text(head + text)
    return load_space(path)


def test_grid_takes_every_combination_in_order(tmp_path: Path):
    found = space(tmp_path, '[axes]\n"search.lambda" = [0.0, 0.5]\n"search.lr" = [0.1, 0.2, 0.3]\n')
    points = list(found.points())
    assert len(points) == 6
    assert points[0] == {"search.lambda": 0.0, "search.lr": 0.1}
    assert points[-1] == {"search.lambda": 0.5, "search.lr": 0.3}


def test_sections_and_dotted_keys_mean_the_same(tmp_path: Path):
    dotted = space(tmp_path, '[axes]\n"search.lambda" = [0.0, 0.5]\n[set]\n"search.epochs" = 1\n')
    nested = space(tmp_path, "[axes.search]\nlambda = [0.0, 0.5]\n[set.search]\nepochs = 1\n")
    assert dotted == nested


def test_random_draws_are_seeded_and_within_bounds(tmp_path: Path):
    text = """
[search]
algorithm = "random"
samples = 200
seed = {seed}
[axes]
"search.lambda" = {{ log_uniform = [0.01, 1.0] }}
"search.lr" = {{ uniform = [0.1, 0.2] }}
"search.group_size" = {{ choice = [2, 4] }}
"""
    first = list(space(tmp_path, text.format(seed=3)).points())
    assert first == list(space(tmp_path, text.format(seed=3)).points())
    assert first != list(space(tmp_path, text.format(seed=4)).points())
    lambdas = [point["search.lambda"] for point in first]
    assert all(0.01 <= value <= 1.0 for value in lambdas)
    assert all(0.1 <= point["search.lr"] <= 0.2 for point in first)
    assert {point["search.group_size"] for point in first} == {2, 4}
    # Log-uniform: half of the draws lie below the geometric mean 0.1 (binomial, 200 draws: 5 sigma = 35).
    assert abs(sum(value < 0.1 for value in lambdas) - 100) < 35
    assert math.isclose(max(lambdas), 1.0, rel_tol=0.2)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("axis = 1\n", ["unknown key `axis`", "did you mean 'axes'"]),
        ('methods = ["uniform_3"]\n', ["methods", "'uniform_3'", "uniform_4"]),
        ("seeds = []\n", ["seeds"]),
        ('[axes]\n"search.lambda" = []\n', ["search.lambda is empty"]),
        ('[axes]\n"search.lambda" = { uniform = [0.0, 1.0] }\n', ["search.lambda", "grid", "random"]),
        ('[axes]\n"search.lambda" = { log_uniform = [0.0, 1.0] }\n', ["log_uniform", "0 < low"]),
        ('[axes]\n"search.method" = ["sbs"]\n', ["search.method", "`methods`"]),
        ('[axes]\n"search.lr" = [0.1]\n[set]\n"search.lr" = 0.1\n', ["search.lr", "keep one"]),
        ('[scheduler]\nname = "pbt"\n', ["pbt is refused", "silently do nothing", "asha"]),
        ('[scheduler]\nname = "bohb"\n', ["bohb is refused", "pauses"]),
        ('[search]\nalgorithm = "random"\n', ["`samples`"]),
        ('[search]\nalgorithm = "optuna"\nsamples = 3\n', ["one seed"]),
        ("retries = -1\n", ["retries", "-1"]),
    ],
)
def test_a_mistake_names_file_key_and_remedy(tmp_path: Path, text: str, words: list[str]):
    head = HEAD + ("seeds = [0, 1]\n" if "optuna" in text else "")
    with pytest.raises(UserError) as caught:
        space(tmp_path, text, head)
    assert str(tmp_path / "space.toml") in str(caught.value)
    for word in words:
        assert word in str(caught.value)


def test_points_are_validated_as_recipes(tmp_path: Path):
    found = space(tmp_path, '[axes]\n"search.lamda" = [0.1]\n')
    with pytest.raises(UserError, match=r"space\.toml, point .*search.lamda.*did you mean 'lambda'"):
        recipe_at(base_recipe(found), found, next(found.points()), method="sbs", seed=0)


def test_a_misspelt_recipe_names_the_space_and_the_nearest(tmp_path: Path):
    found = space(tmp_path, "", 'name = "s"\nrecipe = "digits_resnet2"\n')
    with pytest.raises(UserError, match=r"space\.toml: recipe = 'digits_resnet2': .*did you mean 'digits_resnet20'"):
        base_recipe(found)


def test_overrides_reach_every_trial_but_not_an_axis(tmp_path: Path):
    found = space(tmp_path, '[axes]\n"search.lambda" = [0.1]\n[set]\n"search.epochs" = 3\n')
    base = base_recipe(found, ["finetune.epochs=7"])
    recipe = recipe_at(base, found, {"search.lambda": 0.1}, method="sbs_quant", seed=5)
    assert (recipe.search.epochs, recipe.finetune.epochs, recipe.search.lambda_) == (3, 7, 0.1)
    assert (recipe.search.method, recipe.run.seed) == ("sbs_quant", 5)
    with pytest.raises(UserError, match=r"search\.lambda is varied by space 's'"):
        base_recipe(found, ["search.lambda=0.3"])


def test_a_recipe_path_is_relative_to_the_space(tmp_path: Path):
    source = Path("harness/recipes/digits_resnet20.toml").read_text()
    (tmp_path / "mine.toml").write_text(source)
    found = space(tmp_path, "", 'name = "s"\nrecipe = "mine.toml"\n')
    assert base_recipe(found).model.name == "resnet20"


def test_missing_spaces_are_named(tmp_path: Path):
    with pytest.raises(UserError, match="no space is named 'digits_resnet': did you mean 'digits_resnet20'"):
        load_space("digits_resnet")
    with pytest.raises(UserError, match=r"space not found: .*absent\.toml"):
        load_space(tmp_path / "absent.toml")


@pytest.mark.parametrize("name", space_names())
def test_every_space_loads_and_its_points_are_recipes(name: str):
    found = load_space(name)
    base = base_recipe(found)
    for point in found.points():
        for method in found.methods:
            recipe_at(base, found, point, method=method, seed=found.seeds[0])
    header = (Path("sweeps/spaces") / f"{name}.toml").read_text().split("\n\n")[0]
    assert f"python -m sweeps run sweeps/spaces/{name}.toml" in header
    assert "# Expected: " in header
    assert "# Cost: " in header


def test_the_demo_holds_lambda_zero_and_three_more():
    points = [point["search.lambda"] for point in load_space("digits_resnet20").points()]
    assert 0.0 in points
    assert len(set(points)) >= 4
