import csv
import io
import json
import typing
from pathlib import Path

import pytest

from harness.config import Method
from harness.errors import UserError
from harness.tracking.store import Store
from sweeps import plot, report
from sweeps.frontier import Frontier, build
from sweeps.outcome import TERMINAL_ROWS, TEXTS, from_store, show_table, write
from tests.unit.sweeps.rows import row

FULL = {"method": "full_precision", "lambda": None}


@pytest.fixture
def frontier() -> Frontier:
    return build(
        ["e"],
        [
            row(key="f" * 16, point="f", top1=98.1234567, gbops=41.7986, bop_reduction=1.0, **FULL),
            row(key="a" * 16, top1=97.5, gbops=1.25, bop_reduction=33.43888),
        ],
    )


def test_json_has_the_documented_schema(frontier: Frontier):
    document = json.loads(report.as_json(frontier))
    assert document["schema"] == 1
    assert document["experiment"] == "e"
    assert document["experiments"] == ["e"]
    assert document["convention"] == "mac_product"
    assert set(document["rows"][0]) == {
        "experiment", "model", "seed", "trial", "method", "lambda", "top1", "top5", "gbops", "bop_reduction",
        "mean_weight_bits", "mean_activation_bits", "pruned_share", "params", "on_frontier",
    }  # fmt: skip
    sbs, full = document["rows"]
    assert (sbs["lambda"], sbs["bop_reduction"], sbs["on_frontier"]) == (0.1, 33.4389, True)
    assert (full["lambda"], full["top1"]) == (None, 98.1235)


def test_several_experiments_have_no_single_name(frontier: Frontier):
    document = json.loads(report.as_json(build(["e", "g"], [*frontier.rows, row("g", key="g")])))
    assert "experiment" not in document
    assert document["experiments"] == ["e", "g"]


def test_csv_holds_the_same_numbers_as_json(frontier: Frontier):
    table = list(csv.DictReader(io.StringIO(report.as_csv(frontier))))
    rows = json.loads(report.as_json(frontier))["rows"]
    assert [line["trial"] for line in table] == [r["trial"] for r in rows]
    assert [float(line["gbops"]) for line in table] == [r["gbops"] for r in rows]
    assert [line["lambda"] for line in table] == ["0.1", ""]
    assert [line["on_frontier"] for line in table] == ["True", "True"]


def test_every_text_shows_every_row(frontier: Frontier):
    assert "| 97.50   |" in report.as_markdown(frontier)
    assert r"full\_precision &" in report.as_latex(frontier)
    assert r"33.4$\times$" in report.as_latex(frontier)
    for text in (report.as_markdown(frontier), report.as_html(frontier), report.as_latex(frontier)):
        assert "97.50" in text
        assert "98.12" in text
        assert "Convention mac\\_product" in text or "Convention mac_product" in text


def test_latex_compiles_in_form(frontier: Frontier):
    lines = report.as_latex(frontier).splitlines()
    columns = len(lines[0].removeprefix(r"\begin{tabular}{").removesuffix("}"))
    for line in lines:
        if line.endswith(r"\\"):
            assert line.count(" & ") == len(report.HEADERS) - 1
    assert columns == len(report.HEADERS)


def test_spread_over_seeds_is_shown_where_there_are_several(frontier: Frontier):
    assert report.seed_groups(frontier) == []
    two = build(["e"], [row(key="a", seed=0, top1=90.0), row(key="b", seed=1, top1=92.0)])
    assert "91.00 ± 1.41" in report.as_markdown(two)
    assert "91.00 ± 1.41" in report.as_html(two)
    assert r"91.00 $\pm$ 1.41" in report.as_latex(two)


def test_equal_rows_give_equal_bytes(frontier: Frontier, tmp_path: Path):
    shuffled = build(frontier.experiments, reversed(frontier.rows))
    names = write(frontier, tmp_path / "a")
    assert write(shuffled, tmp_path / "b") == names
    assert set(names) == {*TEXTS, "pareto.png", "pareto.svg"}
    for name in names:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    assert (tmp_path / "a" / "pareto.png").read_bytes().startswith(b"\x89PNG")


