"""The per-layer picture of a trial: weight and activation bits and kept channels, layer by layer."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from harness.run_dir import RunDir


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
