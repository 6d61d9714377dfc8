"""The per-layer pictures of a trial: bits and kept channels in the end, BOPs over the search."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from harness.run_dir import RunDir
from harness.tracking.record import LayerPoint


def ensure(run: RunDir) -> Path | None:
    """Draw layers.png of a finished trial unless it is there; None for a trial without layers."""
    path = run.path / "layers.png"
    if not path.is_file():
        layers = (run.result() or {}).get("layers")
        if not layers:
            return None
        draw(layers, path)
    return path


def draw(layers: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Bits and kept channels as bars over the layers. No date in the file: equal tables give equal bytes."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(max(6.0, 0.32 * len(layers)), 5.5), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    bits, channels = figure.subplots(2, 1, sharex=True)
    places = range(len(layers))
    bits.bar(
        [p - 0.2 for p in places], [layer["weight_bits"] for layer in layers], 0.4, label="weights", color="#1f4e9c"
    )
    bits.bar(
        [p + 0.2 for p in places],
        [layer["activation_bits"] for layer in layers],
        0.4,
        label="activations",
        color="#b3421b",
    )
    bits.set_ylabel("bits")
    bits.legend(fontsize=8)
    channels.bar(places, [layer["out_channels"] for layer in layers], color="#d9d9d9", label="all")
    channels.bar(places, [layer["kept_out"] for layer in layers], color="#2c7a3f", label="kept")
    channels.set_ylabel("output channels")
    channels.set_xticks(list(places), [str(layer["name"]) for layer in layers], rotation=90, fontsize=6)
    channels.legend(fontsize=8)
    figure.savefig(path, metadata={"Software": None})


def draw_search(points: Sequence[LayerPoint], path: Path) -> None:
    """BOPs over the search: of the whole network as a line, of every layer as a row of a map."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.colors import LogNorm
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(point.name for point in points))
    epochs = list(dict.fromkeys((point.stage, point.epoch, point.step) for point in points))
    table = [[math.nan] * len(epochs) for _ in names]
    for point in points:
        table[names.index(point.name)][epochs.index((point.stage, point.epoch, point.step))] = point.bops / 1e6
    totals = [sum(row[column] for row in table if not math.isnan(row[column])) / 1e3 for column in range(len(epochs))]
    figure = Figure(
        figsize=(max(6.0, 2.5 + 0.12 * len(epochs)), 2.5 + 0.16 * len(names)), dpi=100, layout="constrained"
    )
    FigureCanvasAgg(figure)
    whole, layers = figure.subplots(2, 1, sharex=True, height_ratios=(1, max(1.5, 0.1 * len(names))))
    whole.plot(range(len(epochs)), totals, color="#1f4e9c", marker=".")
    whole.set_ylim(bottom=0)
    whole.set_ylabel("GBOPs in all")
    shown = layers.imshow(table, aspect="auto", interpolation="nearest", norm=LogNorm(), cmap="viridis")
    layers.set_yticks(range(len(names)), names, fontsize=6)
    every = max(1, len(epochs) // 16)
    labels = [f"{stage} {epoch}" if len({e[0] for e in epochs}) > 1 else str(epoch) for stage, epoch, _ in epochs]
    layers.set_xticks(range(0, len(epochs), every), labels[::every], fontsize=7)
    layers.set_xlabel("epoch of the search")
    figure.colorbar(shown, ax=layers, label="MBOPs of the layer, one image")
    figure.savefig(path, metadata={"Software": None})