def test_published_points_have_sources_and_stand_apart(tmp_path: Path):
    points = plot.published()
    assert all(point.source and point.convention for point in points)
    assert any((p.model, p.bop_reduction, p.top1_drop) == ("mobilenetv2", 22.6, 0.1) for p in points)
    rows = [
        row(key="f", model="mobilenetv2", data="imagenet", top1=71.8, gbops=308.0, bop_reduction=1.0, **FULL),
        row(key="a", model="mobilenetv2", data="imagenet", top1=71.0, gbops=14.0, bop_reduction=22.0),
    ]
    plot.write(build(["e"], rows), tmp_path / "with.svg", "svg")
    plot.write(build(["e"], rows[1:]), tmp_path / "without.svg", "svg")  # nothing to relate them to
    assert "published" in text_of(tmp_path / "with.svg")
    assert "published" not in text_of(tmp_path / "without.svg")


def text_of(svg: Path) -> str:
    """Labels of a Matplotlib SVG: text drawn as paths keeps its words in comments."""
    return svg.read_text()


def test_an_absent_store_is_not_made(tmp_path: Path):
    with pytest.raises(UserError, match=r"no MLflow store at sqlite:///.*mlflow\.db"):
        from_store(Store(f"sqlite:///{tmp_path}/mlflow.db"), ["e"])
    assert not list(tmp_path.iterdir())


def test_no_rows_still_make_files(tmp_path: Path):
    write(build(["e"], []), tmp_path)
    assert json.loads((tmp_path / "pareto.json").read_text())["rows"] == []


def test_budgets_tell_points_without_lambda_apart(frontier: Frontier, tmp_path: Path):
    rows = [
        row(key=text[:4] * 4, point=text, gbops=gbops, **{"lambda": None, "target": text})
        for text, gbops in [("budget 0.05", 2.0), ("snapshot 0.03", 1.2), ("35 GBOPs", 35.0)]
    ]
    mixed = build(["e"], [*frontier.rows, *rows])
    for text in (report.as_markdown(mixed), report.as_html(mixed), report.as_latex(mixed)):
        for words in ["budget 0.05", "snapshot 0.03", "35 GBOPs", "or budget"]:
            assert words in text
    assert "or budget" not in report.as_markdown(frontier), "tables without budgets stay as they were"
    assert {r["lambda"] for r in json.loads(report.as_json(mixed))["rows"]} == {None, 0.1}
    assert "target" not in json.loads(report.as_json(mixed))["rows"][0]
    plot.write(mixed, tmp_path / "plot.svg", "svg")
    for words in ["budget 0.05", "snapshot 0.03", "35 GBOPs"]:
        assert words in text_of(tmp_path / "plot.svg")
    two = build(["e"], [*rows, row(key="b", seed=1, point="budget 0.05", **{"lambda": None, "target": "budget 0.05"})])
    assert "| budget 0.05      | 2 " in report.as_markdown(two)


def test_a_policy_is_named_and_has_a_mark_of_its_own(frontier: Frontier, tmp_path: Path):
    given = row(key="p" * 16, point="p", gbops=3.0, method="policy", **{"lambda": None, "target": "policy mine"})
    mixed = build(["e"], [*frontier.rows, given])
    for text in (report.as_markdown(mixed), report.as_html(mixed), report.as_latex(mixed)):
        assert "policy mine" in text
        assert " or policy" in text
    budget = row(key="b" * 16, point="b", **{"lambda": None, "target": "budget 0.05"})
    assert report.headers(build(["e"], [given, budget]))[2] == "lambda or budget or policy"
    plot.write(mixed, tmp_path / "plot.svg", "svg")
    assert "policy mine" in text_of(tmp_path / "plot.svg")
    assert set(plot.MARKERS) == set(typing.get_args(Method))
    assert list(plot.MARKERS.values()).count(plot.MARKERS["policy"]) == 1


def test_a_very_long_table_shows_its_frontier_and_says_where_the_rest_is(capsys: pytest.CaptureFixture[str]):
    worse = [row(key=f"{number:016x}", top1=50.0, gbops=2.0 + number) for number in range(TERMINAL_ROWS)]
    best = row(key="b" * 16, top1=90.0, gbops=1.0)
    show_table(build(["e"], [best, *worse]))
    shown = capsys.readouterr().out
    assert "bbbbbbbb" in shown
    assert "00000000" not in shown
    assert "200 rows beside the frontier" in shown
    show_table(build(["e"], [best, *worse[1:]]))
    assert "00000000" in capsys.readouterr().out
