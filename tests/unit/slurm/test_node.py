import pytest

from harness.errors import UserError
from slurm.node import Place, address, interfaces, ray_memory_bytes

STEP = {
    "SLURM_JOB_ID": "41",
    "SLURM_RESTART_COUNT": "2",
    "SLURM_PROCID": "1",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_NTASKS": "9",
    "SLURMD_NODENAME": "n7",
    "SLURM_CPUS_PER_TASK": "16",
    "SLURM_CPUS_ON_NODE": "64",
    "SLURM_MEM_PER_NODE": "2000",
    "SLURM_GPUS_ON_NODE": "8",
}


def test_place_in_a_step():
    place = Place.from_environ(STEP)
    assert (place.life, place.rank, place.world, place.node_name) == ("41.2", 1, 4, "n7")
    assert (place.cpus, place.gpus, place.memory_mib, place.under_slurm) == (16, 8, 2000, True)


@pytest.mark.parametrize(
    ("changes", "field", "expected"),
    [
        ({"SLURM_CPUS_PER_TASK": ""}, "cpus", 64),  # a whole node
        ({"SLURM_GPUS_ON_NODE": "a100:4"}, "gpus", 4),
        ({"SLURM_GPUS_ON_NODE": "a100:2,v100:1"}, "gpus", 3),
        ({"SLURM_GPUS_ON_NODE": "", "SLURM_STEP_GPUS": "0,3"}, "gpus", 2),
        ({"SLURM_GPUS_ON_NODE": ""}, "gpus", 0),
        ({"SLURM_MEM_PER_NODE": "0"}, "memory_mib", None),  # --mem=0: all of it, how much is not said
        ({"SLURM_MEM_PER_NODE": "0", "SLURM_MEM_PER_CPU": "500"}, "memory_mib", 32000),
    ],
)
def test_variables_that_sites_leave_out_or_write_otherwise(changes: dict[str, str], field: str, expected: object):
    assert getattr(Place.from_environ(STEP | changes), field) == expected


def test_task_of_an_array_never_goes_by_the_array_s_own_id():
    place = Place.from_environ(STEP | {"SLURM_JOB_ID": "40", "SLURM_ARRAY_JOB_ID": "40", "SLURM_ARRAY_TASK_ID": "3"})
    assert place.job_id == "40_3"


def test_place_without_slurm_counts_lives_itself():
    place = Place.from_environ({"SUBMITIT_LOCAL_JOB_ID": "99", "CUDA_VISIBLE_DEVICES": "0,1"}, lives_before=3)
    assert (place.life, place.rank, place.world, place.gpus, place.under_slurm) == ("99.3", 0, 1, 2, False)


def test_memory_is_the_job_s_share_and_leaves_room():
    memory, store = ray_memory_bytes(10_000, None)
    assert memory is not None
    assert store is not None
    assert store == 3_000 << 20
    assert memory + store == (10_000 - 256) << 20
    assert ray_memory_bytes(None, None) == (None, None)
    assert ray_memory_bytes(None, 5) == (None, 5)
    with pytest.raises(UserError, match="too little is left"):
        ray_memory_bytes(1000, 900 << 20)


def test_address_of_a_named_interface():
    place = Place.from_environ(STEP)
    assert interfaces()["lo"] == "127.0.0.1"
    assert address(place, "lo") == "127.0.0.1"
    with pytest.raises(UserError, match=r"ib0.*n7.*lo \(127\.0\.0\.1\)"):
        address(place, "ib0")


def test_a_local_job_stays_on_the_loopback():
    assert address(Place.from_environ({}), None) == "127.0.0.1"
