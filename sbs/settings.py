"""What each layer of a super-network is made with: its candidates, the sign of its input, where its gate acts."""

from sbs.graph import LayerInfo
from sbs.kernels import GateMode
from sbs.layers import QuantSettings
from sbs.space import SearchSpace


def settings_of(info: LayerInfo, space: SearchSpace, relu: float | None) -> QuantSettings:
    """Of one layer of the graph; relu: upper limit of the ReLU that it computes as well, None without one."""
    weight_bits, activation_bits = space.weight_bits, space.activation_bits
    if info.edge:
        weight_bits = activation_bits = (space.first_last_bits,)
    mode = gate_mode(info) if space.prune else GateMode.NONE
    return QuantSettings(weight_bits, activation_bits, info.signed, info.image, mode, relu)


def gate_mode(info: LayerInfo) -> GateMode:
    """Where the channel gate of a layer's input acts.

    Before the quantiser of an unsigned consumer and after that of a signed one (a signed grid has no zero); in the
    statistics alone for the depth-wise convolution inside a group, whose output its consumers gate.
    """
    if info.kind == "depthwise" and info.group is not None:
        return GateMode.STATISTICS
    if info.source is None:
        return GateMode.NONE
    return GateMode.AFTER if info.signed else GateMode.BEFORE
