"""`ray job submit` on a Ray cluster that asks for a token, from a clean clone, as docs/slurm.md says."""

import json
import os
import re
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent
SPACE = """\
name = "one"
recipe = "digits_resnet20"
methods = ["full_precision"]
seeds = [0]
"""


@pytest.fixture
def cluster(tmp_path: Path, free_port: int) -> Iterator[dict[str, str]]:
    """A Ray head on free ports; yields the environment that its owner uses."""
    token = tmp_path / "token"
    token.touch(mode=0o600)
    token.write_text(secrets.token_hex(32))
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "SLURM_"))}
    kept |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token), "RAY_USAGE_STATS_ENABLED": "0"}
    kept |= {"PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
    kept |= {"RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0"}
    options = ["--head", "--block", "--node-ip-address=127.0.0.1", "--port=0", "--dashboard-port=0", "--num-cpus=2"]
    options += ["--dashboard-agent-listen-port=0", f"--ray-client-server-port={free_port}", "--min-worker-port=0"]
    options += ["--max-worker-port=0", f"--object-store-memory={100 << 20}"]
    log = tmp_path / "head.log"
    scratch = Path("/tmp") / f"ray-{os.getpid()}"  # short: Ray's sockets have at most 107 characters
    with log.open("wb") as output:
        head = subprocess.Popen(
            [BIN / "ray", "start", *options, f"--temp-dir={scratch}"],
            env=kept, stdout=output, stderr=output, cwd=tmp_path, start_new_session=True,
        )  # fmt: skip
    try:
        end = time.monotonic() + 60
        while not (found := re.search(r"RAY_API_SERVER_ADDRESS='(http[^']+)'", log.read_text())):
            assert head.poll() is None, log.read_text()
            assert time.monotonic() < end, log.read_text()
            time.sleep(0.2)
        yield kept | {"RAY_API_SERVER_ADDRESS": found[1]}
    finally:
        head.terminate()
        try:
            head.wait(20)
        finally:
            if head.poll() is None:
                os.killpg(head.pid, signal.SIGKILL)
            subprocess.run(["rm", "-rf", str(scratch)], check=True)


def job(environ: dict[str, str], clone: Path, *command: str) -> subprocess.CompletedProcess[str]:
    submit = [str(BIN / "ray"), "job", "submit", "--working-dir", ".", "--", *command]
    return subprocess.run(submit, cwd=clone, env=environ, capture_output=True, text=True, timeout=200, check=False)


@pytest.mark.ray
@pytest.mark.timeout(300)
def test_sweep_as_a_ray_job_from_a_clean_clone(tmp_path: Path, cluster: dict[str, str]):
    clone, out = tmp_path / "clone", tmp_path / "shared" / "runs"
    subprocess.run(["git", "clone", "-q", "--no-hardlinks", str(REPOSITORY), str(clone)], check=True)
    (clone / "one.toml").write_text(SPACE)
    short = [
        "pretrain.epochs=1",
        "pretrain.warmup_epochs=0",
        "run.workers=1",
        f"data.dir={tmp_path / 'shared' / 'digits'}",
    ]
    command = ["python", "-m", "sweeps", "run", "one.toml", "--out", str(out)]
    command += [word for setting in short for word in ("--set", setting)]
    done = job(cluster, clone, *command)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    (row,) = json.loads((out / "one" / "pareto.json").read_text())["rows"]
    assert row["method"] == "full_precision"
    assert row["gbops"] == pytest.approx(40_813_184 * 1024 / 1e9, rel=1e-4)  # ResNet-20's MACs for ten classes
    assert not (clone / "runs").exists()
    (provenance,) = out.glob("one/trials/*/provenance.json")
    told = json.loads(provenance.read_text())["starts"][-1]["job"]
    assert told["RAY_SUBMISSION_ID"].startswith("raysubmit_")
    assert told["RAY_JOB_ID"]
    assert told["RAY_NODE_ID"]

    wrong = tmp_path / "wrong"
    wrong.write_text("0" * 64)
    refused = job(cluster | {"RAY_AUTH_TOKEN_PATH": str(wrong)}, clone, "true")
    assert refused.returncode != 0
    assert "token" in (refused.stdout + refused.stderr).lower()
