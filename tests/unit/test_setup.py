"""Set-up scripts: what they find missing, what they say, and that they leave the machine as they found it."""

import ast
import importlib.metadata
import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from scripts import bootstrap, console, debian, services
from scripts.console import SetupError, diagnose

ROOT = Path(__file__).resolve().parents[2]


def program(folder: Path, name: str, script: str) -> Path:
    path = folder / name
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return path


def setup_sh(path: str, **environment: str) -> subprocess.CompletedProcess[str]:
    argv = ["/bin/sh", str(ROOT / "scripts/setup.sh"), "some.module"]
    return subprocess.run(
        argv, env={"PATH": path, **environment}, capture_output=True, text=True, timeout=60, check=False
    )


def fake_python(folder: Path, name: str, version: str) -> Path:
    """Answers the two questions of setup.sh, and shows what it is handed."""
    new_enough = tuple(map(int, version.split("."))) >= (3, 11)
    answers = (
        f'case "$2" in *print*) echo {version};; *SystemExit*) exit {int(not new_enough)};; *) echo {name} "$@";; esac'
    )
    return program(folder, name, answers)


def test_the_first_python_that_is_new_enough_is_taken(tmp_path: Path) -> None:
    (tmp_path / "with blank").mkdir()
    folder = tmp_path / "with blank"
    fake_python(folder, "python3", "3.9.2")
    fake_python(folder, "python3.12", "3.12.1")
    path = f"{folder}:/usr/bin:/bin"
    if Path("/usr/bin/python3.11").exists():
        fake_python(folder, "python3.11", "3.10.0")
    outcome = setup_sh(path)
    assert outcome.stdout.strip() == "python3.12 -m some.module"


@pytest.mark.parametrize("version", ["3.10.9", "2.7.18"])
def test_an_old_python_is_named_with_the_remedy(tmp_path: Path, version: str) -> None:
    (tmp_path / "a b").mkdir()
    old = fake_python(tmp_path / "a b", "my-python", version)
    outcome = setup_sh("/usr/bin:/bin", PYTHON=str(old))
    assert outcome.returncode == 2
    assert f"{old} is {version}" in outcome.stderr
    assert "make setup PYTHON=" in outcome.stderr
    assert outcome.stdout == ""


def test_no_python_at_all() -> None:
    outcome = setup_sh("/usr/bin:/bin", PYTHON="/nowhere/python3")
    assert outcome.returncode == 2
    assert "not found: /nowhere/python3" in outcome.stderr


@pytest.mark.parametrize(
    ("output", "remedy"),
    [
        ("ERROR: Could not install packages due to an OSError: [Errno 28] No space left on device", "disk is full"),
        (
            "WARNING: Retrying ... NewConnectionError: [Errno 111]\nERROR: No matching distribution found for wheel",
            "index",
        ),
        ("socket.gaierror: [Errno -3] Temporary failure in name resolution", "check the network"),
        ("ERROR: No matching distribution found for torch==2.13.0+cpu", "offers no torch==2.13.0+cpu"),
        ("libffcv.cpp:1:10: fatal error: turbojpeg.h: No such file or directory", "C++ compiler"),
        ("error: command '/usr/bin/g++' failed with exit code 1", "C++ compiler"),
        ("E: Unable to locate package libopencv-core-dev", "no libopencv-core-dev; refresh"),
        ("E: Could not get lock /var/lib/dpkg/lock-frontend", "another package manager"),
        ("something never seen\nand more", "    and more"),
    ],
)
def test_a_failed_command_is_explained(output: str, remedy: str) -> None:
    assert remedy in diagnose(output)


