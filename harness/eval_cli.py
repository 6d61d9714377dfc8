"""The work of `python -m harness eval`: the figures of anything that the project has saved, on any prepared data."""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

import sbs
from harness.arithmetic import arithmetic, autocast
from harness.checkpoint import State, load_any, load_weights
from harness.config import Recipe, load_recipe, parse_recipe
from harness.data import open_data
from harness.errors import UserError
from harness.metrics import evaluate
from harness.networks import example_input, full_precision, restored
from harness.ranks import joined, set_norm_statistics
from harness.run_dir import RunDir, read_json

_STAGES = ("finetune", "compress", "search", "pretrain")


@dataclass(frozen=True)
class Saved:
    """Weights and, where it is known, the policy that they belong to; `file` is where they came from.

    `norms`: the mean of the ranks' batch-norm statistics, where the file has those of several ranks.
    """

    file: Path
    weights: State
    policy: dict[str, Any] | None
    norms: torch.Tensor | None = None


def evaluate_saved(
    target: Path, data: Path | None, policy_file: Path | None, recipe_name: str | None, *, as_json: bool
) -> None:
    """Evaluate a run directory or a file of one, an export, or a plain state dict; print the figures on rank 0."""
    recipe = _recipe(target, recipe_name)
    if data is not None:
        recipe = recipe.model_copy(update={"data": recipe.data.model_copy(update={"dir": str(data)})})
    policy = None if policy_file is None else sbs.Policy.load(policy_file).to_json()
    file, net = _network(target, recipe, policy)
    figures = {"file": str(file)} | measure(recipe, net)
    if os.environ.get("RANK", "0") == "0":
        print(json.dumps(figures) if as_json else _words(figures))


def measure(recipe: Recipe, net: nn.Module) -> dict[str, Any]:
    """Exact top-1, top-5 (percent) and loss over the recipe's validation images, and the network's cost."""
    with arithmetic(recipe.run), joined(recipe.run) as ranks:
        size = recipe.data.eval_batch_size or recipe.data.batch_size
        loader = open_data(
            recipe.data,
            "val",
            batch_size=-(-size // ranks.world),
            seed=0,
            rank=ranks.rank,
            world=ranks.world,
            device=ranks.device,
        )
        try:
            if loader.num_classes != recipe.model.num_classes:
                raise UserError(
                    f"the network has {recipe.model.num_classes} classes, "
                    f"but {recipe.data.dir} holds {loader.num_classes}"
                )
            net.to(ranks.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
            with autocast(recipe.run, ranks.device):
                scores = evaluate(net, loader.epoch(0), ranks, flip_tta=recipe.run.flip_tta)
        finally:
            loader.close()
    shape = tuple(example_input(recipe).shape[1:])
    cost, whole = sbs.cost(net.cpu(), shape), sbs.cost(full_precision(recipe), shape)
    return {
        "model": recipe.model.name,
        "data": recipe.data.dir,
        "images": scores.count,
        "top1": scores.top1,
        "top5": scores.top5,
        "loss": scores.loss,
        "gbops": cost.gbops,
        "bop_reduction": whole.bops / cost.bops,
        "convention": cost.convention,
        "mean_weight_bits": cost.mean_weight_bits,
        "mean_activation_bits": cost.mean_activation_bits,
        "params": cost.params,
        "bytes": cost.bytes,
    }


def find_saved(target: Path, policy: dict[str, Any] | None = None) -> Saved:
    """What lies at `target`: the newest of a run directory, or one file; `policy` overrides the one found with it."""
    file = _newest(target) if target.is_dir() else target
    if not file.is_file():
        raise UserError(f"{file} is neither a file nor a run directory")
    state = load_any(file)
    if "net" not in state:
        beside = read_json(file.parent / "policy.json")
        return Saved(file, load_weights(file), policy or beside)
    averaged = state.get("ema")
    weights = state["net"]
    if averaged is not None:
        weights = {key.removeprefix("module."): value for key, value in averaged.items() if key.startswith("module.")}
    ranks = state["norms"][-1] if "norms" in state else []  # the last are those of the averaged weights, if there are
    norms = torch.stack(ranks).double().mean(dim=0) if len(ranks) > 1 else None
    return Saved(file, weights, policy or state.get("policy"), norms)


def _network(target: Path, recipe: Recipe, policy: dict[str, Any] | None) -> tuple[Path, nn.Module]:
    if target.is_dir() or target.suffix in {".pt", ".pth"}:
        saved = find_saved(target, policy)
        net = restored(recipe, saved.weights, saved.policy)
        if saved.norms is not None:
            set_norm_statistics(net, saved.norms)
        return saved.file, net
    return target, sbs.load_exported(target, full_precision(recipe), example_input(recipe))


def _newest(folder: Path) -> Path:
    run = RunDir(folder)
    stages = [run.stages / f"{stage}.pt" for stage in _STAGES]
    checkpoints = sorted(run.checkpoints.glob("*-[0-9]*.pt"), key=lambda path: path.stem[-8:], reverse=True)
    found = next((path for path in (run.weights_path, *checkpoints, *stages) if path.is_file()), None)
    if found is None:
        raise UserError(f"{folder} holds no weights: no weights.pt, no stages/*.pt, no checkpoints/*.pt")
    return found


def _recipe(target: Path, name: str | None) -> Recipe:
    if name is not None:
        return load_recipe(name)
    for folder in (target, *target.absolute().parents):
        tree = read_json(folder / "config.json") if folder.is_dir() else None
        if tree is not None:
            return parse_recipe(tree, str(folder / "config.json"))
    raise UserError(f"{target}: no config.json there or above says which network this is; name it with --recipe")


def _words(figures: dict[str, Any]) -> str:
    return (
        f"{figures['file']}\n"
        f"  {figures['model']} on {figures['images']:,} images of {figures['data']}\n"
        f"  top-1 {figures['top1']:.2f}%, top-5 {figures['top5']:.2f}%, loss {figures['loss']:.4f}\n"
        f"  {figures['gbops']:.4f} GBOPs ({figures['convention']}, all convolution and linear layers), "
        f"{figures['bop_reduction']:.1f}x fewer than at 32/32 bits, {figures['params']:,} parameters, "
        f"{figures['bytes']:,} bytes"
    )
