"""`scripts/gpu/run.py` without a GPU: its time plan, what it makes of figures, and what `make gpu` refuses to carry."""

import json
import os
from pathlib import Path

import pytest

from scripts.console import SetupError
from scripts.gpu import figures, plan, prepare
from scripts.gpu.plan import Outcome, Part, all_met, run_parts
from tests.benchmarks.launches import counted
from tests.benchmarks.measure import Row, estimate

PART = """
import json, os, signal, subprocess, sys, time
what, figures = sys.argv[1], sys.argv[sys.argv.index("--figures") + 1]
value = 3.0 if what == "miss" else 1.0
with open(figures, "a") as file:
    file.write(json.dumps({"name": what, "figure": value, "must": 2.0, "unit": "x", "at_least": False, "wanted": None}))
    file.write("\\n" + '{"name": "cut sh')
if what == "hang":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    print(subprocess.Popen(["sleep", "100"]).pid, flush=True)
    time.sleep(100)
print("a word at the end")
sys.exit({"fail": 3, "skip": 77}.get(what, 0))
"""


def run(folder: Path, *parts: Part, budget_s: float = 60.0) -> list[Outcome]:
    (folder / "fake_part.py").write_text(PART)
    return list(run_parts(parts, folder, budget_s, os.environ | {"PYTHONPATH": str(folder)}))


def part(name: str, limit_s: float = 30.0) -> Part:
    return Part(name, limit_s, ("fake_part", name))


def test_a_part_that_hangs_is_killed_with_its_children_and_keeps_its_figures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan, "GRACE_S", 0.1)
    hung, after = run(tmp_path, part("hang", limit_s=2.0), part("good"))
    assert (hung.status, after.status) == ("timeout", "met")
    assert [row.name for row in hung.rows] == ["hang"]
    assert 2.0 <= hung.seconds < 20
    state = Path(f"/proc/{hung.output.split()[0]}/stat")
    assert not state.exists() or state.read_text().rsplit(")", 1)[1].split()[0] == "Z"


def test_a_part_that_fails_leaves_the_others(tmp_path: Path) -> None:
    outcomes = run(tmp_path, part("fail"), part("miss"), part("skip"), part("good"))
    assert [outcome.status for outcome in outcomes] == ["failed", "missed", "skipped", "met"]
    assert outcomes[0].reason == "status 3: a word at the end"
    assert outcomes[2].reason == "a word at the end"
    assert not all_met(outcomes)
    assert all_met(outcomes[2:]), "what is not there to be measured is no miss"


def test_the_budget_cuts_a_part_short_and_begins_none_without_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan, "GRACE_S", 0.1)
    hung, late = run(tmp_path, Part("hang", 30.0, ("fake_part", "hang"), needed_s=1.0), part("good"), budget_s=2.0)
    assert hung.status == "timeout"
    assert hung.limit_s <= 2.0
    assert (late.status, late.rows) == ("no time", ())
    assert not all_met([late])


def test_figures_come_back_as_they_were_and_stand_in_the_table(tmp_path: Path) -> None:
    rows = (Row("a | b", estimate([1.0, 2.0, 4.0]), 1.5, "x", wanted=1.0), Row("images", 12345.6, None, "images/s"))
    for row in rows:
        figures.append(tmp_path / "rows", row)
    assert figures.read(tmp_path / "rows") == rows
    outcome = Outcome("step", "missed", 12.3, 60.0, rows=rows)
    table = figures.as_markdown([outcome], {"gpu": "H100"})
    assert "| step | missed | 12 | 60 |  |" in table
    assert "| a \\| b | 2 x (1-4, n=3) | <= 1.5 | MISS, wanted <= 1: not yet |" in table
    assert "| images | 12,346 images/s |  |  |" in table
    tree = json.loads(figures.as_json([outcome], {"gpu": "H100"}))
    assert [row["verdict"] for row in tree["parts"][0]["rows"]] == ["MISS", ""]


def test_launches_waits_and_busy_time_are_counted_by_hand() -> None:
    """Two steps; on two streams, 10 and 10 us that overlap by 4, then 5 after a gap: busy for 21 of them."""
    device = [("kernel", "gemm", 0, 10), ("kernel", "norm", 6, 10), ("gpu_memcpy", "Memcpy HtoD", 100, 5)]
    host = [("cuda_runtime", "cudaLaunchKernel"), ("cuda_driver", "cuLaunchKernelEx"), ("cuda_runtime", "cudaMalloc")]
    host += [("cuda_runtime", "cudaGraphLaunch"), ("cuda_runtime", "cudaStreamSynchronize"), ("cpu_op", "aten::add")]
    events = [{"cat": c, "name": n, "ts": t, "dur": d} for c, n, t, d in device]
    events += [{"cat": c, "name": n, "ts": 0, "dur": 1} for c, n in host] + [{"cat": "kernel", "name": "no time"}]
    found = counted(events, steps=2)
    assert (found.kernels, found.launches, found.waits) == (1.0, 1.5, 0.5)
    assert found.busy_ms == pytest.approx(0.021 / 2)
    assert found.longest[0] == (pytest.approx(0.005), 0.5, "gemm")


def test_more_than_a_machine_is_given_is_not_carried(capsys: pytest.CaptureFixture[str]) -> None:
    prepare.check_size({"base": 30 << 20, "ray": 30 << 20})
    assert "60.0 MiB of at most 60" in capsys.readouterr().out
    with pytest.raises(SetupError, match="too large"):
        prepare.check_size({"base": 30 << 20, "ray": (30 << 20) + 1})
