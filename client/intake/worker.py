"""What a decoder's process does: take a job, decode, resize, answer. Nothing here runs in the agent's own process.

Out of scope: what is asked (client/intake/requests), starting and watching these processes (client/intake/isolation).
"""

import contextlib
import gc
import io
import json
import os
import resource
import struct
from collections.abc import Callable, Iterator
from functools import lru_cache
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from client.intake import arrays, images
from client.intake.archives import Archive
from client.intake.dicom import DicomImage
from client.intake.directory import file_ids
from client.intake.headers import read_header
from client.intake.labels import Labelling, parse_labelling
from client.intake.pixels import Levels, Square, fit
from client.intake.records import Record, Region, Seen, state_of
from client.intake.refusals import Reason, Refused, quiet, unopened
from client.intake.requests import MAX_DIRECTORY_BYTES, MAX_HEADER_BYTES, MAX_REASON_BYTES, Form, Job, is_npz
from client.intake.rules import IntakeRules
from client.intake.volumes import Volume, is_volume
from common.errors import IntakeError
from common.files import open_regular

MEMORY_BYTES = 6 * 1024**3
"""Address space of one decoder's process: what a damaged file may make it ask for, before it is refused."""


class Source:
    """One opened file or member, of which frames are decoded one after the other."""

    def __init__(self, path: Path, member: str | None, rules: IntakeRules, seen: Seen | None = None) -> None:
        """Read it into memory, from one descriptor, and parse it.

        Args:
            path: The file.
            member: The member, of an archive.
            rules: How it is read.
            seen: What the scan saw; None: whatever is there.

        Raises:
            Refused: It cannot be used, or is not what the scan saw.
        """
        self._rules, self._seen = rules, seen
        self._opened: DicomImage | Volume | bytes | Any = None
        try:
            if member is not None:
                self._read_member(_archive(path, state_of(path.stat())), member)
                return
            with open_regular(path) as handle:
                state = self._same_state(handle)
                self._read(handle, path)
                if self._same_state(handle) != state:
                    raise Refused(Reason.CHANGED)
        except IntakeError as error:
            raise Refused(Reason.PIXELS) from error
        except OSError as error:  # the file went away since the scan
            raise unopened(error) from error

    def _same_state(self, handle: BinaryIO) -> str:
        state = state_of(os.fstat(handle.fileno()))
        if self._seen is not None and state != self._seen[0]:
            raise Refused(Reason.CHANGED)
        return state

    def _read_member(self, archive: Archive, member: str) -> None:
        if self._seen is not None and archive.state() != self._seen[0]:
            raise Refused(Reason.CHANGED)
        data = archive.read(member, self._rules)
        if self._seen is not None and archive.state() != self._seen[0]:
            raise Refused(Reason.CHANGED)
        self._opened = self._dicom(data)

    def _read(self, handle: BinaryIO, path: Path) -> None:
        if is_npz(path):
            self._opened = arrays.load_stack(handle)
            return
        size = os.fstat(handle.fileno()).st_size
        if size > self._rules.max_bytes:
            raise Refused(Reason.TOO_LARGE)
        # No more than its size: what is asked for is allocated first, whatever comes.
        data = handle.read(size)
        if is_volume(path):
            self._opened = Volume(io.BytesIO(data), self._rules)
        else:
            self._opened = self._dicom(data) if data[128:132] == b"DICM" else data

    def _dicom(self, data: bytes) -> DicomImage:
        image = DicomImage(data, self._rules)
        if self._seen is not None and image.digest != self._seen[1]:
            raise Refused(Reason.CHANGED)
        return image

    def levels(self, frame: int | None) -> Levels:
        """Decode a frame.

        Raises:
            Refused: It cannot be used.
        """
        if isinstance(self._opened, bytes):
            return images.decode(io.BytesIO(self._opened))
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
        return Source(record.path, record.member, rules, record.seen).levels(record.frame)


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
            if "frames" not in what:
                connection.send_bytes(_listed(what, _rules(rules)))
                continue
            blank = tuple(map(tuple, what["blank"]))
            job = Job(Path(what["path"]), what["member"], tuple(what["frames"]), tuple(what["seen"]), blank)
            for reply in _replies(job, Form(size, channels, _rules(rules))):
                connection.send_bytes(reply)


def _listed(what: dict[str, Any], rules: IntakeRules) -> bytes:
    """Answer what a scan asks: a header, the axes of a volume, or what a DICOMDIR names."""

    def look() -> bytes:
        if "directory" in what:
            with open_regular(Path(what["directory"])) as handle:
                said: Any = file_ids(handle, rules)
        elif "volume" in what:
            said = _axes(Path(what["volume"]), rules)
        else:
            said = _header(Path(what["path"]), what["member"], parse_labelling(what["labels"]), rules)
        answer = json.dumps(said).encode()
        if len(answer) >= (MAX_DIRECTORY_BYTES if "directory" in what else MAX_HEADER_BYTES):
            raise Refused(Reason.TOO_LARGE)
        return answer

    return _reply(look)


def _header(path: Path, member: str | None, labels: Labelling, rules: IntakeRules) -> list[Any]:
    if member is None:
        with open_regular(path) as handle:
            about = os.fstat(handle.fileno())
            header = read_header(handle, about.st_size, labels, rules, state_of(about))
    else:
        archive = _archive(path, state_of(path.stat()))
        state, data = archive.state(), archive.read(member, rules)
        header = read_header(io.BytesIO(data), len(data), labels, rules, state)
    return [header.patient, header.label, header.frames, header.facts, header.seen]


def _axes(path: Path, rules: IntakeRules) -> list[Any]:
    with open_regular(path) as handle:
        volume = Volume(handle, rules)
        return [volume.slices, volume.size, state_of(os.fstat(handle.fileno()))]


def _replies(job: Job, form: Form) -> Iterator[bytes]:
    step = job.frames_a_reply()
    try:
        source = Source(job.path, job.member, form.rules, job.seen)
    except Refused as refusal:
        for start in range(0, len(job.frames), step):
            yield _refusal(refusal) * len(job.frames[start : start + step])
        return
    for start in range(0, len(job.frames), step):
        yield b"".join(_answer(source, frame, form, job.blank) for frame in job.frames[start : start + step])


def _answer(source: Source, frame: int | None, form: Form, blank: tuple[Region, ...]) -> bytes:
    return _reply(lambda: source.square(frame, form, blank).tobytes())


def _reply(make: Callable[[], bytes]) -> bytes:
    """Reply with what is made, or with the reason why it cannot be."""
    try:
        return b"+" + make()
    except Refused as refusal:
        return _refusal(refusal)
    except OSError as error:
        return _refusal(unopened(error))
    except MemoryError:
        return _refusal(Refused(Reason.TOO_LARGE))


def _refusal(refusal: Refused) -> bytes:
    reason = refusal.reason.encode("ascii", "replace")[:MAX_REASON_BYTES]
    return struct.pack(">cB", b"-", len(reason)) + reason


@lru_cache(maxsize=2)
def _archive(path: Path, _state: str) -> Archive:
    """Keep the last archives open: the directory of one with many members takes long to read."""
    return Archive(path)


@lru_cache(maxsize=2)
def _rules(text: str) -> IntakeRules:
    return IntakeRules.model_validate_json(text)
