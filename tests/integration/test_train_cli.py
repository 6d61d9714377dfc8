"""`python -m harness train` as a person meets it: what it prints, how it ends, what it says about mistakes."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from harness.run_dir import RunDir
from tests.integration import tiny

pytestmark = pytest.mark.integration


def harness(*arguments: str, limit_s: float = 120) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "harness", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=limit_s)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["digits_resnet2"], ["no recipe is named 'digits_resnet2'", "did you mean 'digits_resnet20'"]),
        (["digits_resnet20", "--set", "search.lamda=1"], ["unknown key `search.lamda`", "did you mean 'lambda'"]),
        (
            ["digits_resnet20", "--set", "search.bit_threshold_lr=20"],
            ["`search.bit_threshold_lr` = 20 is gone: remove"],
        ),
        (["digits_resnet20", "--set", "pretrain.epochs=few"], ["`pretrain.epochs` = 'few'", "integer"]),
        (["digits_resnet20", "--set", "data.source=photos"], ["unknown source 'photos'", "imagefolder:DIR"]),
    ],
)
def test_mistakes_end_with_2_and_one_message(arguments: list[str], words: list[str], tmp_path: Path):
    done = harness("train", *arguments, "--set", f"data.dir={tmp_path}/data", "--run-dir", str(tmp_path / "run"))
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    for word in words:
        assert word in done.stderr


@pytest.mark.ffcv
def test_a_run_from_a_recipe_file(tmp_path: Path):
    recipe = tiny.recipe_file(tiny.write_data(tmp_path))
    quick = ["--set", "search.method=full_precision", "--set", "pretrain.epochs=1", "--run-dir", str(tmp_path / "run")]
    done = harness("train", str(recipe), *quick)
    assert done.returncode == 0, done.stderr
    result = RunDir(tmp_path / "run").result()
    assert result is not None
    assert f"top-1 {result['top1']:.2f}%" in done.stdout
    assert "mac_product, all convolution and linear layers" in done.stdout
    assert str(tmp_path / "run") in done.stdout
    assert "taken from" not in done.stdout
    assert "sweep" not in done.stdout
    again = harness("train", str(recipe), *quick[:-1], str(tmp_path / "again"))
    assert f"pretrain: taken from {tmp_path / 'stages'} (trained before with the same settings)" in again.stdout
    init = ["--init", str(RunDir(tmp_path / "run").weights_path)]
    given = harness("train", str(recipe), *quick[:-1], str(tmp_path / "given"), *init)
    assert given.returncode == 0, given.stderr
    assert f"top-1 {result['top1']:.2f}%" in given.stdout
    assert "pretrain" not in given.stdout, "given, neither trained nor taken"
    wrong = harness("train", str(recipe), *quick[:-1], str(tmp_path / "other"), "--set", "model.num_classes=10")
    assert wrong.returncode == 2
    assert "model.num_classes = 10, but" in wrong.stderr
    assert "holds 8 classes. Set model.num_classes=8" in wrong.stderr
    assert "Traceback" not in wrong.stderr
    if not torch.cuda.is_available():
        gpus = harness("train", str(recipe), "--set", "run.gpus_per_worker=1", "--run-dir", str(tmp_path / "gpu"))
        assert gpus.returncode == 2
        assert "run.gpus_per_worker = 1, but this machine shows no CUDA device" in gpus.stderr


@pytest.mark.ffcv
def test_a_damaged_validation_split_is_seen_before_training(tmp_path: Path):
    """Not after the first epoch, which takes hours elsewhere."""
    data = tiny.write_data(tmp_path)
    with (data / "val.beton").open("rb+") as file:
        file.truncate((data / "val.beton").stat().st_size - 1)
    done = harness("train", str(tiny.recipe_file(data)), "--run-dir", str(tmp_path / "run"))
    assert done.returncode == 2
    assert f"{data / 'val.beton'} has" in done.stderr
    assert "Traceback" not in done.stderr
    assert RunDir(tmp_path / "run").metrics() == []
