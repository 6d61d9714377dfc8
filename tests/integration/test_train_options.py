"""Options of the loop, each against an independent account of what it should do."""

import json
import math
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import sbs
from harness import stages
from harness.checkpoint import load_weights, weights_digest
from harness.config import TrainConfig
from harness.context import Context
from harness.errors import UserError
from harness.loop import StageLoop
from harness.ranks import Ranks
from harness.run_dir import RunDir
from harness.step import Job
from tests.integration import tiny
from tests.integration.plain_net import PlainNet, train_plain
from tests.integration.test_train_resume import disturbed, trace

pytestmark = [pytest.mark.ffcv, pytest.mark.integration]
ALONE = Ranks(0, 1, torch.device("cpu"), "none", "process")


@pytest.fixture(scope="module", autouse=True)
def _eager() -> Iterator[None]:
    sbs.use_compiled(False)
    yield
    sbs.use_compiled(True)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_data(tmp_path_factory.mktemp("tiny"))


def weights(data: Path, run_dir: Path, **changes: Any) -> torch.Tensor:
    """All weights of a network without batch norm after two epochs."""
    return train_plain(tiny.spec(data, run_dir), changes)


def test_accumulated_parts_are_one_batch(data: Path, tmp_path: Path):
    whole = weights(data, tmp_path / "whole")
    parts = weights(data, tmp_path / "parts", accumulate=4)
    assert (whole - parts).abs().max() < 1e-6
    assert not torch.equal(whole, weights(data, tmp_path / "other", lr=0.06))


@pytest.mark.timeout(300)
def test_a_compiled_network_learns_the_same(data: Path, tmp_path: Path):
    compiled = train_plain(tiny.spec(data, tmp_path / "compiled", "run.compile=true"), {})
    assert (compiled - weights(data, tmp_path / "eager")).abs().max() < 1e-4


@pytest.mark.timeout(180)
def test_two_ranks_are_one_batch(data: Path, tmp_path: Path):
    spec = tiny.spec(data, tmp_path / "two", "run.workers=2")
    (tmp_path / "spec.json").write_text(spec.model_dump_json(by_alias=True))
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*launcher, "-m", "tests.integration.plain_net", str(tmp_path / "spec.json"), str(tmp_path / "two.pt")]
    subprocess.run(command, check=True, timeout=150)
    two = torch.load(tmp_path / "two.pt", weights_only=True)
    assert (two - weights(data, tmp_path / "one")).abs().max() < 1e-5


def test_a_clipped_step_is_no_longer_than_the_clip(data: Path, tmp_path: Path):
    plain = {"lr": 1.0, "momentum": 0.0, "weight_decay": 0.0, "schedule": "constant", "warmup_epochs": 0.0, "epochs": 1}
    torch.manual_seed(0)
    start = torch.cat([p.detach().flatten() for p in PlainNet().parameters()])
    moved = (weights(data, tmp_path, **plain, clip_norm=1e-3) - start).norm().item()
    assert 0.9e-3 < moved <= 6e-3 + 1e-6  # six steps, each of length 1e-3


def loop_of(data: Path, tmp_path: Path, teacher: nn.Module | None = None, **changes: Any) -> StageLoop:
    config = TrainConfig.model_validate({"epochs": 1, "lr": 0.1} | changes)
    context = Context(tiny.spec(data, tmp_path), ALONE)
    torch.manual_seed(0)
    return StageLoop(Job("pretrain", "key", PlainNet(), config, 0, teacher=teacher), context, None)


