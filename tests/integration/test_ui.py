"""The stock MLflow UI on a store that the mirror filled, in a real browser."""

import asyncio
from pathlib import Path

import pytest

from harness.run_dir import RunDir
from harness.tracking.copying import sync_trial
from harness.tracking.store import Store
from tests.integration import browser
from tests.integration.fake_trial import write_trial
from tests.integration.mlflow_stores import spec

pytestmark = [pytest.mark.integration, pytest.mark.chromium, pytest.mark.timeout(400)]


def test_the_ui_shows_runs_comparison_and_layers(tmp_path: Path, free_port: int):
    runs = tmp_path / "runs"
    store = Store(f"sqlite:///{runs}/mlflow.db", runs / "mlartifacts")
    for number in range(3):
        made = spec(tmp_path, number)
        write_trial(made)
        sync_trial(store, RunDir(made.run_dir))
    with browser.ui(runs, free_port) as address:
        asyncio.run(look(address, tmp_path / "scatter.png"))
    assert (tmp_path / "scatter.png").read_bytes().startswith(b"\x89PNG")


async def look(address: str, picture: Path) -> None:
    pages = browser.pages(address, "exp")
    async with browser.chromium() as page:
        await page.open(pages["runs"], "Training runs")
        await page.until("document.body.innerText.includes('matching runs')")
        assert "trial0" not in await page.text()  # the trials are folded into the sweep
        await page.open(pages["layers"], "layer1.0.conv1")
        # The compare page, as it opens: the parallel coordinates, then the frontier at the press of a tab.
        await page.open(pages["compare"], "Parallel Coordinates Plot")
        await page.until(browser.DRAWN)
        chosen = (await page.text()).split("Parameters:\n")[1].split("\nClear All")[0]
        assert chosen.split("\n") == ["GBOPs", "Mean weight bits", "lambda", "Metrics:", "Top-1"]
        await page.press("tab", "Scatter Plot")
        await page.until("document.querySelectorAll('.js-plotly-plot .xtick').length > 2")
        axes = (await page.text()).split("X-axis:\n")[1].split("\nY-axis:\n")
        assert [axis.splitlines()[0] for axis in axes] == ["GBOPs", "Top-1"]
        await page.picture(picture)
