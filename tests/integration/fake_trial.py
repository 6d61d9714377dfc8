"""A trial that writes what a real one writes, without training: scheduling, tracking and tables are tested with it.

`python -m tests.integration.fake_trial SPACE OUT` runs a sweep of such trials through the real Ray Tune pipeline.
A trial looks at files in the OUT folder: `hold` (work until it is gone), `fail-<label>`, `crash-<label>`.
"""

import os
import sys
import time
from pathlib import Path

from harness.config import TrialSpec
from harness.errors import Preempted, UserError, run_cli
from harness.plan import budgets, takes_budget
from harness.run_dir import MetricsLog, RunDir, write_json

LAYERS = ("conv1", "layer1.0.conv1", "fc")


def expected(spec: TrialSpec) -> dict:
    """The result of a trial as a function of its recipe alone: more lambda, fewer BOPs, a little less accuracy.

    A budget is met to the last bit, in a network of 40 GBOPs.
    """
    search = spec.recipe.search
    strength = search.lambda_ or 0.0
    bits = {"full_precision": 32.0, "uniform_8": 8.0, "uniform_4": 4.0, "uniform_2": 2.0}.get(search.method)
    if bits is None and takes_budget(search):
        share = search.budget or budgets(search, 40e9)[-1]
        bits, strength = 32.0 * share**0.5, 0.1 / share
    bits = bits if bits is not None else 2.0 + 6.0 / (1.0 + 10.0 * strength)
    gbops = 40.0 * (bits / 32.0) ** 2
    layers = [
        {
            "name": name, "kind": "conv", "weight_bits": round(bits), "activation_bits": round(bits), "in_channels": 16,
            "out_channels": 16, "kept_in": 16, "kept_out": 12, "macs": 1000, "bops": 1000 * bits * bits, "params": 10,
            "bytes": 10,
        }
        for name in LAYERS
    ]  # fmt: skip
    return {
        "schema": 1, "key": spec.key, "label": spec.label, "model": spec.recipe.model.name,
        "data": spec.recipe.data.source,
        "seed": spec.recipe.run.seed, "method": search.method, "lambda": search.lambda_,
        "top1": 98 - 2 * strength - (32 - bits) / 100 - 0.1 * spec.recipe.run.seed, "top5": 100.0, "loss": 0.125,
        "gbops": gbops, "bop_reduction": 40.0 / gbops, "mean_weight_bits": bits, "mean_activation_bits": bits,
        "pruned_share": strength / 10.0, "params": 1000, "bytes": 4000, "convention": "mac_product", "layers": layers,
        "timings_s": {"pretrain": 0.01, "search": 0.02},
        "stack": {"loader": "none", "backend": "none", "world_size": 1, "launcher": "fake 0"},
    }  # fmt: skip


def write_trial(spec: TrialSpec, *, epochs: int = 3, finish: bool = True, time_s: float = 1.7e9) -> RunDir:
    """Fill a run directory as a trial would; one checkpoint after every epoch."""
    run = RunDir(spec.run_dir).create()
    write_json(run.config_path, spec.recipe.to_dict())
    write_json(run.provenance_path, {"starts": [{"time": time_s, "commit": "0" * 40, "host": "fake"}]})
    records = []
    for epoch in range(1, epochs + 1):
        seq = 2 * epoch - 1
        base = {"time": time_s + epoch, "stage": "search", "epoch": epoch, "step": 10 * epoch}
        metrics = {"search/loss": 1.0 / epoch, "search/top1": 90.0 + epoch}
        layers = [[name, 8, 8, 16, 64_000.0 / epoch] for name in LAYERS]
        records += [{"seq": seq, **base, "kind": "metrics", "metrics": metrics, "layers": layers}]
        records += [{"seq": seq + 1, **base, "kind": "checkpoint", "metrics": {}, "covers": seq}]
    import json

    run.metrics_path.write_text("".join(json.dumps(record) + "\n" for record in records))
    if finish:
        write_json(run.policy_path, {"schema": 1, "layers": []})
        run.weights_path.write_bytes(b"weights")
        write_json(run.result_path, expected(spec))
    return run


def trial(config: dict) -> dict:
    """What `sweeps.trial.run_trial` is replaced by."""
    spec = TrialSpec.model_validate(config["spec"])
    if Path(config["stop_file"]).exists():
        return {"ended": "stopped", "wall_s": 0.0}
    run = RunDir(spec.run_dir).create()
    with (run.path / "lives").open("a") as file:
        file.write(f"{os.getpid()}\n")
    switches = Path(config["stop_file"]).parent.parent
    log = MetricsLog(run)
    write_json(run.config_path, spec.recipe.to_dict())
    log.append("event", "search", 0, 0, {})
    try:
        if (switches / f"fail-{spec.label}").exists():
            raise UserError(f"{spec.label} was told to fail")
        if (switches / f"crash-{spec.label}").exists():
            raise RuntimeError(f"{spec.label} was told to crash")
        deadline = time.monotonic() + 60
        if config["reports"]:
            from ray import tune

            for epoch in range(1, 4):
                tune.report({"epochs_done": epoch, "top1": expected(spec)["top1"]})
        while (switches / "hold").exists() and time.monotonic() < deadline:
            time.sleep(0.05)
            if run.stop_requested():
                (run.path / "checkpointed").touch()
                raise Preempted("left")
    except Preempted:
        return {"ended": "stopped", "wall_s": 0.0}
    except UserError as error:
        write_json(run.error_path, {"message": str(error), "stage": "search"})
        return {"ended": "failed", "wall_s": 0.0}
    write_trial(spec)
    return {"ended": "finished", "wall_s": 0.1}


def main() -> None:
    """Run a sweep of fake trials; leaves with its status."""
    from sweeps import driver
    from sweeps.space import base_recipe, load_space

    space = load_space(sys.argv[1])
    out = Path(sys.argv[2])
    sys.exit(driver.run(space, base_recipe(space), out, lambda line: print(line, flush=True), trial=trial))


if __name__ == "__main__":
    run_cli(main)
