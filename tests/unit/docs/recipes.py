"""docs/recipes.md from the headers and the content of all recipes and spaces: `python -m tests.unit.docs.recipes`."""

import itertools
import re
from pathlib import Path

from harness.config import load_recipe, recipe_names
from sweeps.space import load_space, space_names
from tests.unit.docs.pages import ROOT

PAGE = ROOT / "docs/recipes.md"
KEYS = ("Command", "Expected", "Cost")
INTRO = """\
# Recipes and spaces

A *recipe* is one trial: model, data, the epochs and rates of every stage. A *space* is a sweep over a recipe. Both are
TOML files whose header says the command, what to expect and what it costs; this page is made from those headers
(`python -m tests.unit.docs.recipes`), and a test compares the two. Figures marked "not yet measured" are not.

Any key can be changed on the command line: `--set search.lambda=0.1 --set finetune.epochs=8`. To change more, copy the
file and give its path instead of the name. `site.toml` is the profile of your cluster ([slurm.md](slurm.md)).
"""


def header(path: Path) -> tuple[str, dict[str, list[str]]]:
    """What the first comment of a recipe or space says: its title, and Command, Expected, Cost (and more) by line."""
    lines = itertools.takewhile(lambda line: line.startswith("#"), path.read_text(encoding="utf-8").splitlines())
    title: list[str] = []
    fields: dict[str, list[str]] = {}
    current = title
    for line in (line.lstrip("#").strip() for line in lines):
        field = re.match(r"([A-Z][a-z]+): +(.*)", line)
        if field:
            current = fields.setdefault(field[1], [])
        current.append(field[2] if field else line)
    return " ".join(title), fields


def commands_in(fields: dict[str, list[str]]) -> list[str]:
    """The commands of a header, in their order: its Data and Command lines, without remarks in brackets."""
    lines = [*fields.get("Data", []), *fields["Command"]]
    return [line for line in lines if not line.startswith("(") and re.match(r"(python|torchrun) ", line)]


def recipe_path(name: str) -> Path:
    """The file of a named recipe."""
    return ROOT / "harness/recipes" / f"{name}.toml"


def space_path(name: str) -> Path:
    """The file of a named space."""
    return ROOT / "sweeps/spaces" / f"{name}.toml"


def page() -> str:
    """The whole page."""
    parts = [INTRO, "## Recipes\n", *map(_recipe, recipe_names()), "## Spaces\n", *map(_space, space_names())]
    return "\n".join(parts)


def _recipe(name: str) -> str:
    recipe, path = load_recipe(name), recipe_path(name)
    data, stages = recipe.data, (recipe.pretrain, recipe.search, recipe.finetune)
    size = f"{data.image_size} px" if data.eval_image_size is None else f"{data.image_size}/{data.eval_image_size} px"
    weights = f" from `{recipe.model.weights}`" if recipe.model.weights else ""
    facts = {
        "model": f"{recipe.model.name}, {recipe.model.num_classes} classes{weights}",
        "data": f"`{data.source}` in `{data.dir}`, {size}, batch {data.batch_size}, {data.augment}",
        "epochs": " + ".join(f"{stage.epochs} {word}" for stage, word in zip(stages, _STAGES, strict=True)),
        "runs on": f"{_ranks(recipe.run.workers)}, {_each(recipe.run.cpus_per_worker, recipe.run.gpus_per_worker)}",
    }
    return _entry(name, path, facts, f"the recipe is [`{name}.toml`](../{path.relative_to(ROOT)})")


def _space(name: str) -> str:
    space, path = load_space(name), space_path(name)
    axes = [f"`{key}` in {_values(axis)}" for key, axis in space.axes.items()]
    recipe = Path(space.recipe).stem
    facts = {
        "recipe": f"`{recipe}`",
        "methods": ", ".join(space.methods),
        "axes": "; ".join(axes) or "none",
        "seeds": ", ".join(map(str, space.seeds)),
    }
    return _entry(name, path, facts, f"the space is [`{name}.toml`](../{path.relative_to(ROOT)})")


_STAGES = ("pretrain", "search", "finetune")


def _ranks(workers: object) -> str:
    return f"{workers[0]} to {workers[1]} ranks" if isinstance(workers, tuple) else f"{workers} rank(s)"


def _each(cpus: float, gpus: float) -> str:
    return f"each {cpus:g} CPU" + (f" + {gpus:g} GPU" if gpus else "")


def _values(axis: object) -> str:
    if isinstance(axis, tuple):
        return ", ".join(f"{value:g}" if isinstance(value, float) else str(value) for value in axis)
    return str(axis)


def _entry(name: str, path: Path, facts: dict[str, str], where: str) -> str:
    title, fields = header(path)
    rows = "\n".join(f"| {key} | {value} |" for key, value in {**facts, **_told(fields)}.items())
    script = "\n".join(commands_in(fields))
    return (
        f"### `{path.parent.name}/{name}`\n\n{title} ({where})\n\n```sh {_marker(name, path)}\n{script}\n```\n\n"
        f"| | |\n|---|---|\n{rows}\n"
    )


def _marker(name: str, path: Path) -> str:
    """Who runs it: only the digits come with the project."""
    if not name.startswith("digits"):
        return "needs=imagenet" if name.startswith("imagenet") else "needs=data"
    if path.parent.name == "recipes":
        return "run-by=tests/integration/test_train_cli.py::test_a_run_from_a_recipe_file"
    return "run-by=tests/integration/test_sweep.py::test_a_real_sweep_uses_ffcv_ray_train_and_mlflow"


def _told(fields: dict[str, list[str]]) -> dict[str, str]:
    return {key.lower(): " ".join(lines) for key, lines in fields.items() if key not in ("Command", "Data")}


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
