"""A trial's identity: the key that says whether two recipes are due the same result, and its name. Torch-free."""

import hashlib
import json
from pathlib import Path
from typing import Any

from harness.config import DRIVES, Recipe, SearchConfig, is_fixed, searches
from harness.errors import require_file
from harness.settings import STAGE_FORMAT

# What a method does not look at stays out of its identity, so that an override of it does not make a new trial.
_QUANT_KEYS = {"weight_bits", "activation_bits", "bop_gradient"}
_PRUNE_KEYS = {"group_size", "max_prune_share"}
_BASELINE_SEARCH_KEYS = {"method", "epochs", "calibration_batches", "norm_batches"}
_WEIGHTS_REMEDY = "Give a state dict saved by torch.save, or leave the key out."
_NEUTRAL_DATA_KEYS = {"source", "dir", "workers", "memory"}  # the checksum says what the images are
# These change where or how safely a trial runs, not what comes out.
_NEUTRAL_RUN_KEYS = {
    "cpus_per_worker", "checkpoint_every_s", "checkpoint_every_steps", "keep_checkpoints", "max_restarts",
    "stall_limit_s", "profile_steps", "remote", "cuda_graph",
}  # fmt: skip


def identity(recipe: Recipe, data_checksum: str) -> dict[str, Any]:
    """The part of a recipe that decides a trial's result: no paths, no storage, nothing its method ignores."""
    tree = recipe.to_dict()
    method = recipe.search.method
    if method == "full_precision":
        tree["search"] = {"method": method}
        del tree["finetune"]
    elif is_fixed(method):
        tree["search"] = {key: tree["search"][key] for key in _BASELINE_SEARCH_KEYS}
        if recipe.search.policy is not None:
            tree["search"]["policy"] = policy_digest(recipe.search)
    else:
        ignored = {"sbs_prune": _QUANT_KEYS, "sbs_quant": _PRUNE_KEYS | {"prune_only_bits"}, "sbs": {"prune_only_bits"}}
        tree["search"] = {k: v for k, v in tree["search"].items() if k not in ignored.get(method, set())}
        tree["search"] = _named_drive(tree["search"])
    if recipe.pretrain.ema_decay is not None:  # batch norms of averaged weights are estimated anew
        tree["pretrain"]["norm_batches"] = recipe.search.norm_batches
    tree["run"] = {k: v for k, v in tree["run"].items() if k not in _NEUTRAL_RUN_KEYS}
    tree["data"] = {k: v for k, v in tree["data"].items() if k not in _NEUTRAL_DATA_KEYS} | {"checksum": data_checksum}
    tree["model"]["weights"] = _digest_of_file(recipe.model.weights, "model.weights", _WEIGHTS_REMEDY)
    tree["stage_format"] = STAGE_FORMAT
    return tree


def _named_drive(search: dict[str, Any]) -> dict[str, Any]:
    """Of what can drive a search only what does; the last snapshot is meant where none is named."""
    if search["snapshots"] and search["budget"] is None:
        search = search | {"budget": search["snapshots"][-1]}
    idle = {key for group in DRIVES for key in group if search[key.removeprefix("search.")] in (None, [])}
    return {key: value for key, value in search.items() if f"search.{key}" not in idle}


def trial_key(recipe: Recipe, data_checksum: str) -> str:
    """Sixteen hex digits that name a trial: equal if and only if the same result is due."""
    return digest(identity(recipe, data_checksum))


def digest(tree: Any) -> str:
    """Sixteen hex digits over plain data, independent of the order of its keys."""
    return hashlib.sha256(json.dumps(tree, sort_keys=True, separators=(",", ":")).encode()).hexdigest()[:16]


def policy_digest(search: SearchConfig) -> str | None:
    """SHA-256 of the policy's file that method `policy` trains; `UserError` if there is none."""
    return _digest_of_file(search.policy, "search.policy", "Give the policy.json of a trial, or one in its format.")


def trial_label(recipe: Recipe) -> str:
    """A short name for people and folders, e.g. `resnet20-sbs-lambda0.3-seed0`."""
    method = recipe.search.method
    drive = f"-{drive_label(recipe.search)}" if searches(method) else ""
    if method == "policy":
        drive = f"-{str(policy_digest(recipe.search))[:6]}"
    return f"{recipe.model.name}-{method}{drive}-seed{recipe.run.seed}"


def drive_label(search: SearchConfig) -> str:
    """What drives a search, in a word: `lambda0.3`, `budget0.05`, `gbops35`; snapshots are told from lone budgets."""
    if search.lambda_ is not None:
        return f"lambda{search.lambda_:g}"
    if search.gbops is not None:
        return f"gbops{search.gbops:g}"
    return f"{'snapshot' if search.snapshots else 'budget'}{search.budget or search.snapshots[-1]:g}"


def _digest_of_file(name: str | None, key: str, remedy: str) -> str | None:
    if name is None:
        return None
    with require_file(Path(name), key, remedy).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
