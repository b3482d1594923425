"""Decoders in processes of their own: a damaged file may abort a compiled decoder or send it round in circles.

GDCM ends its process with `std::terminate` on some damaged JPEG streams, which no `except` catches. Here that costs
the frames of one file. Out of scope: what is decoded (client/intake/worker); keeping a decoder that was taken over from
acting as this user.
"""

import atexit
import os
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from multiprocessing.connection import Pipe, wait
from types import TracebackType
from typing import Any, final

from client.intake.refusals import Reason
from client.intake.requests import Answer, Asked
from client.intake.rules import IntakeRules

MAX_WORKERS = 8
"""By default: as many as there are cores, and no more than this."""

_AHEAD = 6
"""Jobs under way or done beyond the one whose turn it is, for each worker."""
_QUEUED = 3
"""Jobs that a worker holds, so that it never waits for this process to be scheduled."""
_MAX_REQUEST = 2**14
"""Bytes of a request that fit into the pipe of a busy worker; a longer one waits until it has nothing to do."""
_MAX_READY = 512
"""Answers of a job that are kept until it is their turn; then its worker waits."""

# Not multiprocessing.Process: that imports the caller's main module again, which runs a plain script twice.
_PROGRAM = """
import sys
from multiprocessing.connection import Connection
from client.intake.worker import serve
serve(Connection(int(sys.argv[1])))
"""


_ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    # Images are kept in the heap between two files: pages fresh from the system cost more than the arithmetic.
    "MALLOC_MMAP_THRESHOLD_": str(32 * 1024**2),
    "MALLOC_TRIM_THRESHOLD_": str(128 * 1024**2),
}


def number_of_workers(asked: int | None) -> int:
    """Return how many decoders run at a time."""
    return asked or min(len(os.sched_getaffinity(0)), MAX_WORKERS)


@final
@dataclass(eq=False)
class _Task:
    """What was asked, what has come of it, and what was taken already."""

    asked: Asked[Any]
    came: int = 0
    ready: deque[Any] = field(default_factory=deque[Any])
    begun: bool = False

    def missing(self) -> int:
        return self.asked.answers - self.came

    def answers_of_a_reply(self) -> int:
        return min(self.asked.together, self.missing())

    def add(self, answers: Iterable[Any]) -> None:
        for answer in answers:
            self.ready.append(answer)
            self.came += 1


@final
class _Worker:
    """One child process, and the tasks that it holds, the one that it is at first."""

    def __init__(self, program: str) -> None:
        self.connection, theirs = Pipe()
        self.owner, self.since = os.getpid(), 0.0
        self.tasks: deque[_Task] = deque()
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-c", program, str(theirs.fileno())],
                env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), **_ENVIRONMENT},
                pass_fds=(theirs.fileno(),),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,  # compiled decoders write about the file
            )

    def takes(self, request: bytes) -> bool:
        """Return whether a job can be sent without waiting for the worker."""
        return not self.tasks or (len(self.tasks) < _QUEUED and len(request) <= _MAX_REQUEST)

    def backlog(self) -> int:
        """Return how many of its answers wait for their turn."""
        return sum(len(task.ready) for task in self.tasks)

    def begin(self, task: _Task) -> None:
        """Send a job; one that cannot be sent shows when its reply does not come."""
        if not self.tasks:
            self.since = time.monotonic()
        self.tasks.append(task)
        try:
            self.connection.send_bytes(task.asked.request)
        except OSError:
            self.connection.close()

    def stop(self) -> None:
        """End the child, unless this process is a fork of the one that started it."""
        self.connection.close()
        if self.owner == os.getpid():
            self._process.kill()
            self._process.wait()


_idle: list[_Worker] = []
"""Workers between two uses: one takes as long to start as it takes to decode hundreds of small images."""


def stop_idle() -> None:
    """End the workers that wait for their next use."""
    while _idle:
        _idle.pop().stop()


atexit.register(stop_idle)


