"""`--local`: the whole road through submitit's local executor, with plain commands; and the command line around it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

FAST = ["--local", "--array", "1", "--no-snapshot", "--set", "requeue.warn_s=5"]


def slurm(cwd: Path, *arguments: str, status: int | None = 0) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "slurm", *arguments]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=60, check=False)
    assert status is None or done.returncode == status, done.stdout + done.stderr
    return done


def the_status(cwd: Path, which: str) -> dict[str, object]:
    (task,) = json.loads(slurm(cwd, "status", "--json", which).stdout)
    return task


def test_status_and_output_are_the_command_s(tmp_path: Path):
    done = slurm(
        tmp_path, "submit", *FAST, "--wait", "--name", "a", "--", "sh", "-c", "echo task {index}; exit 7", status=7
    )
    assert "task 0\n" in done.stdout
    task = the_status(tmp_path, "a")
    assert (task["state"], task["exit_status"], task["lives"]) == ("FAILED", 7, 1)
    assert "task 0\n" in slurm(tmp_path, "logs", "a").stdout
    table = slurm(tmp_path, "status").stdout.splitlines()
    assert table[0].split()[:4] == ["NAME", "JOB", "STATE", "EXIT"]
    assert table[1].split()[0] == "a[0]"


def test_command_that_asks_for_it_gets_further_lives_up_to_the_limit(tmp_path: Path):
    code = "echo x >> lives; [ $(wc -l < lives) -ge 2 ] || exit 85"
    slurm(tmp_path, "submit", *FAST, "--wait", "--name", "a", "--", "sh", "-c", code)
    assert the_status(tmp_path, "a")["lives"] == 2
    assert len((tmp_path / "lives").read_text().splitlines()) == 2
    slurm(
        tmp_path,
        "submit",
        *FAST,
        "--set",
        "requeue.max=1",
        "--wait",
        "--name",
        "b",
        "--",
        "sh",
        "-c",
        "exit 85",
        status=85,
    )
    task = the_status(tmp_path, "b")
    assert task["lives"] == 2
    assert "requeue.max" in str(task["reason"])


def test_cancel_ends_the_command_in_order_and_for_good(tmp_path: Path):
    code = "trap 'echo leaving > left; exit 85' TERM; echo up; while :; do sleep 0.1; done"
    slurm(tmp_path, "submit", *FAST, "--name", "a", "--", "sh", "-c", code)
    follow = subprocess.Popen(
        [sys.executable, "-m", "slurm", "logs", "-f", "a"], cwd=tmp_path, stdout=subprocess.PIPE, text=True
    )
    assert follow.stdout is not None
    assert any(line == "up\n" for line in follow.stdout)
    assert the_status(tmp_path, "a")["state"] == "RUNNING"
    assert "cancelled" in slurm(tmp_path, "cancel", "a").stdout
    follow.communicate(timeout=30)
    assert follow.returncode == 0, "logs -f did not end with the job"
    assert (tmp_path / "left").exists()
    assert the_status(tmp_path, "a")["state"] == "CANCELLED"
    assert "over already" in slurm(tmp_path, "cancel", "a").stdout


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["submit", "--local", "--", "no-such-program"], "no command 'no-such-program'"),
        (["submit", "--set", "job.partitoin=x", "--", "true"], "did you mean 'partition'"),
        (["submit", "--profile", "missing.toml", "--", "true"], "profile not found: missing.toml"),
        (["status", "nobody"], "no submission is recorded"),
        (["logs", "nobody"], "no submission is recorded"),
    ],
)
def test_mistakes_are_one_message_and_status_2(tmp_path: Path, arguments: list[str], words: str):
    done = slurm(tmp_path, *arguments, status=2)
    assert words in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "runs").exists()


def test_code_that_is_too_large_leaves_no_record(tmp_path: Path):
    with (tmp_path / "weights.bin").open("wb") as file:
        file.truncate(600 << 20)
    done = slurm(tmp_path, "submit", "--local", "--array", "1", "--", "true", status=2)
    assert "weights.bin (600 MiB)" in done.stderr
    assert "no submission is recorded" in slurm(tmp_path, "status").stdout


@pytest.mark.parametrize(
    ("override", "status", "words"),
    [
        ("node.python=/no/such/python", 70, "cannot start '/no/such/python' on"),
        ("node.scratch=/no/such/folder", 2, "error: node.scratch = '/no/such/folder' cannot be used on"),
        ("node.interface=ib7", 2, "error: node.interface = 'ib7' has no IPv4 address on"),
    ],
)
def test_node_that_cannot_run_ray_says_why(tmp_path: Path, override: str, status: int, words: str):
    job = ["--local", "--no-snapshot", "--set", override, "--wait", "--name", "a", "--", "true"]
    done = slurm(tmp_path, "submit", *job, status=None)
    assert words in done.stdout
    assert "Traceback" not in done.stdout
    assert the_status(tmp_path, "a")["exit_status"] == status
    assert done.returncode == status


def test_dry_run_writes_nothing(tmp_path: Path):
    done = slurm(tmp_path, "submit", "--dry-run", "--nodes", "3", "--", "anything")
    assert "#SBATCH --nodes=3\n" in done.stdout
    assert list(tmp_path.iterdir()) == []


def test_package_starts_without_what_is_heavy(tmp_path: Path):
    code = "import runpy, sys; sys.argv = ['slurm', 'status']\n"
    code += "try: runpy.run_module('slurm', run_name='__main__')\nexcept SystemExit: pass\n"
    code += "print([name for name in ('torch', 'ray', 'mlflow', 'numpy', 'submitit') if name in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout.splitlines()[-1] == "[]"
