import re
import subprocess
import sys
from pathlib import Path

import pytest

from harness.errors import UserError
from slurm.executors import batch_executor
from slurm.profile import load_profile
from slurm.records import Submission
from slurm.submit import Request, plan

NOW = 1_700_000_000.0


def planned(workdir: Path, *overrides: str, profile: str | None = None, **request: object) -> Submission:
    command = ("python", "-m", "sweeps", "run", "space with 'quotes'.toml")
    return plan(Request(command, load_profile(profile, overrides), **request), workdir, now=NOW)


def text_of(submission: Submission) -> str:
    text = batch_executor(submission).text(len(submission.tasks))
    return text.replace(str(submission.folder), "FOLDER").replace(sys.executable, "PYTHON")


GOLDEN_RAY = """\
#!/bin/bash

# Parameters
#SBATCH --account=my-project
#SBATCH --chdir=FOLDER/code
#SBATCH --constraint=a100
#SBATCH --cpus-per-task=64
#SBATCH --exclusive
#SBATCH --gpus-per-node=8
#SBATCH --job-name=sweeps
#SBATCH --mail-type=FAIL
#SBATCH --mail-user=me@example.org
#SBATCH --mem=491520M
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --open-mode=append
#SBATCH --output=FOLDER/log/%j_0_log.out
#SBATCH --partition=gpu
#SBATCH --requeue
#SBATCH --signal=USR2@300
#SBATCH --time=1440

# setup
status_file=FOLDER/task-"${SLURM_ARRAY_TASK_ID:-0}"/exit_status
trap 'status=$?; [ -s "$status_file" ] && read -r status < "$status_file"; exit "$status"' EXIT
module load cuda/12.8

# command
export SUBMITIT_EXECUTOR=slurm
srun --unbuffered --output FOLDER/log/%j_%t_log.out --kill-on-bad-exit=0 --cpus-per-task=64 \
PYTHON -u -m submitit.core._submit FOLDER/log
"""

GOLDEN_ARRAY = """\
#!/bin/bash

# Parameters
#SBATCH --array=0-7%2
#SBATCH --chdir=WORKDIR
#SBATCH --job-name=many
#SBATCH --no-kill
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --open-mode=append
#SBATCH --output=FOLDER/log/%A_%a_0_log.out
#SBATCH --requeue
#SBATCH --signal=USR2@120
#SBATCH --time=60

# setup
status_file=FOLDER/task-"${SLURM_ARRAY_TASK_ID:-0}"/exit_status
trap 'status=$?; [ -s "$status_file" ] && read -r status < "$status_file"; exit "$status"' EXIT

# command
export SUBMITIT_EXECUTOR=slurm
srun --unbuffered --output FOLDER/log/%A_%a_%t_log.out --kill-on-bad-exit=0 --no-kill --cpu-bind=none \
PYTHON -u -m submitit.core._submit FOLDER/log
"""


def test_script_of_a_ray_job(tmp_path: Path):
    assert text_of(planned(tmp_path, profile="gpu_cluster")) == GOLDEN_RAY


def test_script_of_an_array(tmp_path: Path):
    overrides = ["storage.snapshot=false", "requeue.on_node_loss=ignore"]
    text = text_of(planned(tmp_path, *overrides, name="many", array="8%2"))
    assert text.replace(str(tmp_path), "WORKDIR") == GOLDEN_ARRAY


def test_command_never_stands_in_the_script(tmp_path: Path):
    nasty = ("echo", "a b", "$(touch x)", "line\nline", "'\"", "#SBATCH --partition=x")
    submission = plan(Request(nasty, load_profile(None)), tmp_path, now=NOW)
    text = text_of(submission)
    assert "touch" not in text
    assert "partition" not in text
    submission.save()
    assert Submission.model_validate_json((submission.folder / "submission.json").read_text()).command == nasty


@pytest.mark.parametrize("name", ["with space", "quote's", 'double"quote', "semi;colon", "$HOME", "ümläut", "a&b"])
def test_script_with_a_hostile_folder_is_valid_shell_and_means_that_folder(tmp_path: Path, name: str):
    workdir = tmp_path / name
    workdir.mkdir()
    submission = plan(Request(("true",), load_profile(None)), workdir, now=NOW)
    task = submission.task_folder(0)
    task.mkdir(parents=True)
    (task / "exit_status").write_text("7\n")
    script = batch_executor(submission).text(1)
    shown = re.sub(r"^srun .*$", "printf '%s' \"$status_file\"; false", script, flags=re.MULTILINE)
    done = subprocess.run(["bash", "-c", shown], capture_output=True, text=True, check=False)
    assert done.stdout == str(task / "exit_status")
    assert done.returncode == 7, "the trap did not turn the launcher's status into the command's"
    assert f"--chdir='{workdir}" in script or f"--chdir={workdir}" in script or "'\"'\"'" in script


@pytest.mark.parametrize("name", ["percent%j", "new\nline", "tab\tbed", "back\\slash"])
def test_folder_that_slurm_cannot_take_is_refused(tmp_path: Path, name: str):
    with pytest.raises(UserError, match="cannot take in the path of a log file"):
        plan(Request(("true",), load_profile(None)), tmp_path / name, now=NOW)


@pytest.mark.parametrize(
    ("request_", "words"),
    [
        ({"name": "../up"}, "--name"),
        ({"array": "0"}, "--array"),
        ({"array": "4%"}, "--array"),
        ({"array": "1-3"}, "--array"),
        ({"array": "2", "local": True}, "--local"),
    ],
)
def test_senseless_requests_are_refused(tmp_path: Path, request_: dict[str, object], words: str):
    with pytest.raises(UserError, match=words):
        planned(tmp_path, **request_)


def test_array_on_several_nodes_is_refused(tmp_path: Path):
    with pytest.raises(UserError, match=r"job\.nodes = 2"):
        planned(tmp_path, "job.nodes=2", array="3")


def test_two_submissions_in_one_second_get_two_folders(tmp_path: Path):
    first = planned(tmp_path)
    first.save()
    assert planned(tmp_path).folder != first.folder
