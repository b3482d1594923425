"""What a decoder's process does: take a job, decode, resize, answer. Nothing here runs in the agent's own process.

Out of scope: what is asked (client/intake/requests), starting and watching these processes (client/intake/isolation).
"""

import contextlib
import gc
import json
import os
import resource
import struct
from collections.abc import Iterator
from functools import lru_cache
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

from client.intake import arrays, images
from client.intake.archives import Archive
from client.intake.dicom import DicomImage
from client.intake.headers import read_header
from client.intake.pixels import Levels, Square, fit
from client.intake.records import Record, Region
from client.intake.refusals import Reason, Refused, quiet, unopened
from client.intake.requests import MAX_HEADER_BYTES, MAX_REASON_BYTES, Form, Job, is_npz
from client.intake.rules import IntakeRules
from client.intake.volumes import Volume, is_volume
from common.errors import IntakeError

MEMORY_BYTES = 6 * 1024**3
"""Address space of one decoder's process: what a damaged file may make it ask for, before it is refused."""


class Source:
    """One opened file or member, of which frames are decoded one after the other."""

    def __init__(self, path: Path, member: str | None, rules: IntakeRules) -> None:
        """Read and parse it.

        Raises:
            Refused: It cannot be used.
        """
        self._path, self._rules = path, rules
        self._opened: DicomImage | Volume | Any = None
        try:
            if is_npz(path):
                self._opened = arrays.load_stack(path)
            elif member is not None:
                self._opened = DicomImage(_archive(path, path.stat().st_mtime_ns).read(member, rules), rules)
            elif is_volume(path):
                self._opened = Volume(path, rules)
            else:
                self._opened = _dicom(path, rules)
        except IntakeError as error:
            raise Refused(Reason.PIXELS) from error
        except OSError as error:  # the file went away since the scan
            raise unopened(error) from error

    def levels(self, frame: int | None) -> Levels:
        """Decode a frame.

        Raises:
            Refused: It cannot be used.
        """
        if self._opened is None:
            return images.decode(self._path, self._rules)
        if isinstance(self._opened, np.ndarray):
            return arrays.levels_of(self._opened[frame])
        return self._opened.levels(frame or 0)

    def square(self, frame: int | None, form: Form, blank: tuple[Region, ...] = ()) -> Square:
        """Decode a frame, make parts of it black, and resize it.

        Raises:
            Refused: It cannot be used.
        """
        if isinstance(self._opened, np.ndarray) and form.channels == 1 and not blank:
            image = self._opened[frame]
            if image.dtype == np.uint8 and image.shape == (form.size, form.size):
                return image[None]
        return fit(blanked(self.levels(frame), blank), form.size, form.channels)


def blanked(levels: Levels, regions: tuple[Region, ...]) -> Levels:
    """Make parts of an image black; what lies outside of it is left out."""
    if regions:
        levels = levels.copy()
    for left, top, width, height in regions:
        levels[top : top + height, left : left + width] = 0
    return levels


def decode(record: Record, rules: IntakeRules) -> Levels:
    """Decode one record, in its own size and in this process: a damaged file may end it.

    Raises:
        Refused: It cannot be used.
    """
    with quiet():
        return Source(record.path, record.member, rules).levels(record.frame)


def serve(connection: Connection) -> None:
    """Do one job after the other until the other end hangs up; runs in the child.

    A reply is, for each of a few frames, `+` and the pixels, or `-`, a length and the reason; of a header `+` and JSON.
    Never a pickle.
    """
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # a core dump would hold the image
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))  # nothing is ever written
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    gc.freeze()  # what the modules hold stays: looking through it again costs as much as a small image
    with quiet(), contextlib.suppress(BrokenPipeError):
        while True:
            try:
                request = connection.recv_bytes()
            except EOFError:
                return
            what, size, channels, rules = json.loads(request)
            if "keywords" in what:
                connection.send_bytes(_header(Path(what["path"]), what["keywords"], _rules(rules)))
                continue
            job = Job(Path(what["path"]), what["member"], tuple(what["frames"]), tuple(map(tuple, what["blank"])))
            for reply in _replies(job, Form(size, channels, _rules(rules))):
                connection.send_bytes(reply)


def _header(path: Path, keywords: list[str], rules: IntakeRules) -> bytes:
    try:
        with path.open("rb") as handle:
            header = read_header(handle, os.fstat(handle.fileno()).st_size, keywords, rules)
        answer = b"+" + json.dumps([header.patient, header.values, header.frames, header.facts]).encode()
        if len(answer) > MAX_HEADER_BYTES:
            raise Refused(Reason.HEADER)
    except Refused as refusal:
        return _refusal(refusal)
    except OSError as error:
        return _refusal(unopened(error))
    return answer


def _replies(job: Job, form: Form) -> Iterator[bytes]:
    step = job.frames_a_reply()
    try:
        source = Source(job.path, job.member, form.rules)
    except Refused as refusal:
        for start in range(0, len(job.frames), step):
            yield _refusal(refusal) * len(job.frames[start : start + step])
        return
    for start in range(0, len(job.frames), step):
        yield b"".join(_answer(source, frame, form, job.blank) for frame in job.frames[start : start + step])


def _answer(source: Source, frame: int | None, form: Form, blank: tuple[Region, ...]) -> bytes:
    try:
        return b"+" + source.square(frame, form, blank).tobytes()
    except Refused as refusal:
        return _refusal(refusal)
    except OSError as error:
        return _refusal(unopened(error))
    except MemoryError:
        return _refusal(Refused(Reason.TOO_LARGE))


def _refusal(refusal: Refused) -> bytes:
    reason = refusal.reason.encode("ascii", "replace")[:MAX_REASON_BYTES]
    return struct.pack(">cB", b"-", len(reason)) + reason


def _dicom(path: Path, rules: IntakeRules) -> DicomImage | None:
    with path.open("rb", buffering=0) as handle:
        if handle.read(132)[128:] != b"DICM":
            return None
        size = os.fstat(handle.fileno()).st_size
        if size > rules.max_bytes:
            raise Refused(Reason.TOO_LARGE)
        handle.seek(0)
        # No more than its size: what is asked for is allocated first, whatever comes.
        return DicomImage(handle.read(size), rules)


@lru_cache(maxsize=2)
def _archive(path: Path, _changed_ns: int) -> Archive:
    """Keep the last archives open: the directory of one with many members takes long to read."""
    return Archive(path)


@lru_cache(maxsize=2)
def _rules(text: str) -> IntakeRules:
    return IntakeRules.model_validate_json(text)
