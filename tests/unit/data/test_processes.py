"""Loading processes: answers in order, and what becomes of everybody where one of them, or the program, ends."""

import gc
import os
import re
import signal
import subprocess
import sys
import threading
import time
from multiprocessing.connection import wait
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from harness.data.processes import LoadingProcesses
from harness.errors import UserError
from tests.integration.waiting import wait_for

MEBI = 1 << 20  # a pipe holds less
ENVIRONMENT = os.environ | {"PYTHONPATH": str(Path(__file__).parents[3])}


def product(a: int, b: int, request: int) -> int:
    """Answers that tell job and request."""
    return a * b + request


def filled(request: int) -> NDArray[np.uint8]:
    """A large answer."""
    return np.full(MEBI, request, np.uint8)


def pid_of(request: int) -> int:
    """Which process answers."""
    return os.getpid()


def refused(request: int) -> int:
    """An error of the user's for one request of three, a defect for another."""
    if request == 1:
        raise UserError("the image is no image")
    if request == 2:
        raise EOFError("of a codec")
    return request


def total(numbers: NDArray[np.int64], request: int) -> int:
    """A large job."""
    return int(numbers.sum()) + request


class Heavy:
    """A `make` that is large, and ends its process where it is unpickled."""

    def __init__(self, status: int | None) -> None:
        self.status, self.weight = status, bytes(4 * MEBI)

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__ = state
        if self.status is not None:
            os._exit(self.status)

    def __call__(self, request: int) -> int:
        return len(self.weight) + request


def processes(make: object, count: int = 2) -> LoadingProcesses:
    return LoadingProcesses(make, count, what="train.beton", limit_s=60.0)  # type: ignore[arg-type]


def pids(loading: LoadingProcesses) -> list[int]:
    return [process.pid or 0 for process, _ in loading._processes]


def gone(numbers: list[int]) -> bool:
    """Whether the processes have ended, reaped or not."""
    return not any(Path("/proc", str(number), "exe").exists() for number in numbers)


def answers_are_waiting(loading: LoadingProcesses) -> None:
    for _, pipe in loading._processes:
        assert pipe.poll(60)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_answers_come_in_the_order_of_the_requests_and_belong_to_their_job(count: int):
    loading = processes(product, count)
    for length in (0, 1, 2, 3, 7, 20):
        assert list(loading.answers((length, 100), range(length))) == [length * 100 + k for k in range(length)]
    left = loading.answers((1, 1), range(9))
    next(left)
    assert list(loading.answers((2, 2), range(9))) == [4 + k for k in range(9)], "owed answers are not taken for others"
    with pytest.raises(RuntimeError, match="another epoch has begun"):
        next(left)
    left = loading.answers((3, 3), range(9))
    next(left)
    loading.close()
    with pytest.raises(RuntimeError, match="the loader was closed"):
        next(left)


