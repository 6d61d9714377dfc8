"""Looks at the job's Ray cluster from inside and leaves with the status it is given. `ray_hello.py STATUS`."""

import json
import os
import socket
import stat
import subprocess
import sys
import time
from pathlib import Path

started = time.time()

import ray  # noqa: E402 - the first line comes before the import
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy  # noqa: E402


@ray.remote(num_cpus=1)
def where() -> dict[str, str]:
    return {"host": socket.gethostname(), "tmp": os.environ["TMPDIR"], "cwd": str(Path.cwd())}


def who_enters(strangers: dict[str, dict[str, str]]) -> dict[str, bool]:
    """Which of those with these variables get into the cluster."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith("RAY_AUTH")}
    command = [sys.executable, "-c", "import ray; ray.init(log_to_driver=False)"]
    tries = {
        name: subprocess.Popen(command, env=clean | environ, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        for name, environ in strangers.items()
    }
    return {name: process.wait(60) == 0 for name, process in tries.items()}


def main() -> int:
    ray.init(log_to_driver=False)
    nodes = [node for node in ray.nodes() if node["Alive"]]
    tasks = [where.options(scheduling_strategy=NodeAffinitySchedulingStrategy(n["NodeID"], soft=False)) for n in nodes]
    token = Path(os.environ["RAY_AUTH_TOKEN_PATH"])
    wrong = Path(os.environ["TMPDIR"]) / "wrong"
    wrong.write_text("0" * 64)
    facts = {
        "started": started,
        "tasks": ray.get([task.remote() for task in tasks]),
        "cpus": ray.cluster_resources()["CPU"],
        "memory": [node["Resources"]["memory"] for node in nodes],
        "token_mode": stat.filemode(token.stat().st_mode),
        "folder_mode": stat.filemode(token.parent.stat().st_mode),
        "enters": who_enters(
            {
                "right token": {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token)},
                "wrong token": {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(wrong)},
                "no token": {"RAY_AUTH_MODE": "disabled"},
            }
        ),
    }
    Path("facts.json").write_text(json.dumps(facts))
    print("ended", time.time(), flush=True)
    return int(sys.argv[1])


if __name__ == "__main__":
    sys.exit(main())
