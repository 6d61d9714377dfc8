"""Loading processes: each at a pipe of its own, so that a death is the end of that pipe, even half-way through a batch.

Not torch's DataLoader, for three things that it does where a process dies: all of its processes share one pipe, whose
reader waits for the rest of a batch that is half written; in the main thread it sets a SIGCHLD handler that raises
wherever the program happens to be; elsewhere it finds a death only after its whole time limit.
"""

import multiprocessing
import multiprocessing.util
import signal
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from typing import Any

from harness.errors import UserError

_AHEAD = 2  # requests that a process has at a time: one in work, one waiting
_GONE_WAIT_S = 5.0

_Process = tuple[SpawnProcess, "Connection[Any, Any]"]


class LoadingProcesses:
    """`count` processes that answer requests in turn, by `make(*request)`; `make` goes there once, pickled.

    They end with `close`, with this object or with this process, however it ends. `what` names their work in errors.
    """

    def __init__(self, make: Callable[..., Any], count: int, *, what: str, limit_s: float) -> None:
        self._what, self._limit_s = what, limit_s
        self._processes: list[_Process] = []
        self._owed = [0] * count
        self._turn: object = None
        # Unlike weakref.finalize, it surely runs before multiprocessing waits for processes that ignore SIGTERM.
        self._end = multiprocessing.util.Finalize(self, _end, (self._processes,), exitpriority=10)
        context = multiprocessing.get_context("spawn")
        for _ in range(count):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs, make), daemon=True)
            process.start()
            theirs.close()
            self._processes.append((process, ours))

    def answers(self, requests: Sequence[Any]) -> Iterator[Any]:
        """Yield the answers in the order of the requests.

        Raises `UserError` (the answer's own; a process died; none came in `limit_s` seconds), and RuntimeError with the
        traceback of any other error of `make`, or if `answers` was called again or the processes were closed since.
        """
        turn = self._turn = object()
        count = len(self._processes)
        for k in range(count):
            while self._owed[k]:  # to answers that nobody waits for any more
                self._take(k)
        for number in range(min(_AHEAD * count, len(requests))):
            self._ask(number % count, requests[number])
        for number in range(len(requests)):
            if self._turn is not turn:
                raise RuntimeError(f"{self._what}: another epoch has begun, or the loader was closed")
            answer = self._take(number % count)
            if number + _AHEAD * count < len(requests):
                self._ask(number % count, requests[number + _AHEAD * count])
            if isinstance(answer, Exception):
                raise answer
            yield answer

    def close(self) -> None:
        """End the processes."""
        self._turn = None
        self._end()

    def _ask(self, k: int, request: Any) -> None:
        process, pipe = self._processes[k]
        try:
            pipe.send(request)
        except ConnectionError:
            raise self._died(process) from None
        self._owed[k] += 1

    def _take(self, k: int) -> Any:
        process, pipe = self._processes[k]
        try:
            if not pipe.poll(self._limit_s):
                raise UserError(
                    f"a loading process of {self._what} (pid {process.pid}) made no batch for {self._limit_s:g} s: "
                    "does the storage still answer?"
                )
            answer = pipe.recv()
        except (EOFError, ConnectionError):
            raise self._died(process) from None
        self._owed[k] -= 1
        return answer

    def _died(self, process: SpawnProcess) -> UserError:
        process.join(_GONE_WAIT_S)
        code = process.exitcode or 0
        how = f"by {signal.Signals(-code).name}" if code < 0 else f"with status {code}; its words are above"
        hint = " If memory ran out, lower data.workers." if code == -signal.SIGKILL else ""
        return UserError(f"a loading process of {self._what} (pid {process.pid}) ended {how}.{hint}")


def _end(processes: list[_Process]) -> None:
    """They only read: nothing is lost by ending them at once."""
    for process, pipe in processes:
        pipe.close()
        process.kill()
    for process, _ in processes:
        process.join(_GONE_WAIT_S)
    processes.clear()


def _serve(pipe: "Connection[Any, Any]", make: Callable[..., Any]) -> None:
    """What a process does until its pipe ends."""
    for number in (
        signal.SIGINT,
        signal.SIGTERM,
    ):  # sent to whole groups; its loader may want more batches to stop well
        signal.signal(number, signal.SIG_IGN)
    with suppress(EOFError, ConnectionError):
        while True:
            request = pipe.recv()
            answer: Any
            try:
                answer = make(*request)
            except UserError as error:
                answer = error
            except Exception:  # noqa: BLE001 - raised again by whoever asked; its type may not travel
                answer = RuntimeError(f"in a loading process:\n{traceback.format_exc()}")
            pipe.send(answer)