def test_large_makes_jobs_and_answers():
    numbers = np.arange(MEBI, dtype=np.int64)
    for make, job, want in ((Heavy(None), (), 4 * MEBI), (total, (numbers,), MEBI * (MEBI - 1) // 2)):
        loading = processes(make)
        assert list(loading.answers(job, range(5))) == [want + k for k in range(5)]
        loading.close()
    loading = processes(filled)
    assert [int(answer[-1]) for answer in loading.answers((), range(9))] == list(range(9))
    loading.close()


def test_errors_of_answers_end_the_epoch_and_not_the_processes():
    loading = processes(refused)
    before = pids(loading)
    with pytest.raises(UserError, match="^the image is no image$"):
        list(loading.answers((), [0, 1, 0]))
    with pytest.raises(RuntimeError, match=r"^in a loading process:\n(.|\n)*in refused\n(.|\n)*EOFError: of a codec"):
        list(loading.answers((), [0, 2, 0]))
    assert list(loading.answers((), [0, 3])) == [0, 3]
    assert pids(loading) == before
    loading.close()


def test_a_death_is_an_error_where_an_answer_is_asked_for_and_nowhere_else():
    loading = processes(pid_of)
    assert set(loading.answers((), range(4))) == set(pids(loading))
    sentinels = [process.sentinel for process, _ in loading._processes]
    first, other = pids(loading)
    os.kill(first, signal.SIGKILL)
    assert wait(sentinels[:1], 30), "nothing is raised while it dies"
    with pytest.raises(
        UserError,
        match=rf"^a loading process of train.beton \(pid {first}\) ended by SIGKILL. If memory ran out, lower",
    ):
        list(loading.answers((), range(4)))
    assert loading.closed
    assert gone([first, other])


def test_a_death_half_way_through_an_answer():
    """With no request waiting, which the kernel would tell as a connection that was reset."""
    loading = processes(filled, 1)
    answers = loading.answers((), [0, 1])
    next(answers)
    answers_are_waiting(loading)  # the rest does not fit
    os.kill(pids(loading)[0], signal.SIGKILL)
    with pytest.raises(UserError, match="ended by SIGKILL"):
        next(answers)


def test_deaths_at_any_moment():
    for delay_s in np.random.default_rng(0).uniform(0, 0.05, 10).tolist():
        loading = processes(filled)
        killing = threading.Timer(delay_s, os.kill, (pids(loading)[1], signal.SIGKILL))
        killing.start()
        with pytest.raises(UserError, match="ended by SIGKILL"):
            for _ in loading.answers((), range(200_000)):
                pass
        killing.join()


@pytest.mark.parametrize("status", [0, 3])
def test_a_death_where_make_arrives(status: int):
    with pytest.raises(UserError, match=rf"\(pid \d+\) ended with status {status}; its words are on stderr\."):
        list(processes(Heavy(status)).answers((), range(4)))


def test_a_death_at_the_start_leaves_nobody_waiting_to_write(tmp_path: Path):
    """A program whose own file cannot be imported a second time; `make` is more than a pipe holds."""
    program = tmp_path / "program.py"
    program.write_text(
        "import os\n"
        "if __name__ == '__mp_main__': os._exit(3)\n"
        "from harness.errors import UserError\n"
        "from tests.unit.data.test_processes import Heavy, processes\n"
        "try: processes(Heavy(None))\n"
        "except UserError as error: print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, str(program)], env=ENVIRONMENT, capture_output=True, text=True, check=False, timeout=60
    )
    assert re.fullmatch(r"a loading process of train.beton \(pid \d+\) ended with status 3; .*\n", done.stdout), done


def test_standing_still_is_an_error():
    loading = processes(time.sleep)
    loading._limit_s = 1.0  # only now: their start takes its time
    before = pids(loading)
    with pytest.raises(UserError, match=r"of train.beton \(pid \d+\) made no batch for 1 s: does the storage still"):
        list(loading.answers((), [0.0, 0.0, 3600.0, 0.0]))
    assert loading.closed
    assert gone(before)


def test_an_interrupt_while_it_waits_ends_them(monkeypatch: pytest.MonkeyPatch):
    """Half of an answer may have been read: none is taken for another."""
    loading = processes(filled)
    answers = loading.answers((), range(9))
    next(answers)

    def interrupted() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(loading._processes[1][1], "recv", interrupted)
    with pytest.raises(KeyboardInterrupt):
        next(answers)
    assert loading.closed
    with pytest.raises(RuntimeError, match="train.beton: the loader was closed"):
        next(loading.answers((), range(9)))


def test_an_end_that_was_interrupted_is_made_again(monkeypatch: pytest.MonkeyPatch):
    loading = processes(product)
    before = pids(loading)

    def interrupted() -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(loading._processes[1][0], "kill", interrupted)
        with pytest.raises(KeyboardInterrupt):
            loading.close()
    assert not gone(before)
    loading.close()
    assert loading.closed
    assert gone(before)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR2])
def test_signals_to_the_group_do_not_end_them_not_even_at_the_start(number: signal.Signals):
    """As SLURM sends them to a whole step: the program may want more batches to stop well."""
    loading = processes(product)
    handler, mask = signal.getsignal(number), signal.pthread_sigmask(signal.SIG_BLOCK, ())
    for pid in pids(loading):
        os.kill(pid, number)
    assert list(loading.answers((1, 1), range(4))) == [1, 2, 3, 4]
    loading.close()
    starting = LoadingProcesses.__new__(LoadingProcesses)
    sent = []

    def start() -> None:
        LoadingProcesses._start(starting)
        sent.append(starting._processes[-1][0].pid)
        os.kill(sent[-1], number)

    starting._start = start  # type: ignore[method-assign]
    starting.__init__(product, 2, what="train.beton", limit_s=60.0)  # type: ignore[misc]
    assert list(starting.answers((1, 1), range(4))) == [1, 2, 3, 4]
    assert len(sent) == 2
    starting.close()
    assert signal.getsignal(number) is handler
    assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == mask


def test_they_end_with_their_object():
    loading = processes(product)
    before = pids(loading)
    assert not gone(before)
    del loading
    gc.collect()
    assert gone(before)


PROGRAM = """
import os, sys, time
from tests.unit.data.test_processes import filled, pids, processes
if __name__ == "__main__":
    loading = processes(filled)
    next(loading.answers((), range(9)))
    if sys.argv[1] == "forks" and os.fork() == 0:
        time.sleep(60)
    print(*pids(loading), flush=True)
    if sys.argv[1] != "leaves":
        sys.stdin.read()
"""


@pytest.mark.parametrize("how", ["leaves", "is killed", "forks"])
def test_they_end_with_the_program(how: str):
    program = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, how], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        start_new_session=True, env=ENVIRONMENT,
    )  # fmt: skip
    try:
        assert program.stdout is not None
        theirs = [int(pid) for pid in program.stdout.readline().split()]
        assert len(theirs) == 2
        if how == "leaves":
            assert program.wait(60) == 0
        else:
            program.kill()
            program.wait(60)
        wait_for(lambda: gone(theirs), 30, "the end of the loading processes")
    finally:
        os.killpg(program.pid, signal.SIGKILL) if how == "forks" else program.kill()
        program.communicate(timeout=60)
