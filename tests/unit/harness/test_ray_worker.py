import os
from pathlib import Path

import pytest

from harness.config import RunConfig
from harness.errors import UserError
from harness.ray_worker import failed_since, require_capacity, worker_resources
from harness.run_dir import RunDir, write_json


def test_a_worker_asks_for_what_the_recipe_says():
    assert worker_resources(RunConfig(cpus_per_worker=2)) == {"CPU": 2.0}
    assert worker_resources(RunConfig(cpus_per_worker=8, gpus_per_worker=1)) == {"CPU": 8.0, "GPU": 1.0}


def test_what_can_never_start_is_refused_with_the_arithmetic():
    nodes = [{"CPU": 3.0, "GPU": 1.0}, {"CPU": 5.0}]
    require_capacity(RunConfig(workers=4, cpus_per_worker=2), [*nodes, {"CPU": 2.0}])
    with pytest.raises(
        UserError, match=r"run.workers = 4 x \(2 CPU\) can never start: .*2 node\(s\) \(3 CPU; 5 CPU\) have room for 3"
    ):
        require_capacity(RunConfig(workers=4, cpus_per_worker=2), nodes)
    with pytest.raises(UserError, match=r"2 x \(1 CPU \+ 1 GPU\).*room for 1"):
        require_capacity(RunConfig(workers=2, gpus_per_worker=1), nodes)


def test_an_elastic_trial_needs_its_minimum_only():
    require_capacity(RunConfig(workers=(1, 8)), [{"CPU": 1.0}])


def test_an_error_of_an_earlier_start_does_not_end_this_one(tmp_path: Path):
    run = RunDir(tmp_path)
    assert not failed_since(run, 1000.0)
    write_json(run.error_path, {"message": "no", "stage": "search"})
    os.utime(run.error_path, (900.0, 900.0))
    assert not failed_since(run, 1000.0)
    os.utime(run.error_path, (1001.0, 1001.0))
    assert failed_since(run, 1000.0)
