"""Lines in a log while something long goes on."""

import re
from pathlib import Path

import pytest

from harness.data import progress
from harness.data.check import check
from harness.data.progress import Reporter


class Clock:
    now = 100.0

    def monotonic(self) -> float:
        return self.now


def test_lines_tell_rate_and_time_left(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    clock = Clock()
    monkeypatch.setattr(progress, "time", clock)
    with Reporter("images") as reporter:
        for done in range(400, 1001, 100):  # the first 400 were written by an earlier run
            reporter.update("train", done, 1000)
            clock.now += 5.0
    assert capsys.readouterr().err.splitlines() == [
        "train: 400/1000 images",
        "train: 600/1000 images, 20/s, 20 s left",
        "train: 800/1000 images, 20/s, 10 s left",
        "train: 1000/1000 images, 20/s",
    ]


def test_a_slow_rate_is_not_none_at_all(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    clock = Clock()
    monkeypatch.setattr(progress, "time", clock)
    with Reporter("images") as reporter:
        reporter.update("train", 0, 9)
        clock.now += 10.0
        reporter.update("train", 3, 9)
    assert capsys.readouterr().err.splitlines() == ["train: 3/9 images, 0.3/s, 20 s left"]


def test_checking_tells_a_rate_from_its_first_line_on(digits: Path, capsys: pytest.CaptureFixture[str]):
    with Reporter("images") as reporter:
        check(digits, deep=True, progress=reporter.update)
    first = capsys.readouterr().err.splitlines()[0]
    rate = re.fullmatch(r"train: 1024/1438 images, ([\d.e+]+)/s, \d+ s left", first)
    assert rate is not None, first
    assert float(rate[1]) > 0


def test_the_rate_of_decoding_counts_from_the_first_image(photos: Path):
    heard: list[tuple[str, int, int]] = []
    check(photos, deep=True, progress=lambda *news: heard.append(news))
    for what, done in (("train", 0), ("train, decoding", 0), ("val", 0), ("val, decoding", 0)):
        assert next(news for news in heard if news[0] == what)[1] == done
        _, last, total = [news for news in heard if news[0] == what][-1]
        assert last == total, "or a bar would stop short of its end"
