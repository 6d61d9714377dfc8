from pathlib import Path

import pytest

from harness.errors import UserError
from harness.tracking.cli import runs_dir_of, sweep_folders


@pytest.mark.parametrize("given", ["runs/sweep", "runs/sweep/trials/one-0123abcd", "runs/single-0123abcd"])
def test_the_store_lies_beside_sweeps_and_single_runs(tmp_path: Path, given: str):
    assert runs_dir_of(tmp_path / given) == tmp_path / "runs"


def test_what_sync_takes(tmp_path: Path):
    for name in ("a", "b"):
        trial = tmp_path / "runs" / name / "trials" / "one"
        trial.mkdir(parents=True)
        (trial / "config.json").write_text("{}")
    assert sweep_folders(tmp_path / "runs") == [tmp_path / "runs" / "a", tmp_path / "runs" / "b"]
    assert sweep_folders(tmp_path / "runs" / "a") == [tmp_path / "runs" / "a"]
    assert sweep_folders(tmp_path / "runs" / "a" / "trials" / "one") == [tmp_path / "runs" / "a" / "trials" / "one"]
    with pytest.raises(UserError, match="holds no trials"):
        sweep_folders(tmp_path)
    lone = tmp_path / "runs" / "A-lone-0123abcd"
    (lone / "stages").mkdir(parents=True)
    (lone / "config.json").write_text("{}")
    (tmp_path / "runs" / "stages").mkdir()  # the lone trials' cache
    assert sweep_folders(tmp_path / "runs") == [lone, tmp_path / "runs" / "a", tmp_path / "runs" / "b"]
    assert sweep_folders(lone) == [lone]
