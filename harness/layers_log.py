"""What every layer of a super-network costs as its gates stand: recorded after each epoch of a search."""

from typing import Any

from torch import nn

import sbs
from sbs.cost import cost_of

COLUMNS = ("name", "weight_bits", "activation_bits", "kept_out", "bops")


def layers_of(net: nn.Module) -> dict[str, Any]:
    """{"layers": [a list of `COLUMNS` for each layer], "margins": as `sbs.margins`, "flips": as `sbs.flips`}.

    {} where nothing is searched.

    BOPs for one image by the convention mac_product. Pure arithmetic over the gates: milliseconds, no forward pass.
    """
    if not isinstance(net, sbs.SuperNet):
        return {}
    report = cost_of(net.graph, sbs.freeze(net), (), "mac_product")
    margins = {
        name: {kind: [float(f"{value:.3g}") for value in values] for kind, values in gates.items()}
        for name, gates in sbs.margins(net).items()
    }
    return {
        "layers": [[getattr(layer, name) for name in COLUMNS] for layer in report.layers],
        "margins": margins,
        "flips": sbs.flips(net),
    }
