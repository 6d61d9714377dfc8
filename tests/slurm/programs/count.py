"""A command that checkpoints: a chain of hashes, one link after another. `count.py STATE LINKS PACE_S`.

Asked to leave it stops at the next link and leaves with 85; run again it goes on. The last line printed is the result,
which an undisturbed run has in common with an interrupted one. Every link that is computed appends a line to STATE.all.
"""

import hashlib
import signal
import sys
import time
from pathlib import Path

leaving = False


def leave(_number, _frame):
    global leaving
    leaving = True


def main(state: Path, links: int, pace_s: float) -> int:
    signal.signal(signal.SIGTERM, leave)
    signal.signal(signal.SIGUSR2, leave)
    done, value = 0, "start"
    if state.exists():
        text, value = state.read_text().split()
        done = int(text)
    print(f"going on after link {done}", flush=True)
    while done < links:
        value = hashlib.sha256(value.encode()).hexdigest()
        done += 1
        with Path(f"{state}.all").open("a") as log:
            log.write(f"{done} {value}\n")
        scratch = state.with_suffix(".new")
        scratch.write_text(f"{done} {value}")
        scratch.rename(state)
        end = time.monotonic() + pace_s
        while time.monotonic() < end and not leaving:
            time.sleep(0.05)
        if leaving and done < links:
            print(f"leaving after link {done}", flush=True)
            return 85
    print(f"result {value}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])))
