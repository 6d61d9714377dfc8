import subprocess
import sys
from pathlib import Path

import pytest

from harness.errors import UserError
from harness.run_dir import RunDir, write_json
from sweeps.compare import differences, find


def layer(name: str, bits: int, kept: int = 16) -> dict:
    return {
        "name": name, "weight_bits": bits, "activation_bits": 8, "kept_in": 16, "kept_out": kept, "out_channels": 16,
        "bops": 2.5e6,
    }  # fmt: skip


def result(key: str, label: str, layers: list[dict]) -> dict:
    return {
        "key": key, "label": label, "layers": layers, "top1": 97.25, "gbops": 1.5, "bop_reduction": 28.0,
        "convention": "mac_product", "pruned_share": 0.25,
    }  # fmt: skip


def trial(runs: Path, key: str, label: str, layers: list[dict]) -> RunDir:
    run = RunDir(runs / "sweep" / "trials" / f"{label}-{key[:8]}").create()
    write_json(run.config_path, {})
    write_json(run.result_path, result(key, label, layers))
    return run


def test_layers_that_differ_are_found():
    one = result("a", "a", [layer("conv1", 8), layer("conv2", 4), layer("conv3", 4, kept=12)])
    two = result("b", "b", [layer("conv1", 8), layer("conv2", 2), layer("conv3", 4), layer("extra", 8)])
    rows = differences(one, two)
    assert [(row.name, row.equal) for row in rows] == [
        ("conv1", True), ("conv2", False), ("conv3", False), ("extra", False)
    ]  # fmt: skip
    assert rows[-1].first is None


def test_trials_are_found_by_directory_identity_or_label(tmp_path: Path):
    one = trial(tmp_path, "a1" * 8, "sbs-0.1", [layer("conv1", 8)])
    trial(tmp_path, "a2" * 8, "sbs-0.3", [layer("conv1", 4)])
    assert find(str(one.path), tmp_path).path == one.path
    assert find("a1", tmp_path).path == one.path
    assert find("sbs-0.1", tmp_path).path == one.path
    with pytest.raises(UserError, match="'a' fits 2 trials"):
        find("a", tmp_path)
    with pytest.raises(UserError, match="no finished trial 'b'"):
        find("b", tmp_path)


def test_the_command_prints_both_sides(tmp_path: Path):
    trial(tmp_path, "a1" * 8, "one", [layer("conv1", 8), layer("conv2", 4)])
    trial(tmp_path, "b1" * 8, "two", [layer("conv1", 8), layer("conv2", 2)])
    command = [sys.executable, "-m", "sweeps", "compare", "one", "two", "--runs", str(tmp_path)]
    output = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
    assert "A: one (a1a1a1a1a1a1a1a1): top-1 97.25%, 1.5 GBOPs (28.0x, mac_product), 25.0% pruned" in output
    assert "1 of 2 layers differ" in output
    (line,) = [line for line in output.splitlines() if "conv2" in line]
    assert line.split() == ["conv2", "4", "8", "16/16", "2.50", "2", "8", "16/16", "2.50"]
