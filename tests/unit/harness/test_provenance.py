import json
import subprocess
from importlib.metadata import version
from pathlib import Path

import pytest

from harness import provenance
from harness.provenance import facts, record_start, uncommitted
from harness.run_dir import RunDir


def test_code_versions_and_job_are_told(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("SLURM_JOB_ID", "4711")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "2")
    told = facts()
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    assert told["commit"] == (commit or None)
    assert told["versions"]["torch"] == version("torch")
    assert told["job"] == {"SLURM_JOB_ID": "4711", "SLURM_RESTART_COUNT": "2"}


def test_every_start_is_kept(tmp_path: Path):
    run = RunDir(tmp_path).create()
    record_start(run, launcher="process", world=1)
    record_start(run, launcher="ray.train 2.60.0", world=2)
    starts = json.loads(run.provenance_path.read_text())["starts"]
    assert [(start["launcher"], start["world_size"]) for start in starts] == [("process", 1), ("ray.train 2.60.0", 2)]
    assert starts[0]["time"] <= starts[1]["time"]


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """A repository with changes since its commit, and with a file that git does not track."""
    folder = tmp_path / "code"
    (folder / "package").mkdir(parents=True)
    for name in ("package/code.py", "api_token.txt", ".env"):
        (folder / name).write_text("first\nsecond\n")
    git = ["git", "-C", str(folder), "-c", "user.name=n", "-c", "user.email=e"]
    subprocess.run([*git, "init", "-q"], check=True)
    subprocess.run([*git, "add", "."], check=True)
    subprocess.run([*git, "commit", "-qm", "start"], check=True)
    for name in ("package/code.py", "api_token.txt", ".env"):
        (folder / name).write_text("first\nchanged\n")
    (folder / "package" / "untracked.py").write_text("private\n")
    return folder / "package"


def test_the_changes_of_tracked_files_are_told_and_no_secrets(repository: Path):
    text = uncommitted(repository)
    assert "+++ b/package/code.py" in text
    assert "-second\n+changed\n" in text
    assert text.count("+changed") == 1, "a file named after a secret was told"
    assert "private" not in text
    assert uncommitted(repository.parent.parent) == "", "no repository, no changes"


def test_large_changes_are_cut_and_say_so(repository: Path, monkeypatch: pytest.MonkeyPatch):
    (repository / "code.py").write_text("x\n" * 10_000)
    monkeypatch.setattr(provenance, "DIFF_LIMIT_BYTES", 1000)
    uncommitted.cache_clear()
    text = uncommitted(repository)
    assert text.endswith(" bytes\n")
    assert "... cut after 1,000 of" in text
    assert len(text) < 1100
    uncommitted.cache_clear()


def test_a_start_names_the_file_with_its_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    run = RunDir(tmp_path).create()
    monkeypatch.setattr(provenance, "uncommitted", lambda: "diff\n")
    record_start(run, launcher="process", world=1)
    record_start(run, launcher="process", world=1)
    starts = json.loads(run.provenance_path.read_text())["starts"]
    assert [(tmp_path / start["changes"]).read_text() for start in starts] == ["diff\n", "diff\n"]
    assert len(list(tmp_path.glob("changes-*.diff"))) == 1
    monkeypatch.setattr(provenance, "uncommitted", lambda: "")
    record_start(run, launcher="process", world=1)
    assert "changes" not in json.loads(run.provenance_path.read_text())["starts"][-1]
