"""Start values from data: clips, gate statistics, and batch norms under quantisation (ours)."""

import itertools
import warnings
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from sbs import gate_statistics
from sbs.errors import SbsError
from sbs.graph import NORMS
from sbs.layers import QuantizedLayer
from sbs.memory import spread
from sbs.modules import unwrapped
from sbs.ranks import average
from sbs.space import levels
from sbs.supernet import SuperNet

CLIP_QUANTILE = 0.999
_TRIALS = 48
_SAMPLE = 2**20
Norm = nn.BatchNorm1d | nn.BatchNorm2d | nn.SyncBatchNorm


@torch.no_grad()
def calibrate(net: nn.Module, batches: Iterable[Tensor]) -> None:
    """Set clips from the weights and from `batches` of images, re-estimate batch norms, start the gate statistics.

    A layer with several candidate bit-widths starts at the 99.9% quantile; a fixed-bit layer at the clip with the least
    squared error for its bits. Where torch.distributed is initialised the results are averaged over the ranks, so ranks
    may bring different batches (as many each). Train and eval modes are left as they were.
    Raises SbsError without a batch, and for batches that are no finite images.
    """
    net, images = unwrapped(net), _images(batches)
    modes = {m: m.training for m in net.modules()}
    layers = [m for m in net.modules() if isinstance(m, QuantizedLayer)]
    norms = [m for m in net.modules() if isinstance(m, NORMS) and m.track_running_stats]
    momenta = [m.momentum for m in norms]
    try:
        net.eval()
        # batch statistics, so that a network that never saw data starts as sanely as a pretrained one
        for norm in norms:
            norm.train()
        for layer in layers:
            if layer.quantizes_weight:
                layer.set_clip("weight", _weight_clip(layer))
        names = _names(net)
        _warn_of_means({name: m.kept_weight() for name, m in zip(names, layers, strict=True) if m.quantizes_weight})
        _observe(net, dict(zip(names, layers, strict=True)), images)
        _estimate_norms(net, norms, images)
    finally:
        for layer in layers:
            layer.observed = None
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
        for module, mode in modes.items():
            module.training = mode
    if isinstance(net, SuperNet):
        gate_statistics.start(net)


@torch.no_grad()
def estimate_norms(net: nn.Module, batches: Iterable[Tensor]) -> None:
    """Estimate the running statistics of batch norms anew, as plain averages over `batches` of images.

    Running statistics lag behind the weights, and in a search behind the gates: they are those of many networks. Where
    torch.distributed is initialised the results are averaged over the ranks, so ranks may bring different batches (as
    many each). Modes, momenta, gates and their statistics are left as they were. Raises SbsError without a batch.
    """
    if isinstance(batches, Tensor):
        raise SbsError("estimate_norms() takes a list of batches, not one tensor: estimate_norms(net, [images])")
    net, coming = unwrapped(net), iter(batches)
    norms = [m for m in net.modules() if isinstance(m, NORMS) and m.track_running_stats]
    if not norms:
        return
    first = next(coming, None)
    if first is None:
        raise SbsError("estimate_norms() got no batch; give at least one batch of training images")
    modes, momenta = {m: m.training for m in net.modules()}, [m.momentum for m in norms]
    try:
        net.eval()
        _average(net, norms, itertools.chain([first], coming))
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
        for module, mode in modes.items():
            module.training = mode


def _average(net: nn.Module, norms: list[Norm], images: Iterable[Tensor]) -> None:
    """Running statistics of `norms` as the plain average over the batches, and over the ranks."""
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None
        norm.train()
    for x in images:
        net(x)
    average([b for m in norms for b in (m.running_mean, m.running_var) if b is not None])


def _images(batches: Iterable[Tensor]) -> list[Tensor]:
    if isinstance(batches, Tensor):
        raise SbsError("calibrate() takes a list of batches, not one tensor: calibrate(net, [images])")
    images = list(batches)
    if not images:
        raise SbsError("calibrate() got no batch; give at least one batch of training images")
    for x in images:
        if not isinstance(x, Tensor):
            raise SbsError(
                f"calibrate() takes batches of images, and got a {type(x).__name__}: of a loader of images and labels "
                "take the images, as in [images for images, labels in loader]"
            )
        if not bool(x.isfinite().all()):
            raise SbsError("calibrate() got a batch with values that are infinite or no numbers: leave it out")
    return images