def test_the_loss_with_smoothing_and_distillation_by_hand(data: Path, tmp_path: Path):
    teacher = PlainNet().eval()
    loop = loop_of(data, tmp_path, teacher, label_smoothing=0.1, distill=0.25, distill_temperature=2.0)
    images, logits, labels = torch.randn(3, 3, 16, 16), torch.randn(3, 8), torch.tensor([1, 0, 7])
    expected = 0.0
    for row, taught, label in zip(logits.tolist(), teacher(images).tolist(), labels.tolist(), strict=True):
        log_p = [v - math.log(sum(math.exp(u) for u in row)) for v in row]
        targets = [0.1 / 8 + (0.9 if c == label else 0.0) for c in range(8)]
        smooth = -sum(t * lp for t, lp in zip(targets, log_p, strict=True))
        soft = [math.exp(v / 2) for v in row]
        goal = [math.exp(v / 2) for v in taught]
        kl = sum(
            g / sum(goal) * (math.log(g / sum(goal)) - math.log(s / sum(soft))) for g, s in zip(goal, soft, strict=True)
        )
        expected += (0.75 * smooth + 0.25 * 4 * kl) / 3
    assert loop.stepper.task_loss(images, logits, labels).item() == pytest.approx(expected, rel=1e-5)
    loop.context.close()


def test_a_student_that_equals_its_teacher_has_nothing_to_learn(data: Path, tmp_path: Path):
    torch.manual_seed(0)
    teacher = PlainNet().eval()
    loop = loop_of(data, tmp_path, teacher, distill=1.0, weight_decay=0.0)
    loop.run()
    loop.context.close()
    for own, other in zip(loop.job.net.parameters(), teacher.parameters(), strict=True):
        assert (own - other).abs().max() < 1e-6


def test_a_distilled_trial_runs_through_all_stages(data: Path, tmp_path: Path):
    quick = ["pretrain.epochs=1", "search.epochs=1", "finetune.epochs=1", "search.distill=0.5", "finetune.distill=0.9"]
    spec, run = tiny.spec(data, tmp_path, *quick), RunDir(tmp_path)
    assert stages.run(spec)["top1"] >= 0
    for path in (run.result_path, run.stages / "finetune.json", run.stages / "pretrain.pt"):
        path.unlink()
    with pytest.raises(UserError, match=r"the teacher is gone: .*pretrain.pt is missing or damaged. Remove .*stages"):
        stages.run(spec)


def test_half_precision_resumes_bit_for_bit_with_its_loss_scale(data: Path, tmp_path: Path):
    overrides = ["run.precision=fp16", "pretrain.epochs=1", "search.epochs=1", "finetune.epochs=1"]
    whole = tiny.spec(data, tmp_path / "whole", *overrides)
    stages.run(whole)
    broken = tiny.spec(data, tmp_path / "broken", *overrides)
    assert disturbed(broken, "step:9").returncode == -9
    newest = max((tmp_path / "broken" / "checkpoints").glob("search-*.pt"))
    assert torch.load(newest, weights_only=True)["scaler"]["scale"] > 1
    stages.run(broken)
    assert trace(RunDir(broken.run_dir)) == trace(RunDir(whole.run_dir))


def test_adamw_one_cycle_ema_and_mirror_images(data: Path, tmp_path: Path):
    overrides = [
        "pretrain.optimizer=adamw",
        "pretrain.lr=0.003",
        "pretrain.schedule=one_cycle",
        "pretrain.ema_decay=0.5",
    ]
    spec = tiny.spec(
        data, tmp_path, *overrides, "search.method=full_precision", "run.flip_tta=true", "pretrain.epochs=12"
    )
    result = stages.run(spec)
    assert result["loss"] < math.log(8) - 0.3
    outcome = torch.load(tmp_path / "stages" / "pretrain.pt", weights_only=True)
    assert weights_digest(outcome["net"]) == weights_digest(load_weights(tmp_path / "weights.pt"))


def test_the_profiler_leaves_a_trace(data: Path, tmp_path: Path):
    overrides = ["search.method=full_precision", "pretrain.epochs=1", "run.profile_steps=1"]
    stages.run(tiny.spec(data, tmp_path, *overrides))
    events = json.loads((tmp_path / "trace-pretrain.json").read_text())["traceEvents"]
    assert any("convolution" in event["name"] for event in events)
