"""What drives a search: a given lambda, or the controller that steers it towards budgets."""

import io
import math
from typing import Any

import pytest
import torch

import sbs
from harness.config import Recipe, load_recipe
from harness.errors import UserError
from harness.networks import full_precision, supernet
from harness.pressure import BudgetPressure, Pressure, check_budgets, pressure_of
from harness.ranks import Ranks

STEPS = 100
ALONE = Ranks(0, 1, torch.device("cpu"), "none", "process")
# ResNet-20 on 32x32 images with 10 classes: the 41.7986 GBOPs of 100 classes less 64 x 90 MACs of the classifier.
FULL_BOPS = (40_818_944 - 64 * 90) * 32 * 32


def recipe(*overrides: str) -> Recipe:
    return load_recipe("digits_resnet20", overrides)


@pytest.fixture(scope="module")
def supernets() -> sbs.SuperNet:
    made = recipe()
    return supernet(made, full_precision(made))


@pytest.fixture
def net(supernets: sbs.SuperNet) -> sbs.SuperNet:
    """All gates open, no step made."""
    with torch.no_grad():
        for bank in (supernets.weight_gates, supernets.activation_gates, supernets.channel_gates):
            bank.statistic.fill_(1.0)
            bank.thresholds.zero_()
            bank.open.fill_(1.0)
    supernets.refresh_kept()
    return supernets


def steered(net: sbs.SuperNet, *overrides: str) -> tuple[BudgetPressure, list[tuple[str, int]]]:
    notes: list[tuple[str, int]] = []
    made = pressure_of(net, recipe(*overrides), STEPS, ALONE, lambda text, step: notes.append((text, step)))
    assert isinstance(made, BudgetPressure)
    return made, notes


def test_a_given_lambda_stays_and_is_multiplied_with_log_bops(net: sbs.SuperNet):
    made = pressure_of(net, recipe("search.lambda=0.25"), STEPS, ALONE, lambda *_: None)
    assert type(made) is Pressure
    for step in (0, 1):
        assert float(made.penalty(step).detach()) == pytest.approx(0.25 * math.log(sbs.bops_of(net)), rel=1e-6)
    assert (made.finish(), made.state(), made.figures()) == ({}, {}, {})


@pytest.mark.parametrize(
    ("override", "goal"),
    [
        ("search.budget=0.03", 0.03 * FULL_BOPS),
        ("search.gbops=1.25", 1.25e9),
        ("search.snapshots=[0.05, 0.03, 0.015]", 0.015 * FULL_BOPS),
    ],
)
def test_the_course_falls_evenly_in_log_bops_and_is_there_after_seven_tenths(
    net: sbs.SuperNet, override: str, goal: float
):
    made, _ = steered(net, override)
    start, end = math.log(sbs.bops_of(net)), math.log(goal)
    assert made.course(34) == pytest.approx((start + end) / 2)
    assert made.course(0) == pytest.approx(start + (end - start) / 70)
    assert made.course(69) == made.course(99) == pytest.approx(end)


def test_lambda_of_a_few_steps_by_hand(net: sbs.SuperNet):
    """Over 100 steps a gap of g multiplies the pressure by exp(0.2 g); it counts in proportion up to g = 0.1."""
    made, _ = steered(net, "search.budget=0.03")
    magnitude = 0.01
    for step, gap in enumerate([0.05, 2.0, -0.02, -0.3]):
        found = float(made.pressure(step, torch.tensor(made.course(step) + gap, dtype=torch.float64)))
        magnitude *= math.exp(0.2 * max(-1.0, min(1.0, gap)))
        assert found == pytest.approx(magnitude * max(-1.0, min(1.0, gap / 0.1)), rel=1e-6), step
        assert made.figures() == {"search/lambda": pytest.approx(found)}
    assert found < 0, "below the course gates are to open again"


@pytest.mark.parametrize("pull", [0.3, 3.0, 30.0, 300.0])
@pytest.mark.parametrize("budget", [0.05, 0.015])
def test_the_controller_finds_the_lambda_of_networks_that_yield_differently(
    net: sbs.SuperNet, pull: float, budget: float
):
    """A made-up search: log BOPs follow lambda with delay, and the loss pulls them up the harder the lower they are."""
    made, _ = steered(net, f"search.budget={budget}")
    top = log_bops = math.log(sbs.bops_of(net))
    speed = 0.0
    for step in range(STEPS):
        pressure = float(made.pressure(step, torch.tensor(log_bops, dtype=torch.float64)))
        speed = 0.5 * speed + 0.05 * ((top - log_bops) - pull * pressure)
        log_bops = min(top, log_bops + speed)
    assert log_bops == pytest.approx(math.log(budget * FULL_BOPS), abs=0.25)


