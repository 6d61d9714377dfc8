"""Whole jobs on a real SLURM: status, survival, hygiene."""

import hashlib
import json

import pytest

from tests.slurm.cluster import Cluster
from tests.slurm.conftest import User, wait_for, wait_until_clean

HALF = ["--no-snapshot", "--set", "node.cpus=2", "--set", "node.memory_gb=2"]
SMALL = [*HALF, "--nodes", "2", "--time", "5", "--set", "requeue.warn_s=20"]


def chain(links: int) -> str:
    value = "start"
    for _ in range(links):
        value = hashlib.sha256(value.encode()).hexdigest()
    return value


def test_job_on_two_nodes_ends_as_its_command_does(cluster: Cluster, user: User):
    done = user.slurm("submit", "--wait", "--name", "seven", *SMALL, "--", "python", "ray_hello.py", "7", check=False)
    assert done.returncode == 7, done.stdout + done.stderr
    job_id = user.status("seven")["job_id"]
    wait_until_clean(cluster)

    facts = json.loads((user.home / "facts.json").read_text())
    assert sorted(task["host"] for task in facts["tasks"]) == cluster.names
    assert {task["cwd"] for task in facts["tasks"]} == {str(user.home)}
    assert facts["cpus"] == 4
    assert max(facts["memory"]) < 2 << 30
    assert (facts["token_mode"], facts["folder_mode"]) == ("-rw-------", "drwx------")
    assert facts["enters"] == {"right token": True, "wrong token": False, "no token": False}

    wait_for(lambda: user.accounting(job_id) == [["FAILED", "7:0"]], 20, "record of the failure")
    (life,) = user.lives("seven")
    first_line_s = facts["started"] - life["started_unix_s"]
    end_s = life["ended_unix_s"] - life["command_ended_unix_s"]
    print(f"first line {first_line_s:.1f} s after the launcher, end {end_s:.1f} s after the command")

    # SLURM may run a job again that has finished: after a node's crash in its last moments, or because somebody asks
    cluster.login(["scontrol", "requeue", job_id])
    wait_for(lambda: cluster.job(job_id)["Restarts"] == "1", 30, "second life")
    wait_for(lambda: cluster.job(job_id)["JobState"] == "FAILED", 60, "second end")
    assert cluster.job(job_id)["ExitCode"] == "7:0"
    assert user.log("seven").count("the command ended with") == 1
    assert "nothing to do" in user.log("seven")
    assert len(user.lives("seven")) == 1
    assert user.status("seven")["state"] == "FAILED"


@pytest.mark.timeout(600)
def test_time_limit_sends_the_command_back_to_the_queue_until_it_is_done(cluster: Cluster, user: User):
    # warned 35 s before a limit of 60 s, a job of 20 links of one second needs two lives, more where Ray starts slowly;
    # `sleep` never ends
    tight = [*HALF, "--time", "1", "--set", "requeue.warn_s=35"]
    chained = ["--nodes", "2", "--set", "requeue.max=12", "--", "python", "count.py", "state", "20", "1"]
    user.submit("chain", *tight, *chained)
    user.submit("sleep", *tight, "--array", "1", "--set", "requeue.max=1", "--", "sleep", "600")

    ended = user.wait_over("chain", 400)
    assert (ended["state"], ended["exit_status"]) == ("COMPLETED", 0), user.log("chain")
    lives = user.lives("chain")
    assert len(lives) >= 2
    assert [life["verdict"] for life in lives] == ["requeue"] * (len(lives) - 1) + ["finish"]
    assert lives[0]["stopped_by"] == "time limit"
    assert f"result {chain(20)}" in user.log("chain")
    links = (user.home / "state.all").read_text().splitlines()
    assert [int(line.split()[0]) for line in links] == list(range(1, 21)), "a link was computed twice or left out"

    # a command that knows nothing of signals is put back too, but not for ever
    ended = user.wait_over("sleep", 120)
    assert (ended["state"], ended["exit_status"], ended["lives"]) == ("FAILED", 128 + 15, 2)
    assert "requeue.max" in ended["reason"]


def test_preempted_job_goes_on_where_it_was(cluster: Cluster, user: User):
    job_id = user.submit(
        "low", *SMALL, "--partition", "low", "--set", "node.cpus=4", "--", "python", "count.py", "state", "25", "1"
    )
    wait_for((user.home / "state").exists, 60, "first link")
    urgent = user.submit(
        "high", "--no-snapshot", "--partition", "high", "--array", "1", "--set", "node.cpus=4", "--", "true"
    )
    assert user.wait_over("high", 90)["state"] == "COMPLETED"

    ended = user.wait_over("low", 120)
    assert ended["state"] == "COMPLETED", user.log("low")
    # seen once: a second preemption before the urgent job ran, most likely since the job was back in the queue early
    stops = [life["stopped_by"] for life in user.lives("low")[:-1]]
    assert stops == ["preempted"] * (ended["lives"] - 1), user.log("low")
    assert ended["lives"] in {2, 3}
    assert f"result {chain(25)}" in user.log("low")
    assert len((user.home / "state.all").read_text().splitlines()) == 25
    assert int(job_id) < int(urgent)
    wait_until_clean(cluster)


