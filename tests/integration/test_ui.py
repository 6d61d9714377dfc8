"""The stock MLflow UI on a store that the mirror filled, in a real browser."""

from pathlib import Path

import pytest

from harness.run_dir import RunDir
from harness.tracking.mirror import sync_trial
from harness.tracking.store import Store
from tests.integration import browser
from tests.integration.fake_trial import write_trial
from tests.integration.test_tracking import spec

pytestmark = [pytest.mark.integration, pytest.mark.chromium, pytest.mark.timeout(400)]


def test_the_ui_shows_runs_comparison_and_layers(tmp_path: Path, free_port: int):
    runs = tmp_path / "runs"
    store = Store(f"sqlite:///{runs}/mlflow.db", runs / "mlartifacts")
    for number in range(3):
        made = spec(tmp_path, number)
        write_trial(made)
        sync_trial(store, RunDir(made.run_dir))
    with browser.ui(runs, free_port) as address:
        pages = browser.pages(address, "exp")
        shown = browser.text(pages["runs"])
        assert "Training runs" in shown
        assert "matching runs" in shown  # the trials are folded into the sweep
        assert ">exp<" in shown
        compared = browser.text(pages["compare"])
        for words in ["Parallel Coordinates", "Scatter Plot", "final/top1", "lambda"]:
            assert words in compared
        assert "layer1.0.conv1" in browser.text(pages["layers"])
        browser.picture(pages["compare"], tmp_path / "compare.png")
    assert (tmp_path / "compare.png").read_bytes().startswith(b"\x89PNG")
