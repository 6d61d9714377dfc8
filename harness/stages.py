"""One trial from start to end: pretrain -> search -> compress -> finetune -> report, resumable and cached by stage.

Every finished stage leaves stages/<stage>.pt under the key of all that it depends on. A rerun starts behind the last of
them; with a stage cache, so does another trial whose first stages are the same.
"""

import logging
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import nn

import sbs
from harness.arithmetic import arithmetic, autocast
from harness.checkpoint import State, load, load_weights, save, save_weights, to_cpu, weights_digest
from harness.config import TrialSpec, is_fixed
from harness.context import REAL_DATA, Context, Data, Report
from harness.errors import UserError, is_user_error
from harness.loop import StageLoop
from harness.networks import compressed, example_input, full_precision, given_policy, merged, search_space, supernet
from harness.plan import chosen_budget, plan, remark_on_gates, stage_config, stage_key
from harness.pressure import Pressure, check_budgets, pressure_of
from harness.provenance import record_start
from harness.ranks import joined
from harness.result import build_result
from harness.run_dir import RunDir, write_json
from harness.step import Job, no_remark
from sbs.layers import QuantizedLayer

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Outcome:
    """What a finished stage leaves: weights, the policy as a document, steps so far, seconds of each stage so far.

    `snapshots`: a search's networks at the budgets that it passed, by budget.
    """

    net: State
    policy: dict[str, Any] | None = None
    step: int = 0
    seq: int = 0
    timings_s: dict[str, float] = field(default_factory=dict)
    snapshots: dict[str, State] = field(default_factory=dict)


