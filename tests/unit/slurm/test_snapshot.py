import json
import subprocess
from pathlib import Path

import pytest

from harness.errors import UserError
from slurm import snapshot


def git(folder: Path, *arguments: str) -> str:
    who = ["-c", "user.name=ada", "-c", "user.email=ada@example.org"]
    return subprocess.run(
        ["git", "-C", str(folder), *who, *arguments], check=True, capture_output=True, text=True
    ).stdout


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    folder = tmp_path / "check out"
    (folder / "pkg").mkdir(parents=True)
    (folder / "pkg" / "code.py").write_text("x = 1\n")
    (folder / "pkg" / "junk.pyc").write_text("junk")
    (folder / ".gitignore").write_text("/data/\n*.pyc\n")
    (folder / "data").mkdir()
    (folder / "data" / "images").write_text("many")
    git(folder, "init", "-q")
    git(folder, "add", ".")
    git(folder, "commit", "-qm", "one")
    (folder / "new space.toml").write_text("a = 1\n")
    return folder


def test_copy_holds_the_code_and_links_the_data(checkout: Path, tmp_path: Path):
    code = snapshot.copy_code(checkout, tmp_path / "run")
    (checkout / "pkg" / "code.py").write_text("x = 2\n")
    (checkout / "new space.toml").unlink()
    assert (code / "pkg" / "code.py").read_text() == "x = 1\n"
    assert (code / "new space.toml").read_text() == "a = 1\n"
    assert not (code / "pkg" / "junk.pyc").exists()
    assert not (code / ".git").exists()
    assert (code / "data").is_symlink()
    assert (code / "data" / "images").read_text() == "many"
    (code / "runs" / "result").write_text("1")
    assert (checkout / "runs" / "result").read_text() == "1"
    assert oct(code.stat().st_mode & 0o777) == "0o700"


@pytest.mark.parametrize("runs", ["runs/slurm", "out"])
def test_results_that_git_does_not_ignore_are_shared_and_never_copied(checkout: Path, runs: str):
    """Else each copy would hold all earlier ones, and what the command writes into `runs/` would stay in its copy."""
    for name in ("earlier", "now"):
        (checkout / runs / name).mkdir(parents=True)
        (checkout / runs / name / "submission.json").write_text("{}")
        (checkout / runs / name / "big").write_text("x")
    (checkout / runs / "note.txt").write_text("of the project, beside the records")
    code = snapshot.copy_code(checkout, checkout / runs / "now")
    assert (code / "pkg" / "code.py").read_text() == "x = 1\n"
    assert (code / "runs").resolve() == checkout / "runs"
    assert (code / runs / "note.txt").is_file()
    assert runs != "out" or not (code / "out" / "earlier").exists()


def test_copy_without_git_leaves_out_caches_and_results(tmp_path: Path):
    folder = tmp_path / "plain"
    for name in ("__pycache__", "runs", ".venv"):
        (folder / name).mkdir(parents=True)
        (folder / name / "file").write_text("x")
    (folder / "job.py").write_text("x")
    assert snapshot.files_of(folder) == [Path("job.py")]
    code = snapshot.copy_code(folder, tmp_path / "run")
    assert (code / ".venv").is_symlink(), "a command may name the interpreter by a relative path"


def test_too_much_code_is_refused_with_the_largest_files(
    checkout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (checkout / "weights.bin").write_bytes(b"x" * (3 << 20))
    monkeypatch.setattr(snapshot, "LIMIT_BYTES", 1 << 20)
    with pytest.raises(UserError, match=r"weights\.bin \(3 MiB\).*--no-snapshot"):
        snapshot.copy_code(checkout, tmp_path / "run")


def test_record_tells_commit_changes_and_no_secret(checkout: Path, tmp_path: Path):
    (checkout / "pkg" / "code.py").write_text("x = 3\n")
    target = tmp_path / "run"
    target.mkdir()
    snapshot.record(
        target, checkout, {"AWS_SECRET_ACCESS_KEY": "hush", "RAY_AUTH_TOKEN": "hush", "LOADEDMODULES": "a:b"}
    )
    code = json.loads((target / "code.json").read_text())
    assert code["commit"] == git(checkout, "rev-parse", "HEAD").strip()
    assert set(code["changed_files"]) == {"pkg/code.py", '"new space.toml"'}
    assert "+x = 3" in (target / "changes.diff").read_text()
    environment = json.loads((target / "environment.json").read_text())
    assert environment["modules"] == ["a", "b"]
    assert "submitit" in environment["packages"]
    assert "hush" not in (target / "environment.json").read_text()
    assert oct((target / "environment.json").stat().st_mode & 0o777) == "0o600"
