"""What drives a search: a given lambda, or the one that leads to a budget."""

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
        for bank in supernets.banks():
            for buffer in bank.buffers():
                buffer.zero_()
            for ones in (bank.statistic, bank.open, bank.age):
                ones.fill_(1.0)
        supernets.steps_done.zero_()
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
def test_the_course_falls_evenly_in_log_bops_from_3_to_55_percent_of_the_steps(
    net: sbs.SuperNet, override: str, goal: float
):
    made, _ = steered(net, override)
    start, end = math.log(FULL_BOPS / 16), math.log(goal)  # 8 x 8 bits against 32 x 32
    course = {step: float(made.course(torch.tensor(step))) for step in (0, 3, 16, 29, 55, 56, 100)}
    quarter = (end - start) / 4
    expected = {0: start, 3: start, 16: start + quarter, 29: start + 2 * quarter, 55: end, 56: end, 100: end}
    assert course == pytest.approx(expected, rel=1e-9)


def know_gains(net: sbs.SuperNet, scale: float) -> None:
    """Gates that were tried: each gains the loss between one and some hundred times `scale`, the later the more."""
    for bank in net.banks():
        size = bank.open.numel()
        gains = scale * torch.logspace(0, 2, size).view(bank.open.shape)
        for side in (bank.slope_open, bank.slope_closed):
            side.copy_(-gains)
        for weight in (bank.weight_open, bank.weight_closed):
            weight.fill_(1.0)


def settled_log_bops(net: sbs.SuperNet, pressure: float) -> float:
    """log BOPs with the gates closed that gain less than lambda times what they cost, each found out by flipping it."""
    closing = []
    whole = math.log(sbs.bops_of(net))
    for bank in net.banks():
        gates, gains = bank.open.view(-1), -0.5 * (bank.slope_open + bank.slope_closed).view(-1)
        for place, gain in enumerate(gains.tolist()):
            gates[place] = 0.0
            if gain < pressure * (whole - math.log(sbs.bops_of(net))):
                closing.append((gates, place))
            gates[place] = 1.0
    for gates, place in closing:
        gates[place] = 0.0
    found = math.log(sbs.bops_of(net))
    for gates, place in closing:
        gates[place] = 1.0
    return found


@pytest.mark.parametrize("scale", [1e-4, 1e-2, 0.1])
@pytest.mark.parametrize("share", [0.05, 0.015])
def test_lambda_is_the_least_under_which_the_gates_would_settle_on_the_course(scale: float, share: float):
    """Whatever the loss gains by gates: between two values that are tried (16 a factor of 10) lies the jump."""
    made = recipe("search.method=sbs_quant", f"search.budget={share}")  # without channels no gate is held open
    net = supernet(made, full_precision(made))
    with torch.no_grad():
        know_gains(net, scale)
        net.steps_done.fill_(55)
        pressure = pressure_of(net, made, STEPS, ALONE, lambda *_: None)
        found = float(pressure.pressure(0))
        goal = math.log(share * FULL_BOPS)
        assert settled_log_bops(net, found * 1.0001) <= goal
        assert settled_log_bops(net, found * 10 ** (-8.1 / 127)) > goal
    assert pressure.figures() == {"search/lambda": pytest.approx(found)}


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


def test_each_budget_is_taken_when_the_course_comes_to_it_and_the_last_when_the_gates_rest(net: sbs.SuperNet):
    """The course falls by log(0.0625 / 0.015) from step 3 to step 55; log(0.0625 / 0.05) of that are 8.1 steps, and
    log(0.0625 / 0.03) are 26.7. Gates stand still after nine tenths of the steps."""
    made, notes = steered(net, "search.snapshots=[0.05, 0.03, 0.015]")
    for step in range(STEPS):
        if step == 5:
            close_bits(net, 7)
            assert 0.03 < share(net) < 0.05
        if step == 40:
            assert 0.03 < share(net) < 0.0485, "the search goes on from where it was"
        if step == 89:
            assert share(net) > 0.03, "not before the gates rest"
        made.stepped(step)
    assert [(text.split(" of full")[0], step) for text, step in notes] == [
        ("budget of 0.05", 12), ("budget of 0.03", 30), ("budget of 0.015", 90),
    ]  # fmt: skip
    assert 0.97 * 0.015 <= share(net) <= 0.015
    states = made.finish()
    assert len(notes) == 3, "nothing was left to do"
    assert list(states) == ["0.05", "0.03"]
    for text, budget in (("0.05", 0.05), ("0.03", 0.03)):
        assert 0.97 * budget <= share(net, states[text]) <= budget


def test_what_is_due_when_a_search_ends_is_done_then(net: sbs.SuperNet):
    """As in a search of so few steps that none lies between rest and end."""
    made, notes = steered(net, "search.snapshots=[0.05, 0.03]")
    states = made.finish()
    assert [step for _, step in notes] == [STEPS, STEPS]
    assert 0.97 * 0.05 <= share(net, states["0.05"]) <= 0.05
    assert 0.97 * 0.03 <= share(net) <= 0.03


def test_a_resumed_search_knows_what_was_done(net: sbs.SuperNet):
    def again(made: BudgetPressure) -> tuple[BudgetPressure, list[tuple[str, int]]]:
        file = io.BytesIO()
        torch.save(made.state(), file)
        file.seek(0)
        resumed, notes = steered(net, "search.snapshots=[0.05, 0.03]")
        resumed.restore(torch.load(file, weights_only=True))
        assert resumed.figures() == made.figures()
        return resumed, notes

    made, notes = steered(net, "search.snapshots=[0.05, 0.03]")
    know_gains(net, 0.01)
    net.steps_done.fill_(30)
    made.pressure(30)
    assert made.figures()["search/lambda"] > 0
    close_bits(net, 7)
    made.stepped(30)
    assert len(notes) == 1
    resumed, notes = again(made)
    resumed.stepped(31)
    assert not notes, "the snapshot is there already"
    assert float(resumed.pressure(31)) == float(made.pressure(31))
    resumed.stepped(89)
    assert len(notes) == 1
    resumed, notes = again(resumed)
    resumed.stepped(90)
    left, right = made.finish(), resumed.finish()
    assert not notes, "the network has landed already"
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
