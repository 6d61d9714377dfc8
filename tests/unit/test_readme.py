"""What the pages promise: commands exist and run, messages are the real ones, links and named files are there."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from harness.config import parse_recipe, recipe_names
from sweeps.space import space_names
from tests.unit.docs import commands, pages, recipes
from tests.unit.docs.pages import ROOT, Block

PAGES = pages.pages()
BLOCK_LIMIT_S = 200
each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


@each_page
def test_every_block_says_what_it_is(page: Path) -> None:
    wrong = [f"{block}: {found}" for block in pages.blocks(page) if (found := pages.problem(block))]
    assert not wrong, "\n".join(wrong)


@each_page
def test_links_and_named_files_are_there(page: Path) -> None:
    wrong = []
    for target in pages.links(page):
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        if not file.exists():
            wrong.append(f"link to {target}: there is no such file")
        elif anchor and file.suffix == ".md" and anchor not in pages.anchors(file):
            wrong.append(f"link to {target}: known are {', '.join(sorted(pages.anchors(file)))}")
    wrong += [f"`{name}`: there is no such file" for name in pages.named_paths(page) if not any(ROOT.glob(name))]
    assert not wrong, "\n".join(wrong)


@each_page
def test_messages_stand_in_the_source(page: Path) -> None:
    quotes = [block for block in pages.blocks(page) if "source" in block.words]
    wrong = [str(block) for block in quotes if not pages.says(ROOT / block.words["source"], block.text)]
    assert not wrong, "\n".join(wrong)


@pytest.mark.timeout(400)
@each_page
def test_a_page_works_from_top_to_bottom(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands parse, settings are valid; what is marked `run` is run, and prints what the page says it prints."""
    checkout = checkout_in(tmp_path)
    monkeypatch.chdir(checkout)
    printed = ""
    for block in pages.programs(page):
        if block.language == "toml":
            check_toml(block, checkout)
        if block.language == "sh" and block.words.get("status", "0") == "0":  # else it is meant to be refused
            for command in commands.commands(block.text):
                try:
                    commands.check(command)
                except commands.BadCommandError as wrong:
                    pytest.fail(f"{block}: {' '.join(command)}\n  {wrong}")
        if block.language == "python":
            compile(block.text, str(block), "exec")
        if "run" in block.words:
            printed = run(block, checkout)
        if "output" in block.words:
            any_numbers = block.words.get("numbers") == "any"
            right = pages.matches(block.text, printed, any_numbers=any_numbers)
            assert right, f"{block}: the block before printed\n{printed}"


def test_the_example_in_python_finds_a_small_network_that_is_still_good(tmp_path: Path) -> None:
    """On digits a linear model has 90%; a network at 2 or 4 bits in every layer has 1 of 64 or 256 of the BOPs."""
    (program,) = [block for block in pages.programs(ROOT / "README.md") if block.language == "python"]
    printed = run(program, checkout_in(tmp_path))
    figures = re.findall(r"top-1 ([\d.]+)%, ([\d.]+) M bit-operations, ([\d,]+) bytes", printed)
    (top1, bops, size), (small_top1, small_bops, small_size) = (
        [float(figure.replace(",", "")) for figure in line] for line in figures
    )
    assert min(top1, small_top1) > 92
    assert 30 < bops / small_bops < 300
    assert small_size < size / 4


def test_searching_and_compressing_a_network_of_ones_own_takes_15_lines():
    mine, search, result = [block for block in pages.blocks(ROOT / "README.md") if block.language == "python"]
    for step in ("bop_penalty", "after_step", "prepare", "calibrate", "freeze", "compress"):
        assert f"sbs.{step}(" in search.text
    lines = [sum(bool(line.strip()) for line in block.text.splitlines()) for block in (mine, search, result)]
    assert lines[1] <= 15
    assert sum(lines) <= 24


