"""Policies in a sweep: which trials follow from them, what they are called, what is refused."""

from pathlib import Path

import pytest
import torch

import sbs
from harness.config import TrialSpec
from harness.errors import UserError
from harness.identity import policy_digest
from sweeps import driver
from sweeps.plan import Plan
from tests.unit.sweeps.test_plan import claim, planner


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    """Two policies of ResNet-20 and one of ResNet-32."""
    made = []
    for name, model, bits in (("a", "resnet20", 4), ("b", "resnet20", 2), ("other", "resnet32", 4)):
        policy = sbs.Policy.uniform(sbs.models.build(model, 10), torch.zeros(1, 3, 32, 32), bits, bits)
        made.append(tmp_path / f"{name}.json")
        policy.save(made[-1])
    return made


def policies(plan: Plan) -> list[str | None]:
    return [spec.recipe.search.policy for spec in plan.rest if spec.recipe.search.method == "policy"]


def test_a_policy_is_trained_from_the_full_precision_network_of_the_sweep(tmp_path: Path, files: list[Path]):
    made = planner(tmp_path, methods=("policy",), axes={}, set={"search.policy": str(files[0])})
    plan = made.plan()
    (full,), (spec,) = plan.first, plan.rest
    assert full.recipe.search.policy is None, "which every process that reads it would refuse"
    assert full.key == planner(tmp_path).plan().first[0].key
    assert spec.init == f"{full.run_dir}/weights.pt"
    assert spec.label == f"resnet20-policy-{policy_digest(spec.recipe.search)[:6]}-seed0"
    assert [TrialSpec.model_validate(each.model_dump(by_alias=True)) for each in plan.trials] == [full, spec]
    driver.check_policies(plan)
    claim(made)


def test_policies_are_an_axis_that_other_methods_do_not_have(tmp_path: Path, files: list[Path]):
    axes = {"search.policy": [str(file) for file in files[:2]], "search.lambda": [0.1, 0.2]}
    plan = planner(tmp_path, methods=("sbs", "policy", "uniform_4"), axes=axes).plan()
    assert policies(plan) == [str(file) for file in files[:2]]
    assert [spec.recipe.search.lambda_ for spec in plan.rest if spec.recipe.search.method == "sbs"] == [0.1, 0.2]
    assert len(plan.rest) == 2 + 2 + 1
    labels = [spec.label for spec in plan.rest]
    assert len(set(labels)) == len(labels)
    assert not [label for label in labels if "json" in label or str(tmp_path) in label]
    assert "resnet20-sbs-lambda0.1-seed0" in labels


def test_a_policy_comes_from_the_command_line_and_is_absolute_for_other_processes(
    tmp_path: Path, files: list[Path], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    plan = planner(tmp_path, ("search.policy=b.json",), methods=("policy", "sbs")).plan()
    assert policies(plan) == [str(files[1])]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"methods": ("policy",)}, ["point (search.lambda = 0.0, search.method = 'policy'", "`policy` and `method"]),
        ({"set": {"search.policy": "a.json"}}, ["`policy` and `method = 'policy'` go together"]),
        ({"methods": ("policy",), "set": {"search.policy": "no.json"}}, ["search.policy not found: ", "no.json"]),
    ],
)
def test_half_a_policy_is_refused(tmp_path: Path, changes: dict[str, object], words: list[str]):
    with pytest.raises(UserError) as caught:
        planner(tmp_path, **changes).plan()
    for word in words:
        assert word in str(caught.value)


def test_a_policy_of_another_network_is_refused_before_anything_trains(tmp_path: Path, files: list[Path]):
    plan = planner(tmp_path, methods=("policy",), axes={"search.policy": [str(file) for file in files]}).plan()
    with pytest.raises(UserError, match=r"search\.policy = '.*other\.json' does not fit 'resnet20': .*another network"):
        driver.check_policies(plan)
