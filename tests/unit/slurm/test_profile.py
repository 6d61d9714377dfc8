from pathlib import Path

import pytest

from harness.errors import UserError
from slurm.profile import load_profile, minutes, profile_names


@pytest.mark.parametrize(
    ("text", "expected"),
    [  # the six forms in the manual page of sbatch
        ("90", 90),
        ("90:30", 91),
        ("1:30:00", 90),
        ("2-12", 3600),
        ("2-12:30", 3630),
        ("1-00:00:01", 1441),
        ("0:00:30", 1),
    ],
)
def test_times_are_those_of_sbatch(text: str, expected: int):
    assert minutes(text) == expected


@pytest.mark.parametrize("text", ["", "1h", "1:2:3:4", "-5", "0", "1-2-3", "12:00:00 "[:-2] + "x"])
def test_other_times_are_refused(text: str):
    with pytest.raises(ValueError, match="time SLURM knows|longer than nothing"):
        minutes(text)


def test_unknown_key_names_the_nearest(tmp_path: Path):
    path = tmp_path / "site.toml"
    path.write_text("[job]\npartitoin = 'gpu'\n")
    with pytest.raises(UserError) as caught:
        load_profile(str(path))
    assert str(path) in str(caught.value)
    assert "job.partitoin" in str(caught.value)
    assert "did you mean 'partition'" in str(caught.value)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("job.nodes=0", ["job.nodes", "0"]),
        ("requeue.on_node_loss=panic", ["on_node_loss", "panic", "requeue", "ignore"]),
        ("job.partition='a b'", ["job.partition", "a b"]),
        ("job.extra={ 'mail-type' = [1] }", ["mail-type"]),
        ('node.setup=["a\\nb"]', ["node.setup"]),
        ("node.scratch='/a/path/that/is/far/too/long'", ["node.scratch", "107 bytes"]),
        ("node.container=['apptainer']", ["python", "interpreter inside it"]),
        ("requeue.warn_s=7200", ["warn_s = 7200", "job.time"]),
        ("job.time=soon", ["job.time", "soon", "HH:MM:SS"]),
    ],
)
def test_bad_value_is_one_message_with_key_and_value(override: str, words: list[str]):
    with pytest.raises(UserError) as caught:
        load_profile(None, [override])
    for word in words:
        assert word in str(caught.value)


def test_overrides_reach_every_section():
    profile = load_profile(None, ["job.qos=high", "node.gpus=8", "requeue.max=0", "ray.keep_logs=never", "job.time=90"])
    assert (profile.job.qos, profile.node.gpus, profile.requeue.max, profile.ray.keep_logs) == ("high", 8, 0, "never")
    assert profile.job.time == "90"


def test_shipped_profiles_are_valid_and_named():
    assert profile_names() == ["cpu_cluster", "gpu_cluster"]
    assert load_profile("gpu_cluster").node.gpus == 8
    assert load_profile("cpu_cluster").node.container[0] == "apptainer"
    with pytest.raises(UserError, match="did you mean 'gpu_cluster'"):
        load_profile("gpu_clutser")
    with pytest.raises(UserError, match="missing.toml"):
        load_profile("missing.toml")


def test_broken_toml_names_the_file(tmp_path: Path):
    path = tmp_path / "site.toml"
    path.write_text("[job\n")
    with pytest.raises(UserError, match=r"site\.toml is not valid TOML"):
        load_profile(str(path))
