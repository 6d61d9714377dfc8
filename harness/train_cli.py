"""The work of `python -m harness train`."""

import os
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import FrameType
from typing import Any

from harness.config import Recipe, TrialSpec, load_recipe
from harness.data import ensure
from harness.errors import UserError
from harness.identity import trial_key, trial_label
from harness.plan import plan
from harness.run_dir import RunDir, read_json, write_json
from harness.settings import DEFAULT_RUNS_DIR, LEAVE_SIGNALS, LONE_EXPERIMENT


def train(
    recipe_name: str, overrides: Sequence[str], run_dir: Path | None, *, init: Path | None, ray: bool, dry_run: bool
) -> None:
    """Train one recipe in this process, on torchrun's ranks, or with Ray Train; print where it ended."""
    if dry_run:
        from harness.dry_run import dry_run as try_out

        result = try_out(with_init(load_recipe(recipe_name, overrides), init), init)
        unused = [option for option, given in (("--run-dir", run_dir is not None), ("--ray", ray)) if given]
        print(summary(result, "dry run: the figures mean nothing" + _no_effect(unused)))
        return
    main_rank = os.environ.get("RANK", "0") == "0"
    if not ray:
        # The identity of a trial holds the number of ranks that it really has.
        overrides = [*overrides, f"run.workers={os.environ.get('WORLD_SIZE', '1')}"]
    spec = make_spec(load_recipe(recipe_name, overrides), run_dir, init)
    folder = RunDir(spec.run_dir)
    _check_free(folder, spec)
    folder.create()
    if main_rank:
        folder.clear_stop()
        folder.clear_error()
        _name(folder, spec)
    with _shown(folder, spec.label) if main_rank else nullcontext():
        result = _on_ray(spec) if ray else _here(spec)
    if main_rank:
        print(summary(result, *from_cache(spec, result), spec.run_dir))


def _no_effect(options: Sequence[str]) -> str:
    return f"; {' and '.join(options)} had no effect" if options else ""


def _check_free(folder: RunDir, spec: TrialSpec) -> None:
    """Raise `UserError` for a folder of another trial, finished or a sweep's: figures would pass for those of this."""
    told = read_json(folder.path / "trial.json") or {}
    other = folder.result() or (told if "sweep" in told else None)
    if other is not None and other["key"] != spec.key:
        raise UserError(
            f"{folder.path} belongs to another trial, {other['label']} (key {other['key'][:8]}): its settings, data, "
            f"given weights or number of ranks are not those of this one (key {spec.key[:8]}); give another --run-dir"
        )


def _name(folder: RunDir, spec: TrialSpec) -> None:
    """Tell `harness sync` who an unfinished run is; a sweep's trial that runs alone stays the sweep's."""
    path = folder.path / "trial.json"
    if folder.result() is None and "sweep" not in (read_json(path) or {}):
        write_json(path, {"key": spec.key, "label": spec.label, "experiment": LONE_EXPERIMENT})


def _here(spec: TrialSpec) -> dict[str, Any]:
    from harness.stages import run

    return run(spec)


def _on_ray(spec: TrialSpec) -> dict[str, Any]:
    from harness.ray_cluster import joined
    from harness.ray_worker import fit

    def pass_on(number: int, frame: FrameType | None) -> None:  # noqa: ARG001 - a signal handler's signature
        RunDir(spec.run_dir).request_stop()

    with joined(None):
        for number in LEAVE_SIGNALS:  # after joined(): Ray takes SIGTERM for itself
            signal.signal(number, pass_on)
        return fit(spec, inside_tune=False)


@contextmanager
def _shown(folder: RunDir, label: str) -> Iterator[None]:
    from harness.progress import Board

    with Board(1, lone=True) as board:
        board.began([(folder, label)])
        yield


def make_spec(recipe: Recipe, run_dir: Path | None = None, init: Path | None = None) -> TrialSpec:
    """The trial of a recipe, its data written if need be; stages are shared among the runs of one folder.

    `init`: weights that take the place of the pretraining; their content is part of the identity.
    """
    recipe = with_init(recipe, init)
    checksum = ensure(recipe.data.source, recipe.data.dir)
    key, label = trial_key(recipe, checksum), trial_label(recipe)
    folder = run_dir or Path(DEFAULT_RUNS_DIR) / f"{label}-{key[:8]}"
    return TrialSpec(
        recipe=recipe,
        key=key,
        label=label,
        run_dir=str(folder.absolute()),
        init=None if init is None else str(init.absolute()),
        stage_cache=str(folder.absolute().parent / "stages"),
    )


def with_init(recipe: Recipe, init: Path | None) -> Recipe:
    """The recipe with the weights to search from as those of its model, which makes them part of its identity."""
    if init is None:
        return recipe
    return recipe.model_copy(update={"model": recipe.model.model_copy(update={"weights": str(init.absolute())})})


def from_cache(spec: TrialSpec, result: dict[str, Any]) -> list[str]:
    """A line that names the stages which this run did not train itself, if there are any.

    A stage found in the stage cache took this run no time, so that `timings_s` does not name it. Nor does it name one
    that was left out for given weights, as a sweep's trial has them: of such a trial there is no cache here.
    """
    own = plan(spec.recipe)[spec.init is not None :]
    cached = {path.name.split("-")[0] for path in Path(spec.stage_cache or "").glob("*-*.pt")}
    found = [stage for stage in own if stage not in result["timings_s"] and stage in cached]
    return found and [f"{', '.join(found)}: taken from {spec.stage_cache} (trained before with the same settings)"]


def summary(result: dict[str, Any], *remarks: str) -> str:
    """The figures of a result in a few lines, then the remarks, a line each."""
    seconds = ", ".join(f"{stage} {value:.1f} s" for stage, value in result["timings_s"].items())
    return (
        f"{result['label']}: top-1 {result['top1']:.2f}%, top-5 {result['top5']:.2f}%, loss {result['loss']:.4f}\n"
        f"  {result['gbops']:.4f} GBOPs ({result['convention']}, all convolution and linear layers), "
        f"{result['bop_reduction']:.1f}x fewer than at 32/32 bits\n"
        f"  mean bits {result['mean_weight_bits']:.2f} weights / {result['mean_activation_bits']:.2f} activations, "
        f"{100 * result['pruned_share']:.1f}% of channels pruned, {result['params']:,} parameters\n"
        f"  {seconds}" + "".join(f"\n  {remark}" for remark in remarks)
    )