def _names(net: nn.Module) -> list[str]:
    """Of the quantised layers, as policies have them."""
    model = net.model if isinstance(net, SuperNet) else net
    return [name for name, m in model.named_modules() if isinstance(m, QuantizedLayer)]


def _observe(net: nn.Module, named: dict[str, QuantizedLayer], images: list[Tensor]) -> None:
    """One pass with the float weights; every quantiser's clip from what reaches it."""
    layers = list(named.values())
    for layer in layers:
        layer.observed = []
    for x in images:
        net(x)
    clips, least = [], []
    for layer in layers:
        values = spread(torch.cat(layer.observed or [torch.ones(1)]), _SAMPLE)
        layer.observed = None
        bits = layer.settings.activation_bits
        signed = layer.settings.signed
        least.append(values.min() if layer.quantizes_activation and not signed else values.new_zeros(()))
        clips.append(_best_clip(values, bits[0], signed) if len(bits) == 1 else torch.quantile(values, CLIP_QUANTILE))
    if not clips:
        return
    table, negative = torch.stack(clips).double(), (torch.stack(least) < 0).double()
    average([table, negative])
    wrong = [repr(name) for name, share in zip(named, negative.tolist(), strict=True) if share > 0]
    if wrong:
        raise SbsError(
            f"module {', '.join(wrong)} gets negative values, though nothing in the network's graph makes them. It may "
            "be that forward() changes a tensor in place that others read (write y = y + z instead of y += z there), "
            "or a hook"
        )
    for layer, clip in zip(layers, table, strict=True):
        if layer.quantizes_activation:
            layer.set_clip("activation", float(clip.clamp_min(1e-6)))


def _estimate_norms(net: nn.Module, norms: list[Norm], images: list[Tensor]) -> None:
    """Running statistics of every batch norm as the plain average over the batches, quantisers on."""
    if isinstance(net, SuperNet):
        net.training = True
    for layer in (m for m in net.modules() if isinstance(m, QuantizedLayer)):
        layer.pending_activation = None  # of passes before this one
    _average(net, norms, images)


def _weight_clip(layer: QuantizedLayer) -> Tensor:
    weight = layer.kept_weight().float().flatten()
    var, mean = torch.var_mean(weight, correction=0)
    standard = ((weight - mean) / var.sqrt().clamp_min(1e-8)).abs()
    standard = spread(standard, _SAMPLE)
    bits = layer.settings.weight_bits
    if len(bits) == 1:
        return _best_clip(standard, bits[0], True)
    return torch.quantile(standard, CLIP_QUANTILE).clamp_min(1e-6)  # constant weights have no spread


def _warn_of_means(weights: dict[str, Tensor]) -> None:
    """The method subtracts the weights' mean: what follows must do without (a batch norm or a softmax does)."""
    large = [repr(name) for name, w in weights.items() if abs(float(w.mean())) > float(w.std(correction=0))]
    if large:
        warnings.warn(
            f"the weights of {', '.join(large)} have a mean beyond their standard deviation, and quantising subtracts "
            "it (docs/method.md, section 1): train with it from the start, or check the accuracy after calibrating",
            stacklevel=4,
        )


def _best_clip(values: Tensor, bits: int, signed: bool) -> Tensor:
    """The clip with the least squared error of non-negative `values` (|x| where signed) on a `bits`-bit grid."""
    top = values.max().clamp_min(1e-6)
    if bits > 16:
        return top
    n = levels(bits)
    best, least = top, float("inf")
    for share in torch.linspace(1.0 / _TRIALS, 1.0, _TRIALS).tolist():
        clip = top * share
        value = (values / clip).clamp(max=1)
        code = 2 * torch.round((value + 1) * 0.5 * n) - n if signed else torch.round(value * n)
        error = float((values - clip * code / n).square().mean())
        if error < least:
            best, least = clip, error
    return best
