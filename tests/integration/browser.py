"""The MLflow UI in a headless Chromium: what it shows as text, what its buttons do, and pictures of it.

`python -m tests.integration.browser RUNS EXPERIMENT OUT` writes the pictures of the README from a runs folder.
"""

import asyncio
import base64
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
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

from aiohttp import ClientSession, ClientWebSocketResponse

# Without the assistant's panel, which opens by itself on a first visit and hides the page's right side.
_PLAIN = """try {
    localStorage.setItem("mlflow.assistant.fab.autoOpenedOnFirstLoad_v1", "true");
    localStorage.setItem("mlflow.assistant.panelOpen_v1", "false");
} catch (error) {}"""
# A plot is there, with its axes' titles and something drawn.
DRAWN = "document.querySelectorAll('.js-plotly-plot .main-svg text').length > 2"


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


class Page:
    """A page in a headless Chromium, driven over its debugging socket: waits for conditions, never for time."""

    def __init__(self, socket: ClientWebSocketResponse) -> None:
        self._socket = socket
        self._number = 0

    async def send(self, method: str, **params: Any) -> dict[str, Any]:
        """A command of the Chrome DevTools Protocol and its result."""
        self._number += 1
        await self._socket.send_json({"id": self._number, "method": method, "params": params})
        while True:
            answer = json.loads((await self._socket.receive(timeout=60)).data)
            if answer.get("id") == self._number:
                assert "error" not in answer, answer
                return answer["result"]

    async def value(self, script: str) -> Any:
        """The value of a JavaScript expression in the page."""
        found = await self.send("Runtime.evaluate", expression=script, returnByValue=True)
        return found["result"].get("value")

    async def until(self, script: str, limit_s: float = 90.0) -> None:
        """Wait until the expression is true."""
        deadline = time.monotonic() + limit_s
        while not await self.value(script):
            if time.monotonic() > deadline:
                raise AssertionError(f"not true within {limit_s:g} s: {script}\n{await self.text()}")
            await asyncio.sleep(0.2)

    async def open(self, url: str, words: str) -> None:
        """Go to an address and wait for these words."""
        await self.send("Page.navigate", url="about:blank")  # an address that differs behind # alone would not reload
        await self.send("Page.navigate", url=url)
        await self.until(f"document.body && document.body.innerText.includes({json.dumps(words)})")

    async def text(self) -> str:
        """What a person can read on the page."""
        return str(await self.value("document.body.innerText"))

    async def press(self, role: str, words: str) -> None:
        """Press the element of this role that says these words."""
        wanted = (
            f"[...document.querySelectorAll('[role={role}]')].find(e => e.innerText.trim() === {json.dumps(words)})"
        )
        await self.until(f"!!{wanted}")
        await self.value(f"{wanted}.dispatchEvent(new MouseEvent('mousedown', {{bubbles: true, button: 0}}))")

    async def picture(self, path: Path) -> None:
        """A PNG of what the window shows."""
        shot = await self.send("Page.captureScreenshot", format="png")
        path.write_bytes(base64.b64decode(shot["data"]))


@asynccontextmanager
async def chromium(size: str = "1500,1000") -> AsyncIterator[Page]:
    """A page of a headless Chromium that lives as long as the context."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        command = [
            str(shutil.which("chromium")), "--headless=new", "--no-sandbox", "--disable-dev-shm-usage",
            "--no-first-run", "--enable-unsafe-swiftshader",  # the scatter plot is drawn with WebGL
            f"--user-data-dir={profile}", f"--window-size={size}", "--remote-debugging-port=0", "about:blank",
        ]  # fmt: skip
        browser = subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
        )
        try:
            told = Path(profile) / "DevToolsActivePort"
            deadline = time.monotonic() + 60
            while not (told.is_file() and told.read_text().count("\n")):
                assert browser.poll() is None, "chromium ended"
                assert time.monotonic() < deadline, "chromium did not start"
                await asyncio.sleep(0.1)
            port = told.read_text().splitlines()[0]
            async with ClientSession() as session:
                async with session.get(f"http://127.0.0.1:{port}/json/list") as answer:
                    (target,) = [each for each in await answer.json() if each["type"] == "page"]
                async with session.ws_connect(target["webSocketDebuggerUrl"], max_msg_size=0) as socket:
                    page = Page(socket)
                    await page.send("Page.enable")
                    await page.send("Page.addScriptToEvaluateOnNewDocument", source=_PLAIN)
                    yield page
        finally:
            os.killpg(browser.pid, 9)
            browser.wait(30)


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


async def take_pictures(address: str, experiment: str, out: Path) -> None:
    """runs.png, compare.png, scatter.png, layers.png."""
    found = pages(address, experiment)
    async with chromium() as page:
        await page.open(found["runs"], experiment)
        await page.until("document.querySelectorAll('[role=row]').length > 1")
        await page.picture(out / "runs.png")
        await page.open(found["compare"], "Parallel Coordinates Plot")
        await page.until(DRAWN)
        await page.picture(out / "compare.png")
        await page.press("tab", "Scatter Plot")
        await page.until(DRAWN)
        await page.picture(out / "scatter.png")
        await page.open(found["layers"], "weight_bits")
        await page.picture(out / "layers.png")


def main() -> None:
    """Take the pictures of a runs folder's UI."""
    from harness.tracking.cli import free_port

    runs, experiment, out = Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3])
    out.mkdir(parents=True, exist_ok=True)
    with ui(runs, free_port()) as address:
        asyncio.run(take_pictures(address, experiment, out))


if __name__ == "__main__":
    main()