def test_node_crash_gives_the_job_a_second_life_or_is_ignored(cluster: Cluster, user: User):
    """One crash, two jobs: one goes back to the queue and on, the other has chosen to go on without the node."""
    job_id = user.submit("crash", *SMALL, "--", "python", "count.py", "state", "1000000", "0.2")
    ignored = ["--set", "requeue.on_node_loss=ignore", "--set", "requeue.node_lost_after_s=10"]
    lasting = user.submit("lasting", *SMALL, *ignored, "--", "python", "ray_stay.py", "stop")
    wait_for((user.home / "state").exists, 90, "first link")
    wait_for(lambda: "2 workers are busy" in user.log_so_far("lasting"), 90, "workers")
    cluster.crash("n2")
    try:
        wait_for(lambda: int(cluster.job(job_id)["Restarts"]) == 1, 150, "requeue after the crash")
        wait_for(lambda: "lost the Ray node of rank [1]" in user.log_so_far("lasting"), 60, "notice of the loss")
        assert (user.status("lasting")["state"], user.status("lasting")["lives"]) == ("RUNNING", 1)
        (user.home / "stop").touch()
        ended = user.wait_over("lasting", 60)
        assert (ended["state"], ended["exit_status"], ended["lives"]) == ("COMPLETED", 0, 1), user.log("lasting")
        assert "stopped as asked" in user.log("lasting")
        # the job as it was before it lost the node has a line of its own
        wait_for(lambda: user.accounting(lasting)[-1] == ["COMPLETED", "0:0"], 20, "record of the end")
    finally:
        cluster.boot("n2")
    wait_for(lambda: len(user.lives("crash")) == 2, 60, "second life")
    done = int((user.home / "state").read_text().split()[0])
    assert done > 0
    said = user.slurm("cancel", job_id).stdout
    assert "cancelled" in said
    assert user.status("crash")["state"] == "CANCELLED"
    wait_until_clean(cluster)


def test_jobs_on_the_same_nodes_do_not_touch_each_other(cluster: Cluster, user: User):
    """Two clusters at once; one loses a node and fails, the other goes on, even without its own second node."""
    stay = ["--", "python", "ray_stay.py", "stop"]
    fragile = user.submit("fragile", *SMALL, "--set", "requeue.on_node_loss=fail", *stay)
    tough = user.submit("tough", *SMALL, "--set", "requeue.on_node_loss=ignore", *stay)
    for name in ("fragile", "tough"):
        wait_for(lambda name=name: "2 workers are busy" in user.log_so_far(name), 90, f"workers of {name}")

    kill_raylet(cluster, user, "fragile", "n2")
    ended = user.wait_over("fragile", 60)
    assert (ended["state"], ended["exit_status"]) == ("FAILED", 75)
    wait_for(lambda: user.accounting(fragile) == [["FAILED", "75:0"]], 20, "record of the failure")
    assert user.status("tough")["state"] == "RUNNING"

    kill_raylet(cluster, user, "tough", "n2")
    wait_for(lambda: "lost the Ray node" in user.log_so_far("tough"), 30, "notice of the loss")
    (user.home / "stop").touch()
    ended = user.wait_over("tough", 60)
    assert (ended["state"], ended["exit_status"]) == ("COMPLETED", 0), user.log("tough")
    assert "stopped as asked" in user.log("tough")
    wait_for(lambda: user.accounting(tough) == [["COMPLETED", "0:0"]], 20, "record of the end")
    wait_until_clean(cluster)


def kill_raylet(cluster: Cluster, user: User, name: str, node: str) -> None:
    """Kill one job's raylet on a node: the address of the head tells whose it is."""
    (head,) = (user.home / "runs" / "slurm").glob(f"{name}-*/task-0/life-*/head.json")
    address = json.loads(head.read_text())["address"]
    listed = cluster.on(node, ["ps", "-ww", "-eo", "pid,args"]).stdout.splitlines()
    (raylet,) = [line.split()[0] for line in listed if "/raylet --" in line and f"--gcs-address={address}" in line]
    cluster.on(node, ["kill", "-9", raylet])


def test_killed_launchers_leave_nothing(cluster: Cluster, user: User):
    user.submit("killed", *SMALL, "--", "python", "ray_stay.py", "stop")
    wait_for(lambda: "2 workers are busy" in user.log_so_far("killed"), 90, "workers")
    for node in cluster.names:
        cluster.on(node, ["pkill", "-9", "-f", "^[^ ]*python[^ ]* -u -m submitit"])
    assert user.wait_over("killed", 60)["state"] == "FAILED"
    # Ray's own agents notice within a minute that their node manager has gone
    wait_until_clean(cluster, 90)


def test_cancelled_job_leaves_nothing_and_does_not_come_back(cluster: Cluster, user: User):
    job_id = user.submit("cancelled", *SMALL, "--", "python", "ray_stay.py", "stop")
    wait_for(lambda: "2 workers are busy" in user.log_so_far("cancelled"), 90, "workers")
    cluster.login(["scancel", job_id])  # not our own `cancel`: SLURM alone must be enough
    ended = user.wait_over("cancelled", 60)
    assert (ended["state"], ended["lives"]) == ("CANCELLED", 1)
    assert user.accounting(job_id)[0][0].startswith("CANCELLED")
    wait_until_clean(cluster)
