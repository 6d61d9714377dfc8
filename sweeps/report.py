"""A frontier as text and data: one function formats every number, the same bytes come from any source."""

import csv
import html
import io
import json
from collections.abc import Sequence
from typing import Any

from sweeps.frontier import Frontier, Row, SeedGroup, hypervolume, over_seeds, reference

SCHEMA = 1
FIELDS = (
    "experiment", "model", "seed", "trial", "method", "lambda", "top1", "top5", "gbops", "bop_reduction",
    "mean_weight_bits", "mean_activation_bits", "pruned_share", "params", "on_frontier",
)  # fmt: skip
HEADERS = (
    "model", "method", "lambda", "seed", "top-1 %", "top-5 %", "GBOPs", "reduction", "W bits", "A bits", "pruned",
    "params", "trial", "frontier",
)  # fmt: skip
COUNTED = {
    "mac_product": "BOPs = MACs x weight bits x activation bits (full precision 32 x 32) over every convolution and "
    "linear layer, first and last at 8 x 8; biases and batch norm are not counted",
    "uniq": "BOPs = MACs x (weight bits x activation bits + weight bits + activation bits + log2(fan-in)) over every "
    "convolution and linear layer, first and last at 8 x 8; biases and batch norm are not counted",
}


def record(frontier: Frontier, row: Row) -> dict[str, Any]:
    """One row under the names of pareto.json."""
    values = {**vars(row), "lambda": row.lambda_, "on_frontier": frontier.is_best(row)}
    return {name: values[name] for name in FIELDS}


def headers(frontier: Frontier, names: Sequence[str] = HEADERS) -> list[str]:
    """The names of a table's columns for people; where rows had budgets or policies, the column of lambda says so."""
    given = {"policy" if row.method == "policy" else "budget" for row in frontier.rows if row.target}
    return [" or ".join(["lambda", *sorted(given)]) if name == "lambda" else name for name in names]


def cells(frontier: Frontier, row: Row) -> list[str]:
    """One row as people read it, in the order of `headers`."""
    return [
        row.model,
        row.method,
        row.drive,
        str(row.seed),
        f"{row.top1:.2f}",
        f"{row.top5:.2f}",
        f"{row.gbops:.4g}" if row.gbops < 1000 else f"{row.gbops:.1f}",
        f"{row.bop_reduction:.1f}x",
        f"{row.mean_weight_bits:.2f}",
        f"{row.mean_activation_bits:.2f}",
        f"{100 * row.pruned_share:.1f}%",
        f"{row.params:,}",
        row.trial[:8],
        "*" if frontier.is_best(row) else "",
    ]


def convention(frontier: Frontier) -> str:
    """The BOP convention of all rows; several are joined by commas, since their figures must not be compared."""
    return ", ".join(sorted({row.convention for row in frontier.rows}))


FRONTIER_NOTE = (
    "*: on its model's frontier, as no other row of the model has at least its top-1 at no more BOPs; the other points "
    "of the plot are pale."
)


def notes(frontier: Frontier) -> list[str]:
    """What a reader has to know about the figures: marks, convention, each family's hypervolume and its reference."""
    names = convention(frontier).split(", ") if frontier.rows else []
    lines = [FRONTIER_NOTE] if frontier.rows else []
    lines += [f"Convention {name}: {COUNTED.get(name, 'see sbs.cost')}." for name in names]
    for family in frontier.families():
        rows = frontier.of_family(family)
        share, floor = reference(rows)
        lines.append(
            f"Hypervolume of {family[0]} on {family[1]}: {hypervolume(rows):.3f} doublings x points of top-1, "
            f"reference point {share:g}x and {floor:.2f}%."
        )
    return lines


def as_json(frontier: Frontier) -> str:
    """pareto.json, schema 1."""
    document: dict[str, Any] = {
        "schema": SCHEMA,
        "convention": convention(frontier),
        "experiments": list(frontier.experiments),
    }
    if len(frontier.experiments) == 1:
        document["experiment"] = frontier.experiments[0]
    document["rows"] = [record(frontier, row) for row in frontier.rows]
    return json.dumps(document, indent=1) + "\n"


