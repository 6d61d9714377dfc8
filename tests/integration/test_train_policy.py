"""Method `policy`: a policy that a person wrote is trained as long as others search and finetune."""

import json
import runpy
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

import sbs
from harness.errors import UserError
from harness.run_dir import RunDir
from harness.train_cli import train
from tests.integration import tiny

pytestmark = [pytest.mark.ffcv, pytest.mark.integration]
QUICK = ("pretrain.epochs=1", "search.epochs=2", "finetune.epochs=1", "search.method=policy")
KEPT = [0, 1, 2, 5]


def written(model: str = "resnet20") -> dict[str, Any]:
    """Bits of a person's choice: 4 for weights, 2 for inputs, another choice and four channels for one layer.

    Its names are those of a CIFAR ResNet: three layers of three (or five) blocks, and two shortcuts.
    """
    blocks = {"resnet20": 3, "resnet32": 5}[model]
    names = [f"layer{n}.{b}.conv{c}" for n in (1, 2, 3) for b in range(blocks) for c in (1, 2)]
    names += [f"layer{n}.0.downsample.0" for n in (2, 3)]
    layers: list[dict[str, Any]] = [{"name": name, "weight_bits": 4, "activation_bits": 2} for name in names]
    layers[0] |= {"weight_bits": 8, "kept": KEPT}
    edges = [{"name": name, "weight_bits": 8, "activation_bits": 8} for name in ("conv1", "fc")]
    document = {"format": "sbs-policy", "version": 1, "model": "mine", "input_shape": [3, 16, 16]}
    return document | {"layers": [edges[0], *layers, edges[1]]}


@pytest.fixture(scope="module", autouse=True)
def _eager():
    sbs.use_compiled(False)
    yield
    sbs.use_compiled(True)


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.recipe_file(tiny.write_data(tmp_path_factory.mktemp("tiny")))


def test_a_policy_by_hand_becomes_a_trained_network(recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    policy = tmp_path / "mine.json"
    policy.write_text(json.dumps(written()))
    sets = [part for override in (*QUICK, f"search.policy={policy}") for part in ("--set", override)]
    command = ["train", str(recipe), *sets, "--run-dir", str(tmp_path / "run")]
    monkeypatch.setattr(sys, "argv", ["python -m harness", *command])
    with suppress(SystemExit):  # in this process, where kernels are not compiled
        runpy.run_module("harness", run_name="__main__")
    run = RunDir(tmp_path / "run")
    result = run.result()
    assert result is not None
    assert result["label"].startswith("resnet20-policy-")
    assert (result["method"], result["lambda"]) == ("policy", None)
    bits = {layer["name"]: (layer["weight_bits"], layer["activation_bits"]) for layer in result["layers"]}
    assert bits == {layer["name"]: (layer["weight_bits"], layer["activation_bits"]) for layer in written()["layers"]}
    (pruned,) = (layer["name"] for layer in result["layers"] if layer["kept_out"] != layer["out_channels"])
    assert pruned == "layer1.0.conv1"
    assert sbs.Policy.load(run.policy_path) == sbs.Policy.from_json(written())
    epochs = [(r["stage"], r["epoch"]) for r in run.metrics() if r["kind"] == "metrics"]
    # three epochs of finetuning: two in place of the search's, and its own
    finetuned = [("finetune", epoch) for epoch in (1, 2, 3)]
    assert epochs == [("pretrain", 1), ("compress", 0), *finetuned, ("report", 0)]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, ["search.policy not found: ", "policy.json. Give the policy.json of a trial"]),
        ("{half", ["search.policy = '", "policy.json: not JSON"]),
        ("[1]", ["search.policy = '", "not a policy"]),
        (json.dumps(written("resnet32")), ["does not fit 'resnet20'", "another network", "layer1.3.conv1"]),
    ],
)
def test_a_file_that_is_no_policy_of_the_network_is_refused_before_any_training(
    content: str | None, words: list[str], recipe: Path, tmp_path: Path
):
    policy, run = tmp_path / "policy.json", RunDir(tmp_path / "run")
    if content is not None:
        policy.write_text(content)
    with pytest.raises(UserError) as caught:
        train(str(recipe), [*QUICK, f"search.policy={policy}"], run.path, init=None, ray=False, dry_run=False)
    for word in words:
        assert word in str(caught.value)
    assert not run.metrics()
