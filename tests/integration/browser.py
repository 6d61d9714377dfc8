"""The MLflow UI in a headless Chromium: what it shows as text, and pictures of it.

`python -m tests.integration.browser RUNS EXPERIMENT OUT` writes the pictures of the README from a runs folder.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

# A page counts as drawn when it has been quiet for this much of the browser's own time.
_BUDGET_MS = 90_000


@contextmanager
def ui(runs: Path, port: int) -> Iterator[str]:
    """`python -m harness ui` on a runs folder; its address."""
    command = [sys.executable, "-m", "harness", "ui", str(runs), "--port", str(port)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)
    try:
        assert process.stdout is not None
        (address,) = re.findall(r"http://127\.0\.0\.1:\d+", process.stdout.readline())
        deadline = time.monotonic() + 90
        while True:
            try:
                with urllib.request.urlopen(f"{address}/health", timeout=2):
                    break
            except OSError:
                assert process.poll() is None, "harness ui ended"
                assert time.monotonic() < deadline, "the UI did not start"
                time.sleep(0.2)
        yield address
    finally:
        os.killpg(process.pid, 2)
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, 9)
            process.wait(10)


def chromium(url: str, *options: str, size: str = "1500,1000") -> str:
    """Open a page, wait until it is drawn, and return what the browser prints."""
    with tempfile.TemporaryDirectory() as profile:
        command = [
            str(shutil.which("chromium")), "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
            f"--user-data-dir={profile}", f"--window-size={size}", f"--virtual-time-budget={_BUDGET_MS}", *options, url,
        ]  # fmt: skip
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout


def text(url: str) -> str:
    """The page's document after its scripts have run."""
    return chromium(url, "--dump-dom")


def picture(url: str, path: Path) -> None:
    """A PNG of the page."""
    chromium(url, f"--screenshot={path}")


def pages(address: str, experiment: str) -> dict[str, str]:
    """Addresses of the pages that matter: the runs' table, the compare page, the per-layer table of the last trial."""

    def ask(path: str, body: dict) -> dict:
        request = urllib.request.Request(f"{address}/api/2.0/mlflow/{path}", json.dumps(body).encode())
        request.add_header("Content-Type", "application/json")
        with urllib.request.urlopen(request, timeout=20) as answer:
            return json.load(answer)

    query = urllib.parse.urlencode({"experiment_name": experiment})
    with urllib.request.urlopen(f"{address}/api/2.0/mlflow/experiments/get-by-name?{query}", timeout=20) as answer:
        number = json.load(answer)["experiment"]["experiment_id"]
    condition = "tags.`harness.role` = 'trial'"
    found = ask("runs/search", {"experiment_ids": [number], "filter": condition, "max_results": 50})["runs"]
    runs = [run["info"]["run_id"] for run in found]
    chosen = urllib.parse.urlencode({"runs": json.dumps(runs), "experiments": json.dumps([number])})
    return {
        "runs": f"{address}/#/experiments/{number}/runs",
        "compare": f"{address}/#/compare-runs?{chosen}",
        "layers": f"{address}/#/experiments/{number}/runs/{runs[0]}/artifacts/layers.json",
    }


def main() -> None:
    """Write runs.png, compare.png and layers.png."""
    from harness.tracking.cli import free_port

    runs, experiment, out = Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3])
    out.mkdir(parents=True, exist_ok=True)
    with ui(runs, free_port()) as address:
        for name, url in pages(address, experiment).items():
            picture(url, out / f"{name}.png")


if __name__ == "__main__":
    main()
