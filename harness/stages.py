"""One trial from start to end: pretrain -> search -> compress -> finetune -> report, resumable and cached by stage.

Every finished stage leaves stages/<stage>.pt under the key of all that it depends on. A rerun starts behind the last of
them; with a stage cache, so does another trial whose first stages are the same.
"""

import json
import logging
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

import sbs
from harness.checkpoint import State, load, load_weights, save, save_weights, to_cpu, weights_digest
from harness.config import Recipe, TrainConfig, TrialSpec, digest, identity
from harness.context import Context, Report
from harness.data import data_checksum
from harness.errors import UserError, is_user_error
from harness.loop import Job, StageLoop
from harness.provenance import record_start
from harness.ranks import arithmetic, joined, seed_step
from harness.result import build_result
from harness.run_dir import RunDir, write_json

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Outcome:
    """What a finished stage leaves: weights, the policy as a document, steps so far, seconds of each stage so far."""

    net: State
    policy: dict[str, Any] | None = None
    step: int = 0
    seq: int = 0
    timings_s: dict[str, float] = field(default_factory=dict)


def run(
    spec: TrialSpec,
    *,
    report: Report | None = None,
    device: torch.device | None = None,
    launcher: str | None = None,
) -> dict[str, Any]:
    """Run one trial on this process's ranks, or go on with it; the content of its result.json.

    `report` gets the metrics of every epoch, on every rank. Raises `Preempted` when asked to leave, `UserError` (also
    written to error.json) for what a person must mend.
    """
    folder = RunDir(spec.run_dir).create()
    done = folder.result()
    if done is not None:
        return done
    with (
        arithmetic(spec.recipe.run),
        joined(spec.recipe.run, device=device, launcher=launcher) as ranks,
        folder.lock() if ranks.main else nullcontext(),
    ):
        context = Context(spec, ranks, report)
        if ranks.main:
            write_json(folder.config_path, spec.recipe.to_dict())
            record_start(folder, launcher=ranks.launcher, world=ranks.world)
        try:
            with context.leave.signals():
                return _Trial(context).run()
        except Exception as error:
            if is_user_error(error):
                write_json(folder.error_path, {"message": str(error), "stage": context.stage})
            raise
        finally:
            context.close()


def plan(recipe: Recipe) -> tuple[str, ...]:
    """The stages that a method goes through before its report."""
    method = recipe.search.method
    if method == "full_precision":
        return ("pretrain",)
    if method.startswith("uniform_"):
        return ("pretrain", "compress", "finetune")
    return ("pretrain", "search", "compress", "finetune")


def stage_config(recipe: Recipe, stage: str) -> TrainConfig | None:
    """How a stage trains; None for one that does not. Uniform networks train as long as a search and its finetune."""
    if stage == "finetune" and recipe.search.method.startswith("uniform_"):
        return recipe.finetune.model_copy(update={"epochs": recipe.search.epochs + recipe.finetune.epochs})
    return {"pretrain": recipe.pretrain, "search": recipe.search, "finetune": recipe.finetune}.get(stage)


def stage_key(recipe: Recipe, stage: str, data_checksum: str, init: str | None = None) -> str:
    """Sixteen hex digits over all that the outcome of a stage depends on; `init` is a digest of given weights."""
    tree = identity(recipe, data_checksum)
    needed = {"model", "data", "run", "stage_format"} | ({"pretrain"} if init is None else set())
    if stage != "pretrain":
        needed.add("search")
    if stage == "finetune":
        needed.add("finetune")
    return digest({"stage": stage, "init": init} | {key: tree[key] for key in needed})