def test_a_failed_command_leaves_its_output_in_the_log(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text("Errno 28 of an earlier command\n")
    with pytest.raises(SetupError, match="wrong thing") as failure:
        console.run(["/bin/sh", "-c", "echo wrong thing; exit 3"], log)
    assert "disk" not in str(failure.value)
    assert str(log) in str(failure.value)
    assert "wrong thing" in log.read_text()


def test_a_long_command_shows_signs_of_life(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(console, "HEARTBEAT_S", 0.05)
    go_on = tmp_path / "go-on"
    os.mkfifo(go_on)
    printed: list[str] = []

    def heard(*words: object, **_: object) -> None:
        printed.append(" ".join(map(str, words)))
        if len(printed) == 1:
            go_on.write_text("now")

    monkeypatch.setattr("builtins.print", heard)
    console.run(["/bin/sh", "-c", f"echo fetching; cat '{go_on}'"], tmp_path / "log")
    assert printed


def test_missing_packages_go_by_what_they_provide(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "opencv2").mkdir()
    (tmp_path / "opencv2" / "core.hpp").touch()
    program(tmp_path, "g++", "")
    monkeypatch.setattr(bootstrap, "INCLUDE_FOLDERS", (tmp_path,))
    monkeypatch.setenv("PATH", str(tmp_path))
    series = f"python{'.'.join(map(str, bootstrap.sys.version_info[:2]))}"
    monkeypatch.setattr(bootstrap.sysconfig, "get_path", lambda name: str(tmp_path))
    missing = bootstrap.missing_packages()
    assert missing == ["pkg-config", "libopencv-imgproc-dev", "libturbojpeg0-dev", f"{series}-dev"]


def test_without_rights_the_line_for_the_administrator_is_printed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    program(tmp_path, "apt-get", "exit 1")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(debian.os, "geteuid", lambda: 1000)
    with pytest.raises(SetupError) as failure:
        debian.install(["pkg-config", "g++"], tmp_path / "log", "building FFCV")
    assert "apt-get update && apt-get install -y --no-install-recommends pkg-config g++" in str(failure.value)
    assert not (tmp_path / "log").exists()


def test_stale_package_lists_are_refreshed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    calls = tmp_path / "calls"
    program(
        tmp_path,
        "apt-get",
        f'echo "$@" >> {calls}; case "$*" in *update*) touch {tmp_path}/fresh;; esac; test -e {tmp_path}/fresh',
    )
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(debian.os, "geteuid", lambda: 0)
    debian.install(["bc"], tmp_path / "log", "testing")
    verbs = [
        next(word for word in line.split() if word in ("install", "update")) for line in calls.read_text().splitlines()
    ]
    assert verbs == ["install", "update", "install"]
    assert "--no-install-recommends bc" in calls.read_text()


@pytest.mark.parametrize("before", [None, "#!/bin/sh\nexit 0\n", debian.POLICY_TEXT])
def test_the_machines_own_policy_comes_back(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, before: str | None
) -> None:
    policy = tmp_path / "policy-rc.d"
    monkeypatch.setattr(debian, "POLICY", policy)
    monkeypatch.setattr(debian, "POLICY_ASIDE", tmp_path / "aside")
    if before:
        policy.write_text(before)
    with suppress(SetupError), debian.no_daemons_started():
        assert subprocess.run([str(policy), "slurmd", "start"], check=False).returncode == 101
        raise SetupError("in the midst of it")
    left = policy.read_text() if policy.exists() else None
    assert left == (None if before == debian.POLICY_TEXT else before)
    assert not (tmp_path / "aside").exists()


def test_a_policy_left_aside_by_a_killed_run_comes_back(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(debian, "POLICY", tmp_path / "policy-rc.d")
    monkeypatch.setattr(debian, "POLICY_ASIDE", tmp_path / "aside")
    debian.POLICY.write_text(debian.POLICY_TEXT)
    debian.POLICY_ASIDE.write_text("the machine's own")
    with debian.no_daemons_started():
        pass
    assert debian.POLICY.read_text() == "the machine's own"


def test_services_installed_by_other_means_count(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(services.debian, "installed", lambda names: {"postgresql"})
    program(tmp_path, "chromium", "")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(services.shutil, "which", lambda name, path: Path(path.split(":")[0], name).exists() or None)
    assert services.missing_services() == [name for name in services.SERVICES if name not in ("postgresql", "chromium")]


def test_the_stamp_knows_what_matters(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("pyproject.toml", "constraints.txt"):
        (tmp_path / name).write_text((ROOT / name).read_text())
    (tmp_path / "scripts").mkdir()
    monkeypatch.setattr(bootstrap, "ROOT", tmp_path)
    monkeypatch.setattr(bootstrap, "CONSTRAINTS", tmp_path / "constraints.txt")
    first = bootstrap.fingerprint()
    project = (tmp_path / "pyproject.toml").read_text()
    (tmp_path / "pyproject.toml").write_text(project.replace("line-length = 120", "line-length = 119"))
    assert bootstrap.fingerprint() == first
    (tmp_path / "pyproject.toml").write_text(project.replace('"tqdm"', '"tqdm>=4"'))
    second = bootstrap.fingerprint()
    (tmp_path / "constraints.txt").write_text("torch==9\n")
    third = bootstrap.fingerprint()
    monkeypatch.setenv("TORCH_INDEX", "somewhere")
    assert len({first, second, third, bootstrap.fingerprint()}) == 4


def requirements() -> list[Requirement]:
    """What `make setup` installs by name: the project's own, with the extras that its development extra names."""
    project = bootstrap.tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    wanted = [Requirement(text) for text in [*project["dependencies"], *extras["dev"], bootstrap.FFCV, "setuptools"]]
    own = [wish for wish in wanted if wish.name == project["name"]]
    inherited = [Requirement(text) for wish in own for extra in wish.extras for text in extras[extra]]
    return [wish for wish in [*wanted, *inherited] if wish not in own]


def test_every_import_is_declared() -> None:
    declared = {wish.name.lower() for wish in requirements()}
    rooms = ("sbs", "harness", "sweeps", "slurm", "tests", "scripts")
    imported: dict[str, str] = {}
    for path in (path for room in rooms for path in (ROOT / room).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                imported |= {alias.name.split(".")[0]: str(path) for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                imported[node.module.split(".")[0]] = str(path)
    distributions = importlib.metadata.packages_distributions()
    undeclared = {
        name: path
        for name, path in imported.items()
        if name not in sys.stdlib_module_names
        and name not in rooms
        and not declared & {owner.lower() for owner in distributions.get(name, [])}
    }
    assert not undeclared


def test_every_requirement_is_pinned() -> None:
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    pinned = {line.split("==")[0].lower().replace("_", "-") for line in lines}
    names = {wish.name for wish in requirements()}
    assert "psycopg2-binary" in names
    assert names <= pinned
    assert all("==" in line and "+" not in line and "://" not in line for line in lines)