def run(
    spec: TrialSpec,
    *,
    report: Report | None = None,
    device: torch.device | None = None,
    launcher: str | None = None,
    data: Data = REAL_DATA,
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
        context: Context | None = None
        try:
            context = Context(spec, ranks, report, data)
            if ranks.main:
                write_json(folder.config_path, spec.recipe.to_dict())
                record_start(folder, launcher=ranks.launcher, world=ranks.world)
            with context.leave.signals():
                return _Trial(context).run()
        except Exception as error:
            if is_user_error(error):
                stage = "" if context is None else context.stage
                write_json(folder.error_path, {"message": str(error), "stage": stage})
                if context is not None:
                    context.send()
            raise
        finally:
            if context is not None:
                context.close()


class _Trial:
    def __init__(self, context: Context) -> None:
        self.context = context
        self.recipe = context.recipe
        self.ranks = context.ranks
        self.example = example_input(self.recipe)
        self.checksum = context.data.checksum(self.recipe.data.dir)
        init = context.spec.init
        self.given = None if init is None else self.ranks.share(load_weights(Path(init)) if self.ranks.main else None)
        self.work: dict[str, Callable[[Outcome], Outcome]] = {
            "pretrain": self._pretrain,
            "prune": self._prune,
            "search": self._search,
            "compress": self._compress,
            "finetune": self._finetune,
        }

    def run(self) -> dict[str, Any]:
        context, stages = self.context, plan(self.recipe)
        # what these refuse should not wait for the end of the pretraining, or of its first epoch
        search_space(self.recipe)
        check_budgets(self.recipe)
        if is_fixed(self.recipe.search.method):
            given_policy(self.recipe, full_precision(self.recipe))
        context.val_loader()
        outcome, done = self._last_outcome(stages)
        configs = [stage_config(self.recipe, stage) for stage in stages[self.given is not None :]]
        context.total_steps = context.steps_per_epoch() * sum(config.epochs for config in configs if config)
        for stage in stages[done:]:
            context.enter(stage)
            if self.ranks.max(context.leave.asked()):
                context.depart()  # rather than build, calibrate and compile first
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
            # Records and time of the trial that made it are not ours.
            state = None if state is None else state | {"seq": 0, "timings_s": {}}
        return state

    def _keep(self, stage: str, outcome: Outcome) -> None:
        context = self.context
        context.flush()
        if context.log is None or context.checkpoints is None:
            return
        context.log.sync()
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
        context.send()

    # Stages -------------------------------------------------------------------------------------------------------

    def _pretrain(self, before: Outcome) -> Outcome:
        return self._train("pretrain", self._to_device(full_precision(self.recipe)), before)

    def _prune(self, before: Outcome) -> Outcome:
        """The first of two searches: channels alone. Ends with the pruned network, still in full precision."""
        net = supernet(self.recipe, full_precision(self.recipe, before.net), "prune")
        after = self._train_supernet("prune", net, before)
        net.cpu().load_state_dict(after.net)
        policy = sbs.freeze(net)
        pruned = sbs.compress(net, policy)
        return replace(after, net=to_cpu(pruned.state_dict()), policy=policy.to_json())

    def _search(self, before: Outcome) -> Outcome:
        net = supernet(self.recipe, self._saved_net(before))
        return self._train_supernet("search", net, before)

    def _train_supernet(self, stage: str, net: sbs.SuperNet, before: Outcome) -> Outcome:
        self._to_device(net)
        config = stage_config(self.recipe, stage)
        assert config is not None
        steps = config.epochs * self.context.steps_per_epoch()
        pressure = pressure_of(net, self.recipe, steps, self.ranks, partial(self._note, before.step))
        return self._train(
            stage,
            net,
            before,
            prepare=lambda: self._calibrate(net),
            pressure=pressure,
            telemetry=lambda: sbs.telemetry(net),
            remark=no_remark if self.context.data.made_up else partial(remark_on_gates, self.recipe.search),
        )

    def _note(self, start: int, text: str, steps: int) -> None:
        self.context.record("event", 0, start + steps, message=text)

    def _compress(self, before: Outcome) -> Outcome:
        begin_s = time.monotonic()
        self.context.rewind(before.seq, 0, before.step)
        method = self.recipe.search.method
        if is_fixed(method):
            model = full_precision(self.recipe, before.net)
            policy = given_policy(self.recipe, model)
            net = self._to_device(sbs.compress(model, policy, example_input=self.example))
            self._calibrate(net)
        else:
            base = replace(before, net={})
            budget = chosen_budget(self.recipe.search)
            weights = before.net if budget is None else before.snapshots[str(budget)]
            searched = supernet(self.recipe, self._saved_net(base), weights=weights)
            policy = sbs.freeze(searched)
            net = self._to_device(sbs.compress(searched, policy))
            if before.policy is not None:
                policy = merged(before.policy, policy)
            self._estimate_norms(self.recipe.search.epochs, net)
        scores = self.context.evaluate(net)
        seq = self.context.record("metrics", 0, before.step, scores.named("compress"))
        timings = before.timings_s | {"compress": time.monotonic() - begin_s}
        return Outcome(to_cpu(net.state_dict()), policy.to_json(), before.step, seq, timings)

    def _finetune(self, before: Outcome) -> Outcome:
        return self._train("finetune", self._to_device(self._saved_net(before)), before)

    def _report(self, outcome: Outcome) -> dict[str, Any]:
        context, begin_s = self.context, time.monotonic()
        context.rewind(outcome.seq, 0, outcome.step)
        net = self._to_device(self._saved_net(outcome))
        scores = context.evaluate(net)
        timings = outcome.timings_s | {"report": time.monotonic() - begin_s}
        result = build_result(context, net, full_precision(self.recipe), scores, timings)
        if self.ranks.main:
            save_weights(context.run.weights_path, outcome.net)
            if outcome.policy is not None:
                if any(isinstance(module, QuantizedLayer) for module in net.modules()):
                    sbs.export(net, context.run.export_path)
                write_json(context.run.policy_path, outcome.policy)
            context.record("metrics", 0, outcome.step, scores.named("final") | {"final/gbops": result["gbops"]})
            write_json(context.run.result_path, result)
            context.send()
        self.ranks.max(0)  # nobody leaves before the result is there
        return result

    def _train(
        self,
        stage: str,
        net: nn.Module,
        before: Outcome,
        *,
        prepare: Callable[[], None] | None = None,
        pressure: Pressure | None = None,
        telemetry: Callable[[], dict[str, float]] = dict,
        remark: Callable[[int, int, dict[str, float]], str | None] = no_remark,
    ) -> Outcome:
        config = stage_config(self.recipe, stage)
        assert config is not None
        key = self._key(stage)
        state = self.context.newest_checkpoint(key, before.seq, before.step)
        begin_s = time.monotonic()
        if state is None and prepare is not None:
            prepare()
        calibration_s = time.monotonic() - begin_s
        teacher = self._teacher() if config.distill else None
        estimate_norms = partial(self._estimate_norms, config.epochs)
        job = Job(
            stage,
            key,
            net,
            config,
            before.step,
            pressure,
            teacher,
            telemetry,
            before.policy,
            estimate_norms,
            remark,
        )
        loop = StageLoop(job, self.context, state, calibration_s)
        loop.run()
        if stage == "finetune":
            estimate_norms(loop.stepper.weights())
        snapshots = {} if pressure is None else pressure.finish()
        seq = 0 if self.context.log is None else self.context.log.last_seq
        weights = to_cpu(loop.stepper.weights().state_dict())
        timings = before.timings_s | {stage: loop.elapsed_s()}
        return Outcome(weights, before.policy, before.step + loop.at.step, seq, timings, snapshots)

    # Networks -----------------------------------------------------------------------------------------------------

    def _saved_net(self, outcome: Outcome) -> nn.Module:
        """The network that an outcome describes: full precision, or compressed by its policy."""
        weights = outcome.net or None
        if outcome.policy is None:
            return full_precision(self.recipe, weights)
        return compressed(self.recipe, outcome.policy, weights)

    def _teacher(self) -> nn.Module:
        weights = self.given
        if weights is None:
            saved = self.ranks.share(self._saved("pretrain") if self.ranks.main else None)
            if saved is None:
                raise UserError(
                    f"the teacher is gone: {self.context.run.stages / 'pretrain.pt'} is missing or damaged. "
                    f"Remove {self.context.run.stages} to train the stages again, or set distill = 0"
                )
            weights = saved["net"]
        return self._to_device(full_precision(self.recipe, weights)).eval().requires_grad_(requires_grad=False)

    def _calibrate(self, net: nn.Module) -> None:
        """From this rank's share of the first training batches, in the arithmetic of the steps that follow."""
        loader = self.context.train_loader(self.recipe.search.epochs)
        batches = [images.clone() for images, _ in islice(loader.epoch(0), self.recipe.search.calibration_batches)]
        with autocast(self.recipe.run, self.ranks.device):
            sbs.calibrate(net, batches)

    def _estimate_norms(self, epochs: int, net: nn.Module) -> None:
        """Batch norms anew, from this rank's share of the first training batches of the last of a stage's `epochs`."""
        count = self.recipe.search.norm_batches
        if not count:
            return
        self.context.beat("estimating batch norms")
        batches = self.context.train_loader(epochs).epoch(max(0, epochs - 1))  # the largest images of a schedule
        with autocast(self.recipe.run, self.ranks.device):
            sbs.estimate_norms(net, (images for images, _ in islice(batches, count)))

    def _to_device(self, net: nn.Module) -> nn.Module:
        if self.recipe.run.sync_batchnorm and self.ranks.world > 1:
            net = nn.SyncBatchNorm.convert_sync_batchnorm(net)
        return net.to(self.ranks.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
