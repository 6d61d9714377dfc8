import pytest

from harness.config import load_recipe
from harness.tracking.record import params, target
from harness.tracking.store import _search_section


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["search.lambda=0.3"], ""),
        (["search.budget=0.05"], "budget 0.05"),
        (["search.gbops=35"], "35 GBOPs"),
        (["search.snapshots=[0.05, 0.03]"], "snapshot 0.03"),
        (["search.snapshots=[0.05, 0.03]", "search.budget=0.05"], "snapshot 0.05"),
        (["search.method=uniform_4", "search.budget=0.05"], ""),
        (["search.method=full_precision", "search.snapshots=[0.05]"], ""),
        (["search.method=policy", "search.policy=some/mine.json"], "policy mine"),
        (["search.method=policy", "search.policy=trials/other/policy.json"], "policy other"),
        (["search.method=policy", "search.policy=policy.json"], "policy policy"),
    ],
)
def test_a_budget_or_a_policy_reads_the_same_from_a_folder_and_from_a_store(overrides: list[str], words: str):
    config = load_recipe("digits_resnet20", overrides).to_dict()
    method = config["search"]["method"]
    assert target(method, config["search"]) == words
    assert target(method, _search_section(params(config))) == words


def test_runs_from_before_there_were_budgets_have_none():
    assert target("sbs", {"method": "sbs", "lambda": 0.3}) == ""
    assert target("full_precision", {"method": "full_precision", "lambda": None}) == ""