def as_csv(frontier: Frontier) -> str:
    """pareto.csv: the columns of pareto.json; an absent lambda is an empty field."""
    text = io.StringIO()
    writer = csv.DictWriter(text, FIELDS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(record(frontier, row) for row in frontier.rows)
    return text.getvalue()


def as_markdown(frontier: Frontier) -> str:
    """pareto.md: the table, the spread over seeds where there are several, and the notes."""
    parts = [f"# {', '.join(frontier.experiments)}", _markdown_table(headers(frontier), _body(frontier))]
    if groups := seed_groups(frontier):
        parts += [
            "## Mean and spread over seeds",
            _markdown_table(headers(frontier, SEED_HEADERS), [seed_cells(group) for group in groups]),
        ]
    parts += ["\n".join(f"- {line}" for line in notes(frontier))]
    return "\n\n".join(parts) + "\n"


def as_latex(frontier: Frontier) -> str:
    """pareto.tex: a `tabular` to \\input; needs no package."""
    rows = [_latex_line(headers(frontier)), r"\hline", *(_latex_line(row) for row in _body(frontier))]
    parts = [_tabular("lllr" + "r" * 8 + "ll", rows)]
    if groups := seed_groups(frontier):
        lines = [
            _latex_line(headers(frontier, SEED_HEADERS)),
            r"\hline",
            *(_latex_line(seed_cells(group)) for group in groups),
        ]
        parts.append(_tabular("lllrrrr", lines))
    parts += [f"% {line}" for line in notes(frontier)]
    return "\n".join(parts) + "\n"


def as_html(frontier: Frontier) -> str:
    """pareto.html: one page that needs nothing else; frontier rows are bold."""
    title = html.escape(", ".join(frontier.experiments))
    body = [
        f"<tr{' class=best' if cells_[-1] else ''}>{''.join(f'<td>{html.escape(c)}</td>' for c in cells_)}</tr>"
        for cells_ in _body(frontier)
    ]
    parts = [_html_table(headers(frontier), body)]
    if groups := seed_groups(frontier):
        spread = [
            "<tr>" + "".join(f"<td>{html.escape(c)}</td>" for c in seed_cells(group)) + "</tr>" for group in groups
        ]
        parts += ["<h2>Mean and spread over seeds</h2>", _html_table(headers(frontier, SEED_HEADERS), spread)]
    parts += [f"<p>{html.escape(line)}</p>" for line in notes(frontier)]
    head = f"<!doctype html>\n<meta charset=utf-8>\n<title>{title}</title>\n<style>{STYLE}</style>\n<h1>{title}</h1>"
    return "\n".join([head, *parts]) + "\n"


STYLE = (
    "body{font:14px sans-serif}table{border-collapse:collapse}"
    "td,th{padding:2px 8px;text-align:right}.best{font-weight:bold}"
)
SEED_HEADERS = ("model", "method", "lambda", "seeds", "top-1 %", "GBOPs", "reduction")


def seed_groups(frontier: Frontier) -> list[SeedGroup]:
    """Groups over seeds, or nothing when every configuration ran with one seed only."""
    groups = over_seeds(frontier.rows)
    return groups if any(group.seeds > 1 for group in groups) else []


def seed_cells(group: SeedGroup) -> list[str]:
    """One group as people read it, in the order of `SEED_HEADERS`."""
    return [
        group.model,
        group.method,
        group.drive,
        str(group.seeds),
        f"{group.top1_mean:.2f} ± {group.top1_std:.2f}",
        f"{group.gbops_mean:.4g} ± {group.gbops_std:.2g}",
        f"{group.bop_reduction_mean:.1f}x",
    ]


def _body(frontier: Frontier) -> list[list[str]]:
    return [cells(frontier, row) for row in frontier.rows]


def _markdown_table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    widths = [max(len(cell) for cell in column) for column in zip(headers, *rows, strict=True)]

    def line(row: Sequence[str]) -> str:
        return "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |"

    return "\n".join([line(headers), line(["-" * width for width in widths]), *map(line, rows)])


def _latex_line(row: Sequence[str]) -> str:
    return " & ".join(_tex(cell) for cell in row) + r" \\"


def _tabular(columns: str, lines: Sequence[str]) -> str:
    return "\n".join([rf"\begin{{tabular}}{{{columns}}}", *lines, r"\end{tabular}"])


def _tex(text: str) -> str:
    escaped = text.replace("_", r"\_").replace("%", r"\%").replace("±", r"$\pm$").replace("lambda", r"$\lambda$")
    return f"{escaped[:-1]}$\\times$" if escaped.endswith("x") and escaped[:-1].replace(".", "").isdigit() else escaped


def _html_table(headers: Sequence[str], rows: Sequence[str]) -> str:
    head = "".join(f"<th>{html.escape(header)}</th>" for header in headers)
    return "\n".join(["<table>", f"<tr>{head}</tr>", *rows, "</table>"])