@final
class DecoderPool:
    """Has child processes do what is asked. A context manager.

    Args:
        rules: How many children there are, and how long an answer may take.
        program: What runs in a child, Python that takes the descriptor of its end of the pipe as argument.

    Guarantees:
        - survives_abort: When a child dies on a file, that file's missing frames are refused and the next is decoded.
        - survives_hang: So it is when a child does not answer within the rules' `decode_seconds` for each image.
        - in_order: Answers come in the order of what was asked, whichever child is done first.
        - memory_is_bounded: Beyond the job whose turn it is, only a few jobs for each child are under way or done.
    """

    def __init__(self, rules: IntakeRules, program: str = _PROGRAM) -> None:
        """Start nothing yet."""
        self._seconds = rules.decode_seconds
        self._program = program
        self._limit = number_of_workers(rules.workers)
        self._workers: list[_Worker] = []
        self._waiting: deque[_Task] = deque()

    def __enter__(self) -> "DecoderPool":
        """Return itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Keep workers that have nothing to do for the next pool, and end the others."""
        for worker in self._workers:
            if not worker.tasks and self._program is _PROGRAM and len(_idle) < MAX_WORKERS:
                _idle.append(worker)
            else:
                worker.stop()
        self._workers.clear()

    def answers(self, asked: Iterable[Asked[Answer]]) -> Iterator[Answer | str]:
        """Yield every answer to what is asked, or the reason of a refusal."""
        requests = map(_Task, asked)
        order: deque[_Task] = deque()
        while self._begin(order, requests) or order:
            head = order[0]
            while head.ready:
                yield head.ready.popleft()
            if head.missing() == 0:
                order.popleft()
            else:
                self._receive(head)

    def _begin(self, order: deque[_Task], requests: Iterator[_Task]) -> bool:
        """Give workers jobs, within what may be ahead; return whether one was given."""
        begun = False
        while len(order) < self._limit * _AHEAD:
            task = self._waiting.popleft() if self._waiting else next(requests, None)
            if task is None:
                return begun
            worker = self._free(task)
            if worker is None:
                self._waiting.appendleft(task)
                return begun
            if not task.begun:
                order.append(task)
                task.begun = True
            worker.begin(task)
            begun = True
        return begun

    def _free(self, task: _Task) -> _Worker | None:
        """Return a worker that takes the task now: an idle one, a new one, or the one that holds least."""
        least = min(self._workers, key=lambda one: len(one.tasks), default=None)
        if (least is None or least.tasks) and len(self._workers) < self._limit:
            worker = _taken() if self._program is _PROGRAM else None
            self._workers.append(worker or _Worker(self._program))
            return self._workers[-1]
        return least if least is not None and least.takes(task.asked.request) else None

    def _receive(self, head: _Task) -> None:
        """Wait until a worker answers or is late, and take what it says."""
        busy = [one for one in self._workers if one.tasks and (head in one.tasks or one.backlog() < _MAX_READY)]
        for worker in [one for one in busy if one.connection.closed]:
            self._give_up(worker, Reason.DIED)
            return
        seconds = min((self._due(one) for one in busy), default=time.monotonic()) - time.monotonic()
        ready = wait([one.connection for one in busy], max(0.0, seconds))
        for worker in busy:
            if worker.connection in ready:
                self._take(worker)
            elif time.monotonic() >= self._due(worker):
                self._give_up(worker, Reason.TOO_SLOW)

    def _due(self, worker: _Worker) -> float:
        return worker.since + worker.tasks[0].answers_of_a_reply() * self._seconds

    def _take(self, worker: _Worker) -> None:
        task = worker.tasks[0]
        count = task.answers_of_a_reply()
        try:
            task.add(task.asked.unpack(worker.connection.recv_bytes(count * task.asked.longest), count))
        except (EOFError, OSError, ValueError):  # OSError: a broken pipe, or a reply that is too long
            self._give_up(worker, Reason.DIED)
            return
        worker.since = time.monotonic()
        if task.missing() == 0:
            worker.tasks.popleft()

    def _give_up(self, worker: _Worker, reason: Reason) -> None:
        """Refuse what is missing of the job that the worker is at, end it, and give its other jobs to others."""
        worker.stop()
        self._workers.remove(worker)
        task, *others = worker.tasks
        task.add([str(reason)] * task.missing())
        self._waiting.extend(others)


def _taken() -> _Worker | None:
    """Return an idle worker that is alive and this process's own."""
    while _idle:
        worker = _idle.pop()
        if worker.owner == os.getpid() and not worker.connection.poll():  # one that died has its end of file there
            return worker
        worker.stop()
    return None
