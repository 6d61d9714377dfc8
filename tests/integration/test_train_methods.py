"""Each method's own promise about what comes out, on the tiny trial."""

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import sbs
from harness import stages
from harness.checkpoint import load_weights
from harness.data import open_data
from harness.run_dir import RunDir
from tests.integration import tiny

pytestmark = [pytest.mark.ffcv, pytest.mark.integration]
QUICK = ("pretrain.epochs=1", "search.epochs=1", "finetune.epochs=1", "run.checkpoint_every_steps=null")
# Four epochs for every search: with fewer no gate moves.
EPOCHS = {"sbs": 4, "sbs_quant": 4, "sbs_prune": 4, "prune_then_quant": 8}


@pytest.fixture(scope="module", autouse=True)
def _eager():
    sbs.use_compiled(False)
    yield
    sbs.use_compiled(True)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_data(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def finished(data: Path, tmp_path_factory: pytest.TempPathFactory):
    """Result and folder of a method's quick trial, made once."""
    made: dict[str, tuple[dict[str, Any], RunDir]] = {}

    def trial(method: str) -> tuple[dict[str, Any], RunDir]:
        if method not in made:
            search = f"search.epochs={EPOCHS.get(method, 1)}"
            spec = tiny.spec(data, tmp_path_factory.mktemp(method), f"search.method={method}", *QUICK, search)
            made[method] = stages.run(spec), RunDir(spec.run_dir)
        return made[method]

    return trial


def inner(result: dict[str, Any]) -> list[dict[str, Any]]:
    """All layers but the first and the last."""
    return result["layers"][1:-1]


def searched(run: RunDir, stage: str = "search") -> list[dict[str, Any]]:
    """The records of a search, one an epoch."""
    return [r for r in run.metrics() if r["kind"] == "metrics" and r["stage"] == stage]


def stages_of(run: RunDir) -> set[str]:
    return {record["stage"] for record in run.metrics()}


def test_a_search_records_where_every_gate_stands(finished: Any):
    _, run = finished("sbs")
    epochs = searched(run)
    flips = [record["metrics"]["gates/flips"] for record in epochs]
    assert flips[-1] > 0
    steps = [after - before for before, after in itertools.pairwise([0, *flips])]
    assert [record["metrics"]["gates/flips_in_epoch"] for record in epochs] == steps
    for record in epochs:
        margins, metrics = record["margins"], record["metrics"]
        assert len(margins) == 20  # of 22 layers, all but the first and the last
        for kind in ("weight", "activation", "channel"):
            nearest = min(abs(m) for gates in margins.values() for m in gates.get(kind, ()))
            assert nearest == pytest.approx(metrics[f"gates/margin_{kind}"], rel=0.01, abs=1e-6)
        counts = [count for kinds in record["flips"].values() for gates in kinds.values() for count in gates]
        # 20 layers, each with two steps of weights and two of inputs, and 84 groups of 4 channels in 9 blocks
        assert len(counts) == 20 * 4 + 3 * (4 + 8 + 16)
        assert sum(counts) == metrics["gates/flips"]
        assert max(counts) == metrics["gates/most_flips"]
        assert metrics["gates/flips_per_gate"] == pytest.approx(sum(counts) / len(counts))
        assert 0 <= metrics["gates/undecided"] <= 1


def test_a_search_whose_gates_stand_still_says_so_once(data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture):
    spec = tiny.spec(data, tmp_path / "still", *QUICK, "search.epochs=2")
    stages.run(spec)
    said = [r for r in RunDir(spec.run_dir).metrics() if r["kind"] == "event" and r["stage"] == "search"]
    assert len(said) == 1
    assert said[0]["epoch"] == 1  # at half of the search
    assert "no gate can have moved after 6 of 12 steps" in said[0]["message"]
    assert len([line for line in caplog.messages if "no gate can have moved" in line]) == 1


def test_full_precision_is_the_reference(finished: Any):
    result, run = finished("full_precision")
    assert stages_of(run) == {"pretrain", "report"}
    assert result["bop_reduction"] == 1.0
    assert {(layer["weight_bits"], layer["activation_bits"]) for layer in result["layers"]} == {(32, 32)}
    # The reference network (32x32 images, 100 classes) has 40,818,944 MACs; at 16x16 its convolutions have a quarter,
    # the classifier 64 x 8 instead of 64 x 100.
    assert sum(layer["macs"] for layer in result["layers"]) == (40_818_944 - 6_400) // 4 + 64 * 8
    assert not run.policy_path.exists()


def test_uniform_networks_train_as_long_as_a_search_and_its_finetune(finished: Any):
    result, run = finished("uniform_4")
    assert stages_of(run) == {"pretrain", "compress", "finetune", "report"}
    assert {(layer["weight_bits"], layer["activation_bits"]) for layer in inner(result)} == {(4, 4)}
    assert (result["layers"][0]["weight_bits"], result["layers"][-1]["activation_bits"]) == (8, 8)
    assert [r["epoch"] for r in run.metrics() if r["stage"] == "finetune" and r["kind"] == "metrics"] == [1, 2]
    assert result["pruned_share"] == 0
    assert 16 < result["bop_reduction"] < 64


def test_quantise_only_keeps_every_channel(finished: Any):
    result, run = finished("sbs_quant")
    assert result["pruned_share"] == 0
    assert result["mean_weight_bits"] < 8
    assert {layer["weight_bits"] for layer in inner(result)} <= {2, 4, 8}
    assert all("gates/open_channel" not in record["metrics"] for record in searched(run))


def test_prune_only_leaves_the_bits_at_32(finished: Any):
    result, _ = finished("sbs_prune")
    assert {(layer["weight_bits"], layer["activation_bits"]) for layer in result["layers"]} == {(32, 32)}
    assert result["pruned_share"] > 0
    assert result["bop_reduction"] > 1


def test_prune_then_quantise_searches_channels_first_and_bits_after(finished: Any):
    result, run = finished("prune_then_quant")
    assert [r["stage"] for r in run.metrics() if r["kind"] == "metrics"] == [
        "pretrain", *["prune"] * 4, *["search"] * 4, "compress", "finetune", "report",
    ]  # fmt: skip
    prune, search = (searched(run, stage)[-1]["metrics"] for stage in ("prune", "search"))
    assert not any(name.startswith("gates/mean_weight") for name in prune)
    assert "gates/open_channel" not in search
    assert result["pruned_share"] > 0
    assert 2 <= result["mean_weight_bits"] < 8


@pytest.mark.parametrize("method", ["sbs", "prune_then_quant"])
def test_result_is_what_its_files_say(method: str, finished: Any, data: Path):
    result, run = finished(method)
    recipe = tiny.recipe(data)
    policy = sbs.Policy.load(run.policy_path)
    net = sbs.compress(sbs.models.build("resnet20", 8), policy, example_input=torch.zeros(1, 3, 16, 16))
    net.load_state_dict(load_weights(run.weights_path))
    net.eval()
    right = loss = count = 0.0
    with torch.no_grad():
        for images, labels in open_data(recipe.data, "val", batch_size=40, seed=0).epoch(0):
            logits = net(images)
            right += (logits.argmax(1) == labels).sum().item()
            loss += F.cross_entropy(logits, labels, reduction="sum").item()
            count += len(labels)
    assert count == 40
    assert result["top1"] == pytest.approx(100 * right / 40)
    assert result["loss"] == pytest.approx(loss / 40, rel=1e-5)
    bops = sum(layer["macs"] * layer["weight_bits"] * layer["activation_bits"] for layer in result["layers"])
    assert result["gbops"] == pytest.approx(bops / 1e9)
    assert result["params"] == sum(p.numel() for n, p in net.named_parameters() if not n.endswith("_clip"))
    assert result["stack"]["loader"].startswith("ffcv 1.")


def test_every_epoch_tells_the_figures_of_the_search(finished: Any):
    _, run = finished("sbs")
    search = next(r["metrics"] for r in run.metrics() if r["stage"] == "search" and r["kind"] == "metrics")
    for name in [
        "search/loss", "search/top1", "search/top5", "search/val_loss", "search/penalty", "search/lr", "gates/flips",
        "gates/flips_per_gate", "gates/most_flips", "gates/undecided",
        "gates/open_weight_8", "gates/open_activation_4", "gates/open_channel", "speed/images_per_s", "speed/step_s",
        "speed/data_wait_share", "speed/peak_rss_bytes", "system/cpu_percent", "system/rss_gib",
    ]:  # fmt: skip
        assert name in search


def test_every_epoch_of_a_search_tells_what_each_layer_costs(finished: Any):
    result, run = finished("sbs")
    records = [record for record in run.metrics() if record["kind"] == "metrics"]
    costs = [record["layers"] for record in searched(run)]
    assert len(costs) == 4
    assert all("layers" not in record for record in records if record["stage"] != "search")
    # the last epoch's gates are the ones that were frozen
    final = {layer["name"]: layer for layer in result["layers"]}
    for name, weight_bits, activation_bits, kept, bops in costs[-1]:
        layer = final[name]
        assert (weight_bits, activation_bits, kept) == (
            layer["weight_bits"], layer["activation_bits"], layer["kept_out"]
        )  # fmt: skip
        assert bops == layer["macs"] * weight_bits * activation_bits
    assert sum(row[-1] for row in costs[-1]) == pytest.approx(result["gbops"] * 1e9)


def test_alternating_gradient_gives_each_side_its_turn(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    asked: list[str] = []
    original = sbs.bop_penalty

    def penalty(net: Any, gradient: str = "joint") -> torch.Tensor:
        asked.append(gradient)
        return original(net, gradient=gradient)

    monkeypatch.setattr(sbs, "bop_penalty", penalty)
    stages.run(tiny.spec(data, tmp_path, "search.bop_gradient=alternate", *QUICK))
    assert asked == ["weights", "activations"] * 3
    asked.clear()
    stages.run(tiny.spec(data, tmp_path / "joint", *QUICK))
    assert asked == ["joint"] * 6
