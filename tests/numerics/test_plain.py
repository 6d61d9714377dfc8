"""The plain form of a compressed network: the same bits, and nothing of ours for a graph tool to stumble over."""

import pytest
import torch

import sbs
from sbs.layers import QuantizedLayer
from sbs.plain import plain


def compressed(name: str, bits: dict[int, tuple[int, int]], *, pruned: bool) -> torch.nn.Module:
    """A network whose layers take turns in the given bits; with `pruned`, groups lose every third channel."""
    torch.manual_seed(1)
    model, image = sbs.models.build(name, 10), torch.randn(2, 3, 32, 32)
    policy = sbs.Policy.uniform(model, image, 4, 4)
    layers = []
    for number, layer in enumerate(policy.layers):
        weight, activation = bits[number % len(bits)]
        layers.append(sbs.LayerPolicy(layer.name, weight, activation, layer.kept))
    if pruned:
        roots = {group.root: group.channels for group in sbs.prepare(model, sbs.SearchSpace(), image).graph.groups}
        layers = [
            sbs.LayerPolicy(
                each.name,
                each.weight_bits,
                each.activation_bits,
                tuple(c for c in range(roots[each.name]) if c % 3) if each.name in roots else None,
            )
            for each in layers
        ]
    net = sbs.compress(model, sbs.Policy(policy.model, policy.input_shape, tuple(layers)), calibration=[image])
    return net.eval()


@pytest.mark.parametrize(
    ("name", "bits", "pruned"),
    [
        ("resnet20", {0: (2, 4), 1: (8, 2), 2: (4, 8)}, True),
        ("resnet20", {0: (32, 4), 1: (4, 32), 2: (32, 32), 3: (3, 3)}, False),
        ("mobilenetv2_cifar", {0: (4, 4), 1: (8, 8)}, True),
    ],
)
def test_the_plain_form_has_the_same_bits(name: str, bits: dict, pruned: bool):
    net = compressed(name, bits, pruned=pruned)
    flat = plain(net)
    assert not any(isinstance(module, QuantizedLayer) for module in flat.modules())
    assert any(isinstance(module, QuantizedLayer) for module in net.modules()), "the original is left as it was"
    for shape in ((1, 3, 32, 32), (5, 3, 32, 32)):
        images = torch.randn(shape)
        with torch.no_grad():
            assert torch.equal(flat(images), net(images))
    assert not any(parameter.requires_grad for parameter in flat.parameters())


def test_quantised_weights_are_kept_as_bytes():
    flat = plain(compressed("resnet20", {0: (8, 8), 1: (2, 2)}, pruned=False))
    kept = {name: tensor.dtype for name, tensor in flat.state_dict().items() if name.endswith("conv1.weight")}
    assert set(kept.values()) == {torch.uint8}


def test_a_super_network_is_refused():
    model = sbs.models.build("resnet20", 10)
    with pytest.raises(sbs.SbsError, match="compress it first"):
        plain(sbs.prepare(model, sbs.SearchSpace(), torch.zeros(1, 3, 32, 32)))
