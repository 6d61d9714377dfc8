"""`make bench` itself: its statistics, its verdicts, its exit status."""

import math
import random
import types
from collections.abc import Callable, Iterator

import pytest

from tests.benchmarks import __main__ as bench
from tests.benchmarks.measure import NotHereError, Row, estimate, ratio


@pytest.mark.parametrize(("repeats", "outside"), [(5, 0), (7, 0), (8, 0), (9, 1), (11, 1), (12, 2), (17, 4), (20, 5)])
def test_interval_is_the_published_one(repeats: int, outside: int) -> None:
    # Ranks of a median's 95% interval, as in tables of the sign test (critical values at 5%, two-sided).
    found = estimate(range(repeats))
    assert (found.low, found.high) == (outside, repeats - 1 - outside)
    assert found.value == (repeats - 1) / 2


def test_interval_covers_the_median_as_often_as_it_says() -> None:
    draw = random.Random(1)
    inside = 0
    for _ in range(2000):
        found = estimate([draw.expovariate(1.0) for _ in range(9)])
        inside += found.low <= math.log(2) <= found.high
    assert 0.945 < inside / 2000 < 0.98  # 96.1% exactly, four standard errors either way


def test_ratio_is_paired_and_swaps_the_order(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = 0.0
    calls: list[str] = []

    def worker(name: str, cost: float) -> Callable[[], None]:
        def work() -> None:
            nonlocal clock
            calls.append(name)
            # The machine gets slower and slower: unpaired times would differ by far more than the ratio.
            clock += cost * 1.1 ** ((len(calls) - 1) // 2)

        return work

    monkeypatch.setattr("time.perf_counter", lambda: clock)
    found = ratio(worker("a", 3.0), worker("b", 2.0), repeats=7, warmup=1)
    assert calls == ["a", "b"] + ["a", "b", "b", "a"] * 3 + ["a", "b"]
    assert found.value == pytest.approx(1.5)
    assert found.repeats == 7


@pytest.mark.parametrize(
    ("value", "must", "at_least", "verdict"),
    [
        (1.0, 1.0, False, "MET"),
        (1.1, 1.0, False, "MISS"),
        (97.0, 97.0, True, "MET"),
        (96.9, 97.0, True, "MISS"),
        (math.nan, 1.0, False, "MISS"),
    ],
)
def test_verdict(value: float, must: float, at_least: bool, verdict: str) -> None:
    assert Row("a figure", value, must, at_least=at_least).verdict == verdict


def benchmark(*rows: Row | Exception) -> types.SimpleNamespace:
    def produce() -> Iterator[Row]:
        for row in rows:
            if isinstance(row, Exception):
                raise row
            yield row

    return types.SimpleNamespace(rows=produce)


@pytest.mark.parametrize(
    ("rows", "status", "said"),
    [
        ((Row("good", 1.0, 2.0, unit="s", wanted=0.5),), 0, "wanted <= 0.5: not yet"),
        ((Row("good", 1.0, 2.0), Row("bad", 3.0, 2.0)), 1, "1 met, 1 missed"),
        ((Row("good", 1.0, 2.0), ValueError("broken")), 1, "1 met, 1 missed"),
        ((NotHereError("no GPU"),), 0, "not on this machine: no GPU"),
    ],
)
def test_exit_status(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    rows: tuple[Row | Exception, ...],
    status: int,
    said: str,
) -> None:
    monkeypatch.setattr(bench, "names", lambda: ["made_up"])
    monkeypatch.setattr(bench.importlib, "import_module", lambda name: benchmark(*rows))
    assert bench.main([]) == status
    assert said in capsys.readouterr().out


def test_unknown_name(capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.main(["strat"]) == 2
    assert "start" in capsys.readouterr().err
