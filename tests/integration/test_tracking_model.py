"""The compressed network as an MLflow model: loaded from a real store, it computes what the trial computed."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import sbs
from harness.checkpoint import save_weights
from harness.networks import compressed
from harness.run_dir import RunDir, write_json
from harness.tracking import model
from harness.tracking.copying import is_sent, sync_sweep, sync_trial
from harness.tracking.mirror import Mirror
from tests.integration.fake_trial import write_trial
from tests.integration.mlflow_stores import PLACE, contents, spec, sqlite_store

pytestmark = [pytest.mark.integration, pytest.mark.timeout(400)]

LOAD = """
import sys, mlflow, torch
mlflow.set_tracking_uri(sys.argv[1])
net = mlflow.pytorch.load_model(f"runs:/{sys.argv[2]}/model")
images = torch.load(sys.argv[3], weights_only=True)
served = mlflow.pyfunc.load_model(f"runs:/{sys.argv[2]}/model").predict(images.numpy())
assert "sbs" not in sys.modules and "harness" not in sys.modules
torch.save({"net": net(images), "served": torch.from_numpy(served)}, sys.argv[4])
"""


def trial_with_a_network(tmp_path: Path) -> tuple[RunDir, torch.nn.Module]:
    """A finished trial's directory with a real compressed network, some of its channels pruned."""
    torch.manual_seed(0)
    made = spec(tmp_path)
    image = torch.randn(4, 3, 32, 32)
    net = sbs.models.build("resnet20", 10)
    policy = sbs.Policy.uniform(net, image, 4, 2)
    layers = [
        sbs.LayerPolicy(each.name, each.weight_bits, each.activation_bits, tuple(range(5)) if "0.conv1" in each.name
                        else None)
        for each in policy.layers
    ]  # fmt: skip
    document = sbs.Policy(policy.model, policy.input_shape, tuple(layers)).to_json()
    small = compressed(made.recipe, document)
    sbs.calibrate(small, [image])
    run = write_trial(made)
    write_json(run.policy_path, document)
    save_weights(run.weights_path, small.state_dict())
    return run, small.eval()


def test_the_model_loads_from_the_store_without_us_and_is_made_once(tmp_path: Path):
    run, net = trial_with_a_network(tmp_path)
    store = sqlite_store(tmp_path / "store")
    with Mirror(store, PLACE, poll_s=0.1) as mirror:
        mirror.ended(run, "FINISHED")
        assert mirror.close(240.0) is None
    assert is_sent(store, run)
    found = contents(store)["trial0"]
    assert (found["status"], "model" in found["files"]) == ("FINISHED", True)
    experiment = store.client.get_experiment_by_name("exp").experiment_id
    (info,) = store.client.search_runs([experiment], "tags.`harness.role` = 'trial'")
    images = torch.randn(7, 3, 32, 32)
    torch.save(images, tmp_path / "images.pt")
    command = [sys.executable, "-c", LOAD, store.uri, info.info.run_id, tmp_path / "images.pt", tmp_path / "out.pt"]
    # MLflow's own refusal of pickles is on, and no package of ours is to be found
    alone = os.environ | {"MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false", "OMP_NUM_THREADS": "1"}
    subprocess.run(command, check=True, cwd=tmp_path, env=alone)
    loaded = torch.load(tmp_path / "out.pt", weights_only=True)
    with torch.no_grad():
        expected = net(images)
    assert torch.equal(loaded["net"], expected)
    assert torch.equal(loaded["served"], expected)
    first = (run.path / "model" / "MLmodel").read_text()
    sync_trial(sqlite_store(tmp_path / "other"), run)
    assert (run.path / "model" / "MLmodel").read_text() == first
    assert contents(sqlite_store(tmp_path / "other"))["trial0"]["files"] == found["files"]
    model.make(run)  # as another process might, which began before the first was done
    assert (model.state(run), list(run.path.glob(".model.*"))) == ("ready", [])


def test_a_network_that_cannot_be_made_keeps_nothing_waiting(tmp_path: Path):
    bad, _ = trial_with_a_network(tmp_path)
    bad.weights_path.write_bytes(b"not weights")
    good = write_trial(spec(tmp_path, 1))
    store = sqlite_store(tmp_path / "store")
    assert sync_sweep(store, tmp_path / "runs" / "exp") == 2
    assert (model.state(bad), model.state(good)) == ("failed", "none")
    found = contents(store)
    assert [found[name]["status"] for name in ("trial0", "trial1")] == ["FINISHED", "FINISHED"]
    assert "weights.pt" in found["trial0"]["tags"]["harness.no_model"]
    assert is_sent(store, bad)


def test_a_child_that_never_ends_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    run, _ = trial_with_a_network(tmp_path)
    monkeypatch.setattr(model, "LIMIT_S", 0.0)
    model.Maker().finish([run])
    assert model.state(run) == "failed"
    assert model.failure(run) == "it took longer than 0 s"
