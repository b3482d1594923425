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
from multiprocessing.connection import Connection, Pipe, wait
from types import TracebackType
from typing import final

from client.intake.pixels import Square
from client.intake.refusals import Reason
from client.intake.worker import MAX_REASON_BYTES, Form, Job, pack_job, unpack_reply

MAX_WORKERS = 8
"""By default: as many as there are cores, and no more than this."""

_AHEAD = 4
"""Jobs under way or done beyond the one whose turn it is, for each worker."""
_MAX_READY = 512
"""Images of a job that are kept until it is their turn; then its worker waits."""

# Not multiprocessing.Process: that imports the caller's main module again, which runs a plain script twice.
_PROGRAM = """
import sys
from multiprocessing.connection import Connection
from client.intake.worker import serve
serve(Connection(int(sys.argv[1])))
"""


def number_of_workers(asked: int | None) -> int:
    """Return how many decoders run at a time."""
    return asked or min(len(os.sched_getaffinity(0)), MAX_WORKERS)


@final
@dataclass(eq=False)
class _Task:
    """A job, what has come of it, and what was taken already."""

    job: Job
    came: int = 0
    ready: deque[Square | str] = field(default_factory=deque[Square | str])

    def missing(self) -> int:
        return len(self.job.frames) - self.came

    def add(self, images: Iterable[Square | str]) -> None:
        for image in images:
            self.ready.append(image)
            self.came += 1


@final
class _Worker:
    """One child process, and the task that it is at."""

    def __init__(self, program: str) -> None:
        self.connection, theirs = Pipe()
        self.owner, self.task, self.since = os.getpid(), None, 0.0
        self.task: _Task | None
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-c", program, str(theirs.fileno())],
                env=environment | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
                pass_fds=(theirs.fileno(),),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,  # compiled decoders write about the file
            )

    def begin(self, task: _Task, form: Form) -> None:
        """Send a job; one that cannot be sent shows when its reply does not come."""
        self.task, self.since = task, time.monotonic()
        try:
            self.connection.send_bytes(pack_job(task.job, form))
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
    """Decodes jobs in child processes. A context manager.

    Args:
        form: What is asked of every image.
        program: What runs in a child, Python that takes the descriptor of its end of the pipe as argument.

    Guarantees:
        - survives_abort: When a child dies on a file, that file's missing frames are refused and the next is decoded.
        - survives_hang: So it is when a child does not answer within the rules' `decode_seconds` for each image.
        - in_order: Results come in the order of the jobs, whichever child is done first.
        - memory_is_bounded: Beyond the job whose turn it is, only a few jobs for each child are under way or done.
    """

    def __init__(self, form: Form, program: str = _PROGRAM) -> None:
        """Start nothing yet."""
        self._form = form
        self._program = program
        self._limit = number_of_workers(form.rules.workers)
        self._workers: list[_Worker] = []

    def __enter__(self) -> "DecoderPool":
        """Return itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Keep workers that have nothing to do for the next pool, and end the others."""
        for worker in self._workers:
            if worker.task is None and self._program is _PROGRAM and len(_idle) < MAX_WORKERS:
                _idle.append(worker)
            else:
                worker.stop()
        self._workers.clear()

    def squares(self, jobs: Iterable[Job]) -> Iterator[Square | str]:
        """Yield for each frame of each job its pixels, or the reason why it is refused."""
        source = iter(jobs)
        tasks: deque[_Task] = deque()
        more = True
        while more or tasks:
            more = more and self._begin(tasks, source)
            if not tasks:
                return
            head = tasks[0]
            while head.ready:
                yield head.ready.popleft()
            if head.missing() == 0:
                tasks.popleft()
            else:
                self._receive(head)

    def _begin(self, tasks: deque[_Task], source: Iterator[Job]) -> bool:
        """Give every idle worker a job, within what may be ahead; return whether there may be more jobs."""
        while len(tasks) < self._limit * _AHEAD:
            worker = next((one for one in self._workers if one.task is None), None)
            if worker is None and len(self._workers) >= self._limit:
                return True
            job = next(source, None)
            if job is None:
                return False
            task = _Task(job)
            tasks.append(task)
            (worker or self._start()).begin(task, self._form)
        return True

    def _start(self) -> _Worker:
        worker = _taken() if self._program is _PROGRAM else None
        self._workers.append(worker or _Worker(self._program))
        return self._workers[-1]

    def _receive(self, head: _Task) -> None:
        """Wait until a worker answers or is late, and take what it says."""
        busy = [one for one in self._workers if one.task is head or (one.task and len(one.task.ready) < _MAX_READY)]
        gone = [one for one in busy if one.connection.closed]
        seconds = min((self._due(one) for one in busy), default=time.monotonic()) - time.monotonic()
        open_ = {one.connection: one for one in busy if not one.connection.closed}
        ready = [open_[one] for one in wait(list(open_), max(0.0, seconds)) if isinstance(one, Connection)]
        for worker in ready:
            self._take(worker)
        for worker in gone:
            self._give_up(worker, Reason.DIED)
        for worker in busy:
            if worker not in ready and worker not in gone and time.monotonic() >= self._due(worker):
                self._give_up(worker, Reason.TOO_SLOW)

    def _due(self, worker: _Worker) -> float:
        task = worker.task
        images = min(task.job.frames_a_reply(), task.missing()) if task else 0
        return worker.since + images * self._form.rules.decode_seconds

    def _take(self, worker: _Worker) -> None:
        task = worker.task
        if task is None:
            return
        frames = min(task.job.frames_a_reply(), task.missing())
        longest = frames * (2 + max(self._form.square_bytes(), MAX_REASON_BYTES))
        try:
            task.add(unpack_reply(worker.connection.recv_bytes(longest), frames, self._form))
        except (EOFError, OSError, ValueError):  # OSError: a broken pipe, or a reply that is too long
            self._give_up(worker, Reason.DIED)
            return
        worker.since = time.monotonic()
        if task.missing() == 0:
            worker.task = None

    def _give_up(self, worker: _Worker, reason: Reason) -> None:
        """Refuse what is missing of the worker's job, and end the worker."""
        worker.stop()
        self._workers.remove(worker)
        if worker.task is not None:
            worker.task.add([str(reason)] * worker.task.missing())


def _taken() -> _Worker | None:
    """Return an idle worker that is alive and this process's own."""
    while _idle:
        worker = _idle.pop()
        if worker.owner == os.getpid() and not worker.connection.poll():  # one that died has its end of file there
            return worker
        worker.stop()
    return None
