"""The figures of a finished trial: result.json."""

import platform
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

import sbs
from harness.config import searches
from harness.metrics import Scores
from harness.networks import example_input
from harness.settings import RESULT_SCHEMA
from sbs.graph import analyze

if TYPE_CHECKING:
    from harness.context import Context


def build_result(
    context: "Context", net: nn.Module, model: nn.Module, scores: Scores, timings_s: dict[str, float]
) -> dict[str, Any]:
    """The content of result.json. `net` is what the trial made, `model` the full-precision network it came from.

    `bop_reduction` is against `model` at 32/32 bits, all convolution and linear layers counted. Mean bits are weighted
    by MACs, over the layers that a search decides on (not the first and the last); the pruned share is of channels.
    """
    spec, recipe = context.spec, context.recipe
    example = example_input(recipe)
    shape = tuple(example.shape[1:])
    whole = sbs.cost(model, shape)
    cost = sbs.cost(net.cpu(), shape)
    unpruned = {layer.name: layer.out_channels for layer in whole.layers}
    edges = {layer.name for layer in analyze(model, example).layers if layer.edge}
    searched = [layer for layer in cost.layers if layer.name not in edges]
    macs = sum(layer.macs for layer in searched)
    channels = sum(unpruned[layer.name] for layer in searched)
    layers = [asdict(layer) | {"out_channels": unpruned[layer.name]} for layer in cost.layers]
    return {
        "schema": RESULT_SCHEMA,
        "key": spec.key,
        "label": spec.label,
        "model": recipe.model.name,
        "data": recipe.data.source,
        "seed": recipe.run.seed,
        "method": recipe.search.method,
        "lambda": recipe.search.lambda_ if searches(recipe.search.method) else None,
        "top1": scores.top1,
        "top5": scores.top5,
        "loss": scores.loss,
        "gbops": cost.bops / 1e9,
        "bop_reduction": whole.bops / cost.bops,
        "mean_weight_bits": sum(layer.weight_bits * layer.macs for layer in searched) / macs,
        "mean_activation_bits": sum(layer.activation_bits * layer.macs for layer in searched) / macs,
        "pruned_share": 1 - sum(layer.kept_out for layer in searched) / channels,
        "params": cost.params,
        "bytes": cost.bytes,
        "convention": cost.convention,
        "layers": layers,
        "timings_s": timings_s,
        "stack": {
            "loader": context.val_loader().stack,
            "order": context.train_loader(1).order,
            "memory": context.train_loader(1).memory,
            "backend": context.ranks.backend,
            "world_size": context.ranks.world,
            "launcher": context.ranks.launcher,
            "device": str(context.ranks.device.type),
            "torch": str(torch.__version__),
            "python": platform.python_version(),
        },
    }