def checkout_in(folder: Path) -> Path:
    """A folder that looks like a clone, in which runs and data may be written."""
    checkout = folder / "sbs-harness"
    checkout.mkdir()
    for entry in ROOT.iterdir():
        if entry.name not in ("runs", "data", ".git"):
            (checkout / entry.name).symlink_to(entry)
    # what the pages call the profile of the reader's own site
    (checkout / "site.toml").write_text((ROOT / "slurm/profiles/gpu_cluster.toml").read_text(encoding="utf-8"))
    return checkout


def check_toml(block: Block, checkout: Path) -> None:
    import tomllib

    from harness.config import Recipe, load_recipe
    from slurm.profile import load_profile, parse_profile
    from sweeps.space import load_space

    name = block.words.get("file", "page.toml")
    (checkout / name).write_text(block.text, encoding="utf-8")
    over = block.words.get("over")
    if "recipe" in block.words:
        part = tomllib.loads(block.text)
        base = load_recipe(over).to_dict() if over else {}
        whole: Recipe = parse_recipe({k: {**base.get(k, {}), **part.get(k, {})} for k in {**base, **part}}, str(block))
        assert whole
    elif "space" in block.words:
        load_space(f"./{name}")
    elif over:
        part = tomllib.loads(block.text)
        base = load_profile(over).model_dump()
        parse_profile({k: {**base.get(k, {}), **part.get(k, {})} for k in {**base, **part}}, str(block))
    else:
        load_profile(f"./{name}")


def run(block: Block, checkout: Path) -> str:
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    environ = os.environ | {"PATH": path, "COLUMNS": "120", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(checkout)}
    argv = ["bash", "-euo", "pipefail", "-c", block.text] if block.language == "sh" else ["python", "-c", block.text]
    done = subprocess.run(
        argv,
        cwd=checkout,
        env=environ,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=BLOCK_LIMIT_S,
        check=False,
    )
    assert done.returncode == int(block.words.get("status", 0)), f"{block}: status {done.returncode}\n{done.stdout}"
    return done.stdout


# What the pages must not leave out ------------------------------------------------------------------------------------


def test_every_command_of_ours_is_on_a_page() -> None:
    shown = set()
    for page in PAGES:
        for block in pages.blocks(page):
            for command in commands.commands(block.text) if block.language == "sh" else []:
                shown.add(" ".join(commands.called(command)))
    missing = [path for path in every_command() if path not in shown]
    assert not missing, f"on no page: {missing}"


def every_command() -> list[str]:
    found = []
    for module in ("harness", "sweeps", "slurm"):
        stack = [(module, commands.application(module))]
        while stack:
            path, command = stack.pop()
            inner = getattr(command, "commands", None)
            if inner is None:
                found.append(path)
            else:
                stack += [(f"{path} {name}", each) for name, each in inner.items()]
    return found


HEADERS = [*map(recipes.recipe_path, recipe_names()), *map(recipes.space_path, space_names())]


