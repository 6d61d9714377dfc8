"""The command line against a real SLURM, with commands that need no Ray: arrays, hostile folders, early refusals."""

import json
import shutil
from pathlib import Path

import pytest

from tests.slurm.cluster import Cluster
from tests.slurm.conftest import PROGRAMS, User, wait_for


def test_array_in_a_folder_with_a_hostile_name(cluster: Cluster):
    home = cluster.shared / 'my "own" folder\'s $HOME; ü'
    shutil.copytree(PROGRAMS, home)
    user = User(cluster, home)
    code = "import os, sys; print('index', sys.argv[1], 'of', os.environ['SLURM_ARRAY_TASK_COUNT'])"
    code += "; sys.exit(int(sys.argv[1]))"
    command = ["submit", "--name", "many", "--array", "3%2", "--wait", "--", "python", "-c", code, "{index}"]
    done = user.slurm(*command, check=False)
    assert done.returncode == 2, done.stdout + done.stderr
    for index in range(3):
        assert f"index {index} of 3\n" in user.slurm("logs", "--index", str(index), "many").stdout
    tasks = json.loads(user.slurm("status", "--json", "many").stdout)
    assert [task["exit_status"] for task in tasks] == [0, 1, 2]
    assert [task["state"] for task in tasks] == ["COMPLETED", "FAILED", "FAILED"]
    job_id = tasks[0]["job_id"].split("_")[0]
    wait_for(
        lambda: sorted(user.accounting(job_id)) == [["COMPLETED", "0:0"], ["FAILED", "1:0"], ["FAILED", "2:0"]],
        20,
        "record of the array",
    )


def test_only_the_task_that_asks_for_it_goes_back_to_the_queue(user: User):
    """One task of an array has the array's own id in SLURM: putting that one back must not put back the others."""
    code = "echo x >> {index}.lives; [ {index} = 0 ] && sleep 8 || [ $(wc -l < {index}.lives) -ge 2 ] || exit 85"
    user.slurm("submit", "--name", "array", "--array", "3", "--no-snapshot", "--wait", "--", "sh", "-c", code)
    tasks = json.loads(user.slurm("status", "--json", "array").stdout)
    assert [(task["state"], task["lives"]) for task in tasks] == [("COMPLETED", 1), ("COMPLETED", 2), ("COMPLETED", 2)]


def test_copy_of_the_code_is_what_runs(user: User):
    script = user.home / "script.py"
    script.write_text("print('as submitted')\n")
    blocker = user.submit("blocker", "--array", "2", "--no-snapshot", "--set", "node.cpus=4", "--", "sleep", "60")
    try:
        user.submit("queued", "--array", "1", "--set", "node.cpus=4", "--", "python", "script.py")
        script.write_text("print('edited later')\n")
        assert user.status("queued")["state"] == "PENDING"
    finally:
        user.slurm("cancel", blocker)
    assert user.wait_over("queued", 60)["state"] == "COMPLETED"
    assert "as submitted\n" in user.log("queued")


def test_job_cancelled_while_it_waits_is_over(user: User):
    user.submit("waits", "--array", "1", "--no-snapshot", "--set", "job.extra={ hold = true }", "--", "true")
    assert user.status("waits")["state"] == "PENDING"
    assert "cancelled" in user.slurm("cancel", "waits").stdout
    task = user.status("waits")
    assert (task["state"], task["lives"]) == ("CANCELLED", 0)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--partition", "hgih", "--", "true"], "no partition 'hgih' here; did you mean 'high'?"),
        (["--nodes", "3", "--partition", "main", "--", "true"], "job.nodes = 3, but partition main has 2"),
        (["--time", "5:00:00", "--partition", "main", "--", "true"], "allows 60 minutes at most"),
        (
            ["--set", "job.account=nobody", "--set", "job.extra={ begin = 'whenever' }", "--", "true"],
            "sbatch refused the job",
        ),
        (["--", "no-such-program"], "no command 'no-such-program' is on the PATH"),
        (["--profile", "site.toml", "--", "true"], "unknown key `node.cpu`: did you mean 'cpus'?"),
    ],
)
def test_mistake_is_one_message_at_submission(user: User, arguments: list[str], words: str):
    (user.home / "site.toml").write_text("[node]\ncpu = 4\n")
    done = user.slurm("submit", "--no-snapshot", *arguments, check=False)
    assert done.returncode == 2
    assert words in done.stderr
    assert "Traceback" not in done.stderr
    assert not list(Path(user.home).glob("runs/slurm/*"))
