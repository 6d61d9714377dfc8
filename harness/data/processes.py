"""Loading processes: each at a pipe of its own, so that a death is the end of that pipe, even half-way through a batch.

Not torch's DataLoader, for three things that it does where a process dies: all of its processes share one pipe, whose
reader waits for the rest of a batch that is half written; in the main thread it sets a SIGCHLD handler that raises
wherever the program happens to be; elsewhere it finds a death only after its whole time limit.
"""

import multiprocessing
import multiprocessing.util
import os
import signal
import threading
import time
import traceback
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager, suppress
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from typing import Any

from harness.errors import UserError
from harness.settings import LEAVE_SIGNALS

_AHEAD = 2  # requests that a process has at a time: one in work, one waiting
_GONE_WAIT_S = 5.0
_LOOK_S = 5.0  # how often a process looks whether its program lives
# Sent to whole groups, while the program may want more batches to stop well: it ends its processes itself.
_NOT_FOR_THEM = (signal.SIGINT, *LEAVE_SIGNALS)

_Process = tuple[SpawnProcess, "Connection[Any, Any]"]


class LoadingProcesses:
    """`count` processes that answer requests in turn, by `make(*job, request)`; `make` goes there once, pickled.

    They end with `close`, with this object, with any error but an answer's own, and soon after this process, however it
    ends. `what` names their work in errors. Requests are small (some kB); an answer, `make` and a job may be large.
    """

    def __init__(self, make: Callable[..., Any], count: int, *, what: str, limit_s: float) -> None:
        self._what, self._limit_s = what, limit_s
        self._processes: list[_Process] = []
        self._owed = [0] * count
        self._turn: object = None
        # Unlike weakref.finalize, it surely runs before multiprocessing waits for processes that ignore SIGTERM.
        multiprocessing.util.Finalize(self, _end, (self._processes,), exitpriority=10)
        resource_tracker.ensure_running()  # as `start` would, which would unblock the signals
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, _NOT_FOR_THEM)  # inherited, until `_serve` ignores them
        try:
            for _ in range(count):
                self._start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        with self._whole():
            for k in range(count):
                self._take(k)  # its first word: from now on, it reads what is sent
                self._send(k, make)

    def _start(self) -> None:
        """A process that has nothing but its pipe: what a dying one does not read, `start` would wait to write."""
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        with theirs:
            process = context.Process(target=_serve, args=(theirs,), daemon=True)
            process.start()
        self._processes.append((process, ours))

    @property
    def closed(self) -> bool:
        """Whether they have been ended."""
        return not self._processes

    def answers(self, job: tuple[Any, ...], requests: Sequence[Any]) -> Iterator[Any]:
        """Yield the answers in the order of the requests.

        Raises `UserError` (the answer's own; a process died; none came in `limit_s` seconds), and RuntimeError with the
        traceback of any other error of `make`, or if `answers` was called again or the processes were closed since.
        """
        if self.closed:
            raise RuntimeError(f"{self._what}: the loader was closed")
        turn = self._turn = object()
        count = len(self._processes)
        with self._whole():
            for k in range(count):
                while self._owed[k]:  # to answers that nobody waits for any more
                    self._take(k)
                    self._owed[k] -= 1
                self._send(k, job)
            for number in range(min(_AHEAD * count, len(requests))):
                self._ask(number % count, requests[number])
        for number in range(len(requests)):
            if self._turn is not turn:
                raise RuntimeError(f"{self._what}: another epoch has begun, or the loader was closed")
            with self._whole():
                answer = self._take(number % count)
                self._owed[number % count] -= 1
                if number + _AHEAD * count < len(requests):
                    self._ask(number % count, requests[number + _AHEAD * count])
            if isinstance(answer, Exception):
                raise answer
            yield answer

    def close(self) -> None:
        """End the processes."""
        self._turn = None
        _end(self._processes)

    @contextmanager
    def _whole(self) -> Generator[None]:
        """Close on any error, Ctrl-C too: with half a message on its way or uncounted, answers would go astray."""
        try:
            yield
        except BaseException:
            self.close()
            raise

    def _ask(self, k: int, request: Any) -> None:
        self._send(k, _Request(request))
        self._owed[k] += 1

    def _send(self, k: int, message: Any) -> None:
        process, pipe = self._processes[k]
        try:
            pipe.send(message)
        except OSError:
            raise self._died(process) from None

    def _take(self, k: int) -> Any:
        process, pipe = self._processes[k]
        try:
            if pipe.poll(self._limit_s):
                return pipe.recv()
        except (EOFError, OSError):
            raise self._died(process) from None
        raise UserError(
            f"a loading process of {self._what} (pid {process.pid}) made no batch for {self._limit_s:g} s: "
            "does the storage still answer?"
        )

    def _died(self, process: SpawnProcess) -> UserError:
        process.join(_GONE_WAIT_S)
        code = process.exitcode
        names = {number.value: number.name for number in signal.Signals}
        if code is None:
            how = "in an unknown way"
        elif code < 0:
            how = f"by {names.get(-code, f'signal {-code}')}"
        else:
            how = f"with status {code}; its words are on stderr"
        hint = " If memory ran out, lower data.workers." if code == -signal.SIGKILL else ""
        return UserError(f"a loading process of {self._what} (pid {process.pid}) ended {how}.{hint}")


class _Request:
    """One more answer is wanted. Anything else that is sent is `make`, or the job of the requests that follow."""

    def __init__(self, value: Any) -> None:
        self.value = value


def _end(processes: list[_Process]) -> None:
    """End them, at once: they only read. May be called again, after Ctrl-C within it for one."""
    for process, _ in processes:
        process.kill()
    for process, _ in processes:
        process.join(_GONE_WAIT_S)
    for _, pipe in processes:
        pipe.close()
    processes.clear()


def _serve(pipe: "Connection[Any, Any]") -> None:
    """What a process does until its pipe ends."""
    for number in _NOT_FOR_THEM:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _NOT_FOR_THEM)
    threading.Thread(target=leave_with_program, daemon=True).start()
    with suppress(EOFError, OSError):
        pipe.send("here")
        make = pipe.recv()
        job: tuple[Any, ...] = ()
        while True:
            message = pipe.recv()
            if isinstance(message, _Request):
                pipe.send(_answer(make, job, message.value))
            else:
                job = message


def leave_with_program() -> None:
    """In a thread of a process: end it once its program is gone, though others hold the pipes between them open."""
    program = multiprocessing.parent_process()
    while program is not None and os.getppid() == program.pid:
        time.sleep(_LOOK_S)
    os._exit(1)


def _answer(make: Callable[..., Any], job: tuple[Any, ...], request: Any) -> Any:
    try:
        return make(*job, request)
    except UserError as error:
        return error
    except Exception:  # noqa: BLE001 - raised again by whoever asked; its type may not travel
        return RuntimeError(f"in a loading process:\n{traceback.format_exc()}")