def close_bits(net: sbs.SuperNet, layers: int) -> None:
    """Weights and activations of the first searched layers to 4 bits."""
    with torch.no_grad():
        for bank in (net.weight_gates, net.activation_gates):
            bank.open[:layers, 1] = 0.0


def share(net: sbs.SuperNet, state: dict[str, Any] | None = None) -> float:
    """BOPs as `sbs.cost` counts those of the policy, by those of full precision."""
    model = full_precision(recipe())
    if state is not None:
        net = supernet(recipe(), model, weights=state)
    return sbs.cost(model, (3, 32, 32), sbs.freeze(net)).bops / FULL_BOPS


def test_each_budget_is_taken_once_in_passing_and_the_last_at_the_end(net: sbs.SuperNet):
    made, notes = steered(net, "search.snapshots=[0.05, 0.03, 0.015]")
    made.stepped(0)
    assert not notes
    close_bits(net, 7)
    assert 0.03 < share(net) < 0.05
    made.stepped(1)
    made.stepped(2)
    assert [step for _, step in notes] == [2], "after two steps, once"
    assert "budget of 0.05" in notes[0][0]
    assert 0.03 < share(net) < 0.0485, "the search goes on from where it was"
    states = made.finish()
    assert list(states) == ["0.05", "0.03"]
    for text, budget in (("0.05", 0.05), ("0.03", 0.03)):
        assert 0.97 * budget <= share(net, states[text]) <= budget
    assert 0.97 * 0.015 <= share(net) <= 0.015
    assert [step for _, step in notes] == [2, STEPS, STEPS]


def test_a_resumed_controller_is_the_same_controller(net: sbs.SuperNet):
    made, _ = steered(net, "search.snapshots=[0.05, 0.03]")
    high = torch.tensor(made.course(0) + 0.3, dtype=torch.float64)
    made.pressure(0, high)
    close_bits(net, 7)
    made.stepped(0)
    file = io.BytesIO()
    torch.save(made.state(), file)
    file.seek(0)
    again, notes = steered(net, "search.snapshots=[0.05, 0.03]")
    again.restore(torch.load(file, weights_only=True))
    assert again.figures() == made.figures()
    again.stepped(1)
    assert not notes, "the snapshot is there already"
    assert float(again.pressure(1, high)) == float(made.pressure(1, high))
    left, right = made.finish(), again.finish()
    assert left["0.05"].keys() == right["0.05"].keys()
    assert all(torch.equal(left["0.05"][name], right["0.05"][name]) for name in left["0.05"])


def test_a_budget_that_single_gates_jump_over_is_said_to_be_missed(caplog: pytest.LogCaptureFixture):
    made = recipe("search.method=sbs_prune", "search.group_size=64", "search.max_prune_share=0.5", "search.budget=0.97")
    net = supernet(made, full_precision(made))
    low, high = sbs.bops_range(net)
    assert low == high, "one group a layer: nothing may close"
    notes: list[str] = []
    with torch.no_grad():
        BudgetPressure(net, made, STEPS, ALONE, lambda text, _: notes.append(text)).finish()
    assert "landed on 1 (0 of" in notes[0]
    assert "missed, for single gates change it by more than 3%: lower search.group_size" in caplog.text


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["search.budget=0.1"], ["search.budget or search.snapshots: 0.1 of", "41.7927 GBOPs", "to 0.0625 ("]),
        (["search.budget=0.002"], ["0.002 of", "reaches from 0.00223"]),
        (["search.gbops=35"], ["search.gbops: 0.8375 of", "2.612 GBOPs)", "search.weight_bits"]),
        (["search.snapshots=[0.05, 0.03, 0.001]"], ["0.001 of full precision's"]),
        (["search.method=sbs_prune", "search.budget=0.05"], ["from 0.4093", "to 1 (41.79 GBOPs)"]),
    ],
)
def test_a_budget_out_of_reach_is_refused_with_the_reach(overrides: list[str], words: list[str]):
    with pytest.raises(UserError) as caught:
        check_budgets(recipe(*overrides))
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    "overrides",
    [
        ["search.budget=0.0625"],
        ["search.lambda=0.3"],
        ["search.snapshots=[0.05, 0.03, 0.015]"],
        ["search.method=sbs_prune", "search.budget=0.5"],
        ["search.method=uniform_4", "search.budget=0.9"],
    ],
)
def test_what_can_be_met_or_has_no_budget_passes(overrides: list[str]):
    check_budgets(recipe(*overrides))
