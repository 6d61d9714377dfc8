"""Lines in a log while something long goes on."""

import pytest

from harness.data import progress
from harness.data.progress import Reporter


def test_lines_tell_rate_and_time_left(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    class Clock:
        now = 100.0

        def monotonic(self) -> float:
            return self.now

    clock = Clock()
    monkeypatch.setattr(progress, "time", clock)
    with Reporter("images") as reporter:
        for done in range(400, 1001, 100):  # the first 400 were written by an earlier run
            reporter.update("train", done, 1000)
            clock.now += 5.0
    assert capsys.readouterr().err.splitlines() == [
        "train: 400/1000 images, 0/s",
        "train: 600/1000 images, 20/s, 20 s left",
        "train: 800/1000 images, 20/s, 10 s left",
        "train: 1000/1000 images, 20/s",
    ]
