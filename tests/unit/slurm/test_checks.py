import sys
from pathlib import Path

import pytest

from harness.errors import UserError
from slurm import checks
from slurm.profile import load_profile
from slurm.queue import Partition

PARTITIONS = [Partition("main", 60, 4, 16), Partition("long", None, 2, 64)]


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("job.partition=mian", "no partition 'mian'.*did you mean 'main'"),
        ("job.partition='main,lnog'", "no partition 'lnog'.*did you mean 'long'"),
        ("job.nodes=5", r"job\.nodes = 5.*has 4"),
        ("node.cpus=17", r"node\.cpus = 17.*16"),
        ("job.time=2:00:00", r"job\.time = 2:00:00.*60 minutes"),
    ],
)
def test_what_the_partition_cannot_give_is_refused(override: str, words: str):
    with pytest.raises(UserError, match=words):
        checks.check_queue(load_profile(None, ["job.partition=main", override]), PARTITIONS)


@pytest.mark.parametrize(
    "overrides", [[], ["job.partition='main,long'", "job.nodes=3", "node.cpus=64", "job.time=7-0"]]
)
def test_what_one_of_the_partitions_can_give_is_accepted(overrides: list[str]):
    assert checks.check_queue(load_profile(None, overrides), PARTITIONS) is None


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ([], "no command"),
        (["no-such-program"], "no command 'no-such-program' is on the PATH"),
        (["./missing"], r"'\./missing' does not exist in"),
        (["./plain"], "not executable"),
        (["python", "missing.py"], r"script 'missing\.py' does not exist"),
    ],
)
def test_command_that_cannot_run_is_refused(tmp_path: Path, command: list[str], words: str):
    (tmp_path / "plain").write_text("not a program")
    with pytest.raises(UserError, match=words):
        checks.check_command(command, tmp_path, load_profile(None), {"PATH": "/usr/bin:/bin"})


def test_command_that_set_up_lines_may_bring_is_not_judged(tmp_path: Path):
    profile = load_profile(None, ["node.setup=['module load tool']"])
    assert checks.check_command(["tool"], tmp_path, profile, {"PATH": ""}) is None
    assert checks.check_command(["python", "-V"], tmp_path, load_profile(None), {"PATH": ""}) is None  # our own


def test_folder_that_hides_a_package_is_refused(tmp_path: Path):
    (tmp_path / "ray").mkdir()
    assert checks.check_shadows(tmp_path) is None, "without __init__.py it hides nothing"
    (tmp_path / "ray" / "__init__.py").touch()
    with pytest.raises(UserError, match="hides the package 'ray'"):
        checks.check_shadows(tmp_path)


def test_own_checkout_is_no_shadow():
    root = Path(checks.__file__).parents[1]
    assert checks.check_shadows(root) is None
    assert Path(sys.executable).exists()
