"""The frontier as a picture: every trial, the Pareto set as a line, published points hollow and marked as such."""

import io
import tomllib
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from sweeps.frontier import Frontier, Row
from sweeps.report import convention

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MARKERS = {
    "full_precision": "*", "sbs": "o", "sbs_prune": "v", "sbs_quant": "^", "uniform_2": "s", "uniform_4": "s",
    "uniform_8": "s", "prune_then_quant": "D", "policy": "p",
}  # fmt: skip
MOST_LABELS = 60
"""Points of one model beyond which names would only hide each other."""
COLOURS = ("#1f4e9c", "#b3421b", "#2c7a3f", "#7a3f9c", "#8a6d00", "#3b8f96")


@dataclass(frozen=True)
class Published:
    """A point that a paper reports; `top1_drop` in points below the paper's own full-precision network."""

    method: str
    model: str
    data: str
    bop_reduction: float
    top1_drop: float
    convention: str
    source: str
    note: str


def published() -> list[Published]:
    """The points of published.toml."""
    text = (resources.files("sweeps") / "published.toml").read_text(encoding="utf-8")
    return [Published(**point) for point in tomllib.loads(text)["points"]]


def write(frontier: Frontier, path: Path, kind: Literal["png", "svg"]) -> None:
    """Draw the frontier; equal rows give equal bytes with the pinned Matplotlib (fixed hash salt, no date)."""
    import matplotlib as mpl
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with mpl.rc_context({"svg.hashsalt": "sbs-harness", "font.family": "DejaVu Sans"}):
        figure = Figure(figsize=(8, 5), dpi=120, layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.add_subplot()
        for index, family in enumerate(frontier.families()):
            _draw_family(axes, frontier, family, COLOURS[index % len(COLOURS)])
        axes.set_xscale("log")
        axes.set_xlabel(f"GBOPs ({convention(frontier)})")
        axes.set_ylabel("top-1 accuracy, %")
        axes.set_title(", ".join(frontier.experiments))
        axes.grid(visible=True, which="both", alpha=0.25)
        if frontier.rows:
            axes.legend(fontsize=8, loc="lower right")  # "best" looks at every pair of points
        content = io.BytesIO()
        metadata: dict[str, Any] = {"Date": None} if kind == "svg" else {"Software": None}
        figure.savefig(content, format=kind, metadata=metadata)
    path.write_bytes(content.getvalue())


def _draw_family(axes: "Axes", frontier: Frontier, family: tuple[str, str], colour: str) -> None:
    from matplotlib.colors import to_rgba

    rows = frontier.of_family(family)
    best = [row for row in rows if frontier.is_best(row)]
    # A staircase: between two points nothing better than the cheaper one is known.
    axes.step(
        [row.gbops for row in best], [row.top1 for row in best], where="post", color=colour, linewidth=1, alpha=0.7
    )
    name = family[0] if len({model for model, _ in frontier.families()}) > 1 else ""
    for method in dict.fromkeys(row.method for row in rows):
        group = [row for row in rows if row.method == method]
        axes.scatter(
            [row.gbops for row in group],
            [row.top1 for row in group],
            marker=MARKERS.get(method, "x"),
            s=90 if method == "full_precision" else 36,
            color=[to_rgba(colour, 1.0 if frontier.is_best(row) else 0.4) for row in group],
            label=f"{name} {method}".strip(),
        )
    for row in rows if len(rows) <= MOST_LABELS else []:
        axes.annotate(_tag(row), (row.gbops, row.top1), textcoords="offset points", xytext=(5, 4), fontsize=7)
    _draw_published(axes, rows, family, colour)


def _tag(row: Row) -> str:
    if row.lambda_ is not None:
        return f"λ={row.lambda_:g}"
    if row.target:
        return row.target
    return row.method.removeprefix("uniform_") + " bits" if row.method.startswith("uniform_") else ""


def _draw_published(axes: "Axes", rows: list[Row], family: tuple[str, str], colour: str) -> None:
    """Place papers' points relative to our own full-precision network; without one there is nothing to relate to."""
    full = next((row for row in rows if row.method == "full_precision"), None)
    if full is None:
        return
    for point in published():
        if (point.model, point.data) == family:
            place = (full.gbops / point.bop_reduction, full.top1 - point.top1_drop)
            label = f"{point.method} {point.model}, published ({point.convention})"
            axes.scatter(*place, marker="P", s=60, facecolors="none", edgecolors=colour, label=label)
