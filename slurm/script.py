"""The text of the batch script: everything SLURM gets to see of a submission, as a pure function of its record."""

import shlex
from typing import Any

from slurm.profile import minutes
from slurm.records import EXIT_FILE, Submission


def parameters(submission: Submission) -> dict[str, Any]:
    """What submitit's SLURM executor is to be told."""
    job, node, requeue = submission.profile.job, submission.profile.node, submission.profile.requeue
    # both the job and its step must be told: sbatch's option does not reach srun, which would end the step on all nodes
    ignore_loss = {"no-kill": True} if requeue.on_node_loss == "ignore" else {}
    # since SLURM 22.05 a step does not inherit the job's CPUs per task; without a number the task may use all it finds
    cpus = "--cpu-bind=none" if node.cpus is None else f"--cpus-per-task={node.cpus}"
    told: dict[str, Any] = {
        "job_name": submission.name,
        "partition": job.partition,
        "account": job.account,
        "qos": job.qos,
        "constraint": job.constraint,
        "time": minutes(job.time),
        "nodes": job.nodes,
        "ntasks_per_node": 1,
        "exclusive": job.exclusive or None,
        "cpus_per_task": node.cpus,
        "gpus_per_node": node.gpus or None,
        "mem": None if node.memory_gb is None else f"{round(node.memory_gb * 1024)}M",
        "signal_delay_s": requeue.warn_s,
        "array_parallelism": submission.parallel or 256,
        "setup": setup_lines(submission),
        "srun_args": ["--kill-on-bad-exit=0", *(f"--{option}" for option in ignore_loss), cpus],
        "stderr_to_stdout": True,
        "additional_parameters": {"requeue": True, "chdir": str(submission.workdir)} | ignore_loss | job.extra,
    }
    # None withdraws submitit's own default too: it sets a wckey, which some sites refuse
    return {"wckey": None} | {name: value for name, value in told.items() if value is not None}


def setup_lines(submission: Submission) -> list[str]:
    """Shell lines before the command: the site's own, and one that makes the job's status the command's.

    SLURM would judge by the worst launcher instead, and one of those may have died with its node.
    """
    folder = shlex.quote(str(submission.folder))
    status_file = f'{folder}/task-"${{SLURM_ARRAY_TASK_ID:-0}}"/{EXIT_FILE}'
    end = 'trap \'status=$?; [ -s "$status_file" ] && read -r status < "$status_file"; exit "$status"\' EXIT'
    return [f"status_file={status_file}", end, *submission.profile.node.setup]
