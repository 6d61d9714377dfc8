import stat
from pathlib import Path

import pytest

from harness.errors import UserError
from slurm import records
from tests.unit.slurm.conftest import Planner


def mode(path: Path) -> str:
    return stat.filemode(path.stat().st_mode)


def test_record_is_for_the_owner_only_and_reads_back(planner: Planner):
    submission = planner(name="one", job_id="12")
    submission.save()
    assert mode(submission.folder) == "drwx------"
    assert mode(submission.folder / "submission.json") == "-rw-------"
    assert records.load_submission(submission.folder) == submission


def test_find_by_name_folder_and_job_id(planner: Planner, tmp_path: Path):
    old, new = planner(name="a", job_id="12", now=1e9), planner(name="a", job_id="13", now=2e9)
    array = planner(name="b", job_id="14", array="3", now=1.5e9)
    for submission in (new, old, array):
        submission.save()
    runs = tmp_path / "runs" / "slurm"
    assert [found.job_id for found in records.submissions(runs)] == ["12", "14", "13"]
    assert records.find(runs, "a") == new
    assert records.find(runs, "12") == old
    assert records.find(runs, "14_2") == array
    assert records.find(runs, old.folder.name) == old
    with pytest.raises(UserError, match="called 'c'.*a, b"):
        records.find(runs, "c")
    with pytest.raises(UserError, match="no submission is recorded"):
        records.find(tmp_path / "elsewhere", "a")


def test_task_ids_are_those_of_slurm(planner: Planner):
    assert [planner(job_id="5", array="2").task_id(i) for i in (0, 1)] == ["5_0", "5_1"]
    assert planner(job_id="5", array="1").task_id(0) == "5"  # submitit makes no array of one
    assert planner(job_id="5").task_id(0) == "5"


def test_first_end_stands(planner: Planner):
    folder = planner().task_folder(0)
    folder.mkdir(parents=True)
    assert records.finished(folder) is None
    records.record_finish(folder, 7, "the command failed", lives=1)
    again = records.record_finish(folder, 0, "the command ended", lives=2)
    assert (again.exit_status, again.lives) == (7, 1)
    assert records.finished(folder) == again
    assert (folder / "exit_status").read_text() == "7\n"


def test_unreadable_record_is_one_message(planner: Planner):
    submission = planner()
    submission.save()
    path = submission.folder / "submission.json"
    path.write_text(path.read_text().replace('"schema_version": 1', '"schema_version": 9'))
    with pytest.raises(UserError, match="another version"):
        records.load_submission(submission.folder)
