"""From a recipe and saved weights to a network: full precision, super-network or compressed."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

import sbs
from harness.checkpoint import State, load_weights
from harness.config import Recipe
from harness.errors import UserError, require_file
from harness.ranks import seed_step
from sbs.errors import SbsError
from sbs.space import FULL_PRECISION_BITS


def example_input(recipe: Recipe) -> torch.Tensor:
    """Zeros in the shape of one image, on the CPU."""
    size = recipe.data.image_size
    return torch.zeros(1, 3, size, size)


def full_precision(recipe: Recipe, weights: State | None = None) -> nn.Module:
    """The recipe's network with given weights, or as the recipe starts it; `UserError` if they do not fit."""
    seed_step(recipe.run.seed, 0, 0)
    model = sbs.models.build(recipe.model.name, recipe.model.num_classes)
    if weights is None and recipe.model.weights is not None:
        weights = load_weights(Path(recipe.model.weights))
    if weights is not None:
        _load(model, weights, f"model.name = {recipe.model.name!r}")
    return model


def supernet(recipe: Recipe, model: nn.Module, stage: str = "search", weights: State | None = None) -> sbs.SuperNet:
    """The super-network of `model` over the recipe's search space."""
    net = sbs.prepare(model, search_space(recipe, stage), example_input(recipe), absorb_relus=True)
    if weights is not None:
        _load(net, weights, f"the super-network of {recipe.model.name!r}")
    return net


def compressed(recipe: Recipe, policy: dict[str, Any], weights: State | None = None) -> nn.Module:
    """The fixed-bit network of a policy (as a document)."""
    net = sbs.compress(full_precision(recipe), sbs.Policy.from_json(policy), example_input=example_input(recipe))
    if weights is not None:
        _load(net, weights, f"{recipe.model.name!r} under its policy")
    return net


def given_policy(recipe: Recipe, model: nn.Module) -> sbs.Policy:
    """The policy that a method without a search trains: the same bits everywhere, or that of a file.

    Raises `UserError` naming the file if it is no policy, or one of another network.
    """
    search, example = recipe.search, example_input(recipe)
    if search.policy is None:
        bits = int(search.method.removeprefix("uniform_"))
        return sbs.Policy.uniform(model, example, bits, bits)
    path = require_file(Path(search.policy), "search.policy", "Give the policy.json of a trial, or one in its format.")
    try:
        policy = sbs.Policy.load(path)
        sbs.compress(model, policy, example_input=example)
    except SbsError as error:
        raise UserError(f"search.policy = {search.policy!r} does not fit {recipe.model.name!r}: {error}") from None
    return policy


def restored(recipe: Recipe, weights: State, policy: dict[str, Any] | None) -> nn.Module:
    """The network that a state dict belongs to, told by its keys; a compressed one needs its policy."""
    if any(key.startswith("weight_gates.") for key in weights):
        model = full_precision(recipe) if policy is None else compressed(recipe, policy)
        stage = "search" if recipe.search.method != "prune_then_quant" or policy is not None else "prune"
        return supernet(recipe, model, stage, weights)
    if policy is not None:
        return compressed(recipe, policy, weights)
    if any(key.endswith("_clip") for key in weights):
        raise UserError("these are the weights of a compressed network: name its policy with --policy FILE")
    return full_precision(recipe, weights)


def search_space(recipe: Recipe, stage: str = "search") -> sbs.SearchSpace:
    """What a searching stage may choose from.

    Prune-only has fixed bits, quantise-only no channel groups; prune-then-quantise does the one in its stage `prune`,
    the other in its stage `search`.
    """
    search = recipe.search
    weight_bits, activation_bits, prune = search.weight_bits, search.activation_bits, True
    if search.method == "sbs_prune":
        weight_bits = activation_bits = (search.prune_only_bits,)
    elif stage == "prune":
        weight_bits = activation_bits = (FULL_PRECISION_BITS,)
    elif search.method in {"sbs_quant", "prune_then_quant"}:
        prune = False
    return sbs.SearchSpace(
        weight_bits=weight_bits,
        activation_bits=activation_bits,
        prune=prune,
        group_size=search.group_size,
        max_prune_share=search.max_prune_share,
    )


def merged(pruning: dict[str, Any], quantisation: sbs.Policy) -> sbs.Policy:
    """The channels of one policy (a document) with the bits of another, which belongs to the network pruned by it."""
    first = sbs.Policy.from_json(pruning)
    layers = tuple(
        replace(layer, weight_bits=bits.weight_bits, activation_bits=bits.activation_bits)
        for layer in first.layers
        for bits in [quantisation.layer(layer.name)]
    )
    return replace(first, layers=layers)


def _load(net: nn.Module, weights: State, what: str) -> None:
    try:
        net.load_state_dict(weights)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:400]
        raise UserError(f"the given weights do not fit {what}: {reason}") from None
