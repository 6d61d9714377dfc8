"""What runs in a Tune trial's own process. Imports nothing heavy before it must."""

import time
from pathlib import Path
from typing import Any

from harness.config import TrialSpec
from harness.errors import Preempted, is_user_error
from harness.run_dir import RunDir, write_json


def run_trial(config: dict[str, Any]) -> dict[str, Any]:
    """Run `config["spec"]` to its end; how it ended ("finished", "stopped", "failed") and the seconds it took.

    A trial of one worker runs right here, a larger one as a Ray Train worker group. Mistakes that a person must mend
    are not worth a retry: they end the trial as "failed"; anything else is raised, so that Tune tries again.
    """
    spec = TrialSpec.model_validate(config["spec"])
    if Path(config["stop_file"]).exists():
        return {"ended": "stopped", "wall_s": 0.0}
    begin = time.monotonic()
    try:
        _train(spec, reports=bool(config["reports"]))
        ended = "finished"
    except Preempted:
        ended = "stopped"
    except Exception as error:
        if not is_user_error(error):
            raise
        ended = "failed"
        note_failure(spec, str(error))
    return {"ended": ended, "wall_s": time.monotonic() - begin}


def note_failure(spec: TrialSpec, message: str) -> None:
    """Write error.json unless the trial itself already did."""
    run = RunDir(spec.run_dir)
    if run.error() is None and run.result() is None:
        write_json(run.create().error_path, {"message": message, "stage": "start"})


def _train(spec: TrialSpec, *, reports: bool) -> None:
    from harness.ray_worker import fit

    fit(spec, inside_tune=reports)