class _Trial:
    def __init__(self, context: Context) -> None:
        self.context = context
        self.recipe = context.recipe
        self.ranks = context.ranks
        self.example = context.example_input()
        self.checksum = data_checksum(self.recipe.data.dir)
        init = context.spec.init
        self.given = None if init is None else self.ranks.share(load_weights(Path(init)) if self.ranks.main else None)
        self.work: dict[str, Callable[[Outcome], Outcome]] = {
            "pretrain": self._pretrain,
            "search": self._search,
            "compress": self._compress,
            "finetune": self._finetune,
        }

    def run(self) -> dict[str, Any]:
        context, stages = self.context, plan(self.recipe)
        outcome, done = self._last_outcome(stages)
        configs = [stage_config(self.recipe, stage) for stage in stages[self.given is not None :]]
        context.total_steps = context.steps_per_epoch() * sum(config.epochs for config in configs if config)
        for stage in stages[done:]:
            context.enter(stage)
            log.info("%s: %s", context.spec.label, stage)
            outcome = self.work[stage](outcome)
            self._keep(stage, outcome)
        context.enter("report")
        return self._report(outcome)

    # Outcomes -----------------------------------------------------------------------------------------------------

    def _key(self, stage: str) -> str:
        return stage_key(self.recipe, stage, self.checksum, None if self.given is None else weights_digest(self.given))

    def _last_outcome(self, stages: tuple[str, ...]) -> tuple[Outcome, int]:
        """The outcome to start from and the number of stages that it spares."""
        found: Any = None
        if self.ranks.main:
            saved = ((self._saved(stages[done - 1]), done) for done in range(len(stages), 0, -1))
            found = next(([state, done] for state, done in saved if state is not None), None)
        found = self.ranks.share(found)
        if found is not None:
            return Outcome(**found[0]), found[1]
        return (Outcome({}), 0) if self.given is None else (Outcome(self.given), 1)

    def _saved(self, stage: str) -> State | None:
        key = self._key(stage)
        state = load(self.context.run.stages / f"{stage}.pt", key)
        if state is None and self.context.spec.stage_cache is not None:
            state = load(Path(self.context.spec.stage_cache) / f"{stage}-{key}.pt", key)
            # The records of the trial that made it are not ours.
            state = None if state is None else state | {"seq": 0}
        return state

    def _keep(self, stage: str, outcome: Outcome) -> None:
        context = self.context
        context.flush()
        if not self.ranks.main or context.checkpoints is None:
            return
        key = self._key(stage)
        paths = [context.run.stages / f"{stage}.pt"]
        if context.spec.stage_cache is not None:
            cache = Path(context.spec.stage_cache)
            cache.mkdir(parents=True, exist_ok=True)
            paths.append(cache / f"{stage}-{key}.pt")
        for path in paths:
            save(path, vars(outcome), key)
        context.record("checkpoint", 0, outcome.step, covers=outcome.seq)
        context.last_checkpoint = paths[0]
        context.checkpoints.clear(stage)

    # Stages -------------------------------------------------------------------------------------------------------

    def _pretrain(self, before: Outcome) -> Outcome:
        return self._train("pretrain", self._to_device(self._model(None)), before)

    def _search(self, before: Outcome) -> Outcome:
        search = self.recipe.search
        net = sbs.prepare(self._model(before.net), self._space(), self.example)
        self._to_device(net)
        pressure = search.lambda_ or 0.0

        def penalty(step: int) -> torch.Tensor:
            sides: tuple[Literal["weights", "activations"], ...] = ("weights", "activations")
            gradient = "joint" if search.bop_gradient == "joint" else sides[step % 2]
            return pressure * sbs.bop_penalty(net, gradient=gradient)

        return self._train(
            "search",
            net,
            before,
            prepare=lambda: sbs.calibrate(net, self._calibration()),
            penalty=penalty,
            telemetry=lambda: sbs.telemetry(net),
        )

    def _compress(self, before: Outcome) -> Outcome:
        begin_s = time.monotonic()
        self.context.rewind(before.seq, 0, before.step)
        method = self.recipe.search.method
        if method.startswith("uniform_"):
            bits = int(method.removeprefix("uniform_"))
            model = self._model(before.net)
            policy = sbs.Policy.uniform(model, self.example, bits, bits)
            net = self._to_device(sbs.compress(model, policy, example_input=self.example))
            sbs.calibrate(net, self._calibration())
        else:
            supernet = sbs.prepare(self._model(None), self._space(), self.example)
            supernet.load_state_dict(before.net)
            policy = sbs.freeze(supernet)
            net = self._to_device(sbs.compress(supernet, policy))
        scores = self.context.evaluate(net)
        seq = self.context.record("metrics", 0, before.step, scores.named("compress"))
        timings = before.timings_s | {"compress": time.monotonic() - begin_s}
        document = json.loads(json.dumps(policy.to_json()))  # as it comes back from a file: lists for tuples
        return Outcome(to_cpu(net.state_dict()), document, before.step, seq, timings)

    def _finetune(self, before: Outcome) -> Outcome:
        return self._train("finetune", self._to_device(self._saved_net(before)), before)

    def _report(self, outcome: Outcome) -> dict[str, Any]:
        context, begin_s = self.context, time.monotonic()
        context.rewind(outcome.seq, 0, outcome.step)
        net = self._to_device(self._saved_net(outcome))
        scores = context.evaluate(net)
        timings = outcome.timings_s | {"report": time.monotonic() - begin_s}
        result = build_result(context, net, self._model(None), scores, timings)
        if self.ranks.main:
            save_weights(context.run.weights_path, outcome.net)
            if outcome.policy is not None:
                write_json(context.run.policy_path, outcome.policy)
            context.record("metrics", 0, outcome.step, scores.named("final") | {"final/gbops": result["gbops"]})
            write_json(context.run.result_path, result)
        self.ranks.max(0)  # nobody leaves before the result is there
        return result

    def _train(
        self,
        stage: str,
        net: nn.Module,
        before: Outcome,
        *,
        prepare: Callable[[], None] | None = None,
        penalty: Callable[[int], torch.Tensor] | None = None,
        telemetry: Callable[[], dict[str, float]] = dict,
    ) -> Outcome:
        config = stage_config(self.recipe, stage)
        assert config is not None
        key = self._key(stage)
        state = self.context.newest_checkpoint(key, before.seq, before.step)
        if state is None and prepare is not None:
            prepare()
        teacher = self._teacher() if config.distill else None
        job = Job(stage, key, net, config, before.step, penalty, teacher, telemetry)
        loop = StageLoop(job, self.context, state)
        loop.run()
        seq = 0 if self.context.log is None else self.context.log.last_seq
        weights = to_cpu(loop.weights().state_dict())
        timings = before.timings_s | {stage: loop.elapsed_s()}
        return Outcome(weights, before.policy, before.step + loop.at.step, seq, timings)

    # Networks -----------------------------------------------------------------------------------------------------

    def _model(self, weights: State | None) -> nn.Module:
        """The full-precision network with given weights, or as the recipe starts it."""
        seed_step(self.recipe.run.seed, 0, 0)
        model = sbs.models.build(self.recipe.model.name, self.recipe.model.num_classes)
        if weights is None and self.recipe.model.weights is not None:
            weights = load_weights(Path(self.recipe.model.weights))
        if weights is not None:
            load_into(model, weights, self.recipe.model.name)
        return model

    def _saved_net(self, outcome: Outcome) -> nn.Module:
        """The network that an outcome describes: full precision, or compressed by its policy."""
        if outcome.policy is None:
            return self._model(outcome.net)
        net = sbs.compress(self._model(None), sbs.Policy.from_json(outcome.policy), example_input=self.example)
        net.load_state_dict(outcome.net)
        return net

    def _teacher(self) -> nn.Module:
        weights = self.given
        if weights is None:
            saved = self._saved("pretrain") if self.ranks.main else None
            weights = self.ranks.share(saved)["net"]
        return self._to_device(self._model(weights)).eval().requires_grad_(requires_grad=False)

    def _space(self) -> sbs.SearchSpace:
        search = self.recipe.search
        weight_bits, activation_bits = search.weight_bits, search.activation_bits
        if search.method == "sbs_prune":
            weight_bits = activation_bits = (search.prune_only_bits,)
        return sbs.SearchSpace(
            weight_bits=weight_bits,
            activation_bits=activation_bits,
            prune=search.method != "sbs_quant",
            group_size=search.group_size,
            max_prune_share=search.max_prune_share,
        )

    def _calibration(self) -> list[torch.Tensor]:
        """This rank's share of the first training batches."""
        loader = self.context.train_loader(self.recipe.search.epochs)
        return [images.clone() for images, _ in islice(loader.epoch(0), self.recipe.search.calibration_batches)]

    def _to_device(self, net: nn.Module) -> nn.Module:
        if self.recipe.run.sync_batchnorm and self.ranks.world > 1:
            net = nn.SyncBatchNorm.convert_sync_batchnorm(net)
        return net.to(self.ranks.device, memory_format=torch.channels_last)  # type: ignore[call-overload]


def load_into(model: nn.Module, weights: State, name: str) -> None:
    """Load a state dict; `UserError` naming the first keys that do not fit."""
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:400]
        raise UserError(f"the given weights do not fit model.name = {name!r}: {reason}") from None
