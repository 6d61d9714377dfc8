"""The work of `python -m harness cost`: MACs, BOPs, parameters and bytes of a network, per layer and in all."""

import dataclasses
import json
import sys
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

import sbs
from harness.errors import UserError
from sbs.cost import CostReport, check_convention

FORMULAS = {
    "mac_product": "BOPs(layer) = MACs x weight bits x activation bits",
    "uniq": "BOPs(layer) = MACs x (b_w b_a + b_w + b_a + log2(fan-in)), fan-in = input channels / groups x kernel area",
}


def cost(
    model_name: str,
    policy_file: Path | None,
    *,
    convention: str,
    classes: int | None,
    image_size: int | None,
    explain: bool,
    as_json: bool,
) -> None:
    """Print the cost of a model of the zoo at 32/32 bits, or under a policy."""
    check_convention(convention)
    small = "cifar" in model_name or model_name in {"resnet20", "resnet32", "resnet56"}
    size = (32 if small else 224) if image_size is None else image_size
    if size < 1:
        raise UserError(f"--image-size {size}: give a number of pixels, for example 224")
    model = sbs.models.build(model_name, (100 if small else 1000) if classes is None else classes)
    shape = (3, size, size)
    policy = None if policy_file is None else sbs.Policy.load(policy_file)
    full = sbs.cost(model, shape, convention=convention)
    try:
        report = full if policy is None else sbs.cost(model, shape, policy, convention)
    except sbs.SbsError as error:
        remedy = f"--policy takes one of {model_name} with as many classes (--classes)"
        raise UserError(f"{policy_file}: {error}; {remedy}") from None
    if as_json:
        print(json.dumps(_document(model_name, shape, report, full), indent=1))
        return
    # a log has no width: let no layer name be cut
    console = Console(width=None if sys.stdout.isatty() else 140)
    console.print(_table(report))
    console.print(
        f"{model_name}, {shape[0]} x {shape[1]} x {shape[2]}, one image, convention {convention}, "
        f"all {len(report.layers)} convolution and linear layers counted"
    )
    console.print(
        f"{report.macs:,} MACs, {report.gbops:,.4f} GBOPs ({full.bops / report.bops:.1f}x fewer than at 32/32), "
        f"{report.params:,} parameters, {report.bytes:,} bytes"
    )
    if explain:
        console.print(_explanation(report))


def _document(name: str, shape: tuple[int, ...], report: CostReport, full: CostReport) -> dict[str, object]:
    return {
        "model": name,
        "input_shape": list(shape),
        "convention": report.convention,
        "macs": report.macs,
        "bops": report.bops,
        "gbops": report.gbops,
        "bop_reduction": full.bops / report.bops,
        "params": report.params,
        "bytes": report.bytes,
        "mean_weight_bits": report.mean_weight_bits,
        "mean_activation_bits": report.mean_activation_bits,
        "pruned_share": report.pruned_share,
        "layers": [dataclasses.asdict(layer) for layer in report.layers],
    }


def _table(report: CostReport) -> Table:
    table = Table(box=None, pad_edge=False)
    for name in ("layer", "kind", "bits w/a", "in", "out", "MACs", "MBOPs", "params", "bytes"):
        table.add_column(name, justify="left" if name in {"layer", "kind"} else "right")
    for layer in report.layers:
        table.add_row(
            layer.name,
            layer.kind,
            f"{layer.weight_bits}/{layer.activation_bits}",
            _kept(layer.kept_in, layer.in_channels),
            _kept(layer.kept_out, layer.out_channels),
            f"{layer.macs:,}",
            f"{layer.bops / 1e6:,.2f}",
            f"{layer.params:,}",
            f"{layer.bytes:,}",
        )
    return table


def _kept(kept: int, channels: int) -> str:
    return str(channels) if kept == channels else f"{kept} of {channels}"


def _explanation(report: CostReport) -> str:
    example = max(report.layers, key=lambda layer: layer.bops)
    return (
        f"{FORMULAS[report.convention]}\n"
        "MACs(layer) = output height x width x kernel area x kept input channels / groups x kept output channels\n"
        f"for example {example.name}: {example.macs:,} MACs at {example.weight_bits}/{example.activation_bits} bits "
        f"= {example.bops:,.0f} BOPs\n"
        "biases, norms and activations are not counted in MACs and BOPs; parameters and bytes count them\n"
        f"bytes: weight codes packed at their bits, everything else as 32-bit floats (torch {torch.__version__})"
    )