@pytest.mark.parametrize("path", HEADERS, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_header_commands_work(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every recipe and space says how to run it, what to expect and what it costs; the command means this very file."""
    monkeypatch.chdir(checkout_in(tmp_path))
    title, fields = recipes.header(path)
    assert title
    assert set(recipes.KEYS) <= fields.keys()
    found = commands.commands("\n".join(recipes.commands_in(fields)))
    for command in found:
        commands.check(command)
    named = {path.stem} if path.parent.name == "recipes" else {path.stem, f"sweeps/spaces/{path.name}"}
    assert named & {word for command in found for word in command}, "the command runs something else"


def test_the_page_of_recipes_is_up_to_date() -> None:
    assert recipes.PAGE.read_text(encoding="utf-8") == recipes.page(), "run python -m tests.unit.docs.recipes"


def test_no_page_knows_the_place_where_it_was_written() -> None:
    for page in PAGES:
        found = re.findall(r"/root\b|/home/\w", page.read_text(encoding="utf-8"))
        assert not found, f"{page}: {found}"


# The tools above can fail ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("command", "complaint"),
    [
        ("python -m harness trian digits_resnet20", "No such command 'trian'"),
        ("python -m harness train digits_resnet20 --sets a.b=1", "No such option"),
        ("python -m harness train digits_resnet21", "no recipe is named 'digits_resnet21'"),
        ("python -m harness train digits_resnet20 --set search.lamda=1", "unknown key `search.lamda`"),
        ("torchrun --nproc-per-node 2 -m harness train digits_resnet20 --set run.seed=x", "run.seed"),
        ("python -m sweeps run sweeps/spaces/none.toml", "space not found"),
        ("python -m slurm submit --set job.nodes=0 -- python -m sweeps run digits_resnet20", "job.nodes"),
        ("python -m slurm submit -- python -m sweeps run digits_resnet19", "digits_resnet19"),
        ("python -m no_such_module", "no module"),
        ("make demoo", "no target 'demoo'"),
        ("RAY_ADDRESS=auto frobnicate", "frobnicate"),
    ],
)
def test_a_command_that_cannot_work_is_found(command: str, complaint: str) -> None:
    (words,) = commands.commands(command)
    with pytest.raises(commands.BadCommandError, match=re.escape(complaint)):
        commands.check(words)


def test_scripts_are_taken_apart() -> None:
    script = "A=1 make demo  # comment\ncat x | grep y > out 2>&1 && python -m sweeps run \\\n  digits_resnet20\n"
    assert commands.commands(script) == [
        ["make", "demo"], ["cat", "x"], ["grep", "y"], ["python", "-m", "sweeps", "run", "digits_resnet20"],
    ]  # fmt: skip


def test_parts_of_a_program_are_put_together(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    part, whole = "```python part\na = 1\n```\n", "```python run\nprint(a)\n```\n"
    page.write_text(f"{part}```sh run\ntrue\n```\n{part}{whole}{whole}", encoding="utf-8")
    assert [block.text for block in pages.programs(page)] == ["true\n", "a = 1\na = 1\nprint(a)\n", "print(a)\n"]
    page.write_text(whole + part, encoding="utf-8")
    with pytest.raises(AssertionError, match="nothing runs the last part"):
        pages.programs(page)


@pytest.mark.parametrize(
    ("info", "complaint"),
    [
        ("sh", "exactly one of"),
        ("bash run", "language 'bash'"),
        ("sh run needs=gpu", "exactly one of"),
        ("sh needs=moon", "moon"),
        ("sh needs=", "needs= what"),
        ("sh run fast", "unknown words: fast"),
        ("sh run-by=tests/unit/test_readme.py::test_nothing", "no function 'test_nothing'"),
        ("text source=sbs/nothing.py", "no file"),
        ("python run status=1", ""),
    ],
)
def test_a_wrong_info_string_is_found(info: str, complaint: str, tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"# Page\n\n```{info}\ntrue\n```\n", encoding="utf-8")
    (block,) = pages.blocks(page)
    found = pages.problem(block)
    assert complaint in found if complaint else not found


@pytest.mark.parametrize(
    ("expected", "output", "any_numbers", "right"),
    [
        ("a ... c", "x\na b\nc\n", False, True),
        ("a ... c", "x\nc\na b\n", False, False),
        ("top-1 96.9%, 1,200 bytes", "top-1 7%, 88,400 bytes", True, True),
        ("top-1 96.9%, 1,200 bytes", "top-1 7%, 88,400 bytes", False, False),
        ("top-1 96.9%", "top-5 7.0%", True, False),
    ],
)
def test_output_is_compared(expected: str, output: str, any_numbers: bool, right: bool) -> None:
    assert pages.matches(expected, output, any_numbers=any_numbers) is right


def test_messages_are_looked_up_in_the_source() -> None:
    source = ROOT / "harness/errors.py"
    assert pages.says(source, "... not found: ...") is False  # too short to mean anything
    assert pages.says(ROOT / "harness/config.py", "no recipe is named ...: ...")
    assert not pages.says(ROOT / "harness/config.py", "no recipe is called ...: ...")
