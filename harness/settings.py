"""Constants shared by rooms that must start without torch: exit statuses, formats, signals, limits."""

import signal

EXIT_USER_ERROR = 2
# What SLURM (or any scheduler) sees after an orderly leave with a checkpoint: run the same command again.
EXIT_PREEMPTED = 85
# SIGTERM comes from schedulers and `kill`, SIGUSR2 from `sbatch --signal` before the time limit.
LEAVE_SIGNALS = (signal.SIGTERM, signal.SIGUSR2)

RESULT_SCHEMA = 1
# Part of every trial's identity: raise it when a change of the stages changes their results.
STAGE_FORMAT = 1
# Raise it when old checkpoints can no longer be read.
CHECKPOINT_FORMAT = 1

DEFAULT_RUNS_DIR = "runs"
