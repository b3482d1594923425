"""What is asked of a decoder's process, and how its replies read: JSON and bytes, never a pickle.

A job is one file, or one member of an archive, and the frames that are asked of it; it is read and parsed once.
Out of scope: doing it (client/intake/worker).
"""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from sys import intern
from typing import Generic, TypeVar, final

import numpy as np

from client.intake.headers import FACTS, MAX_VALUE
from client.intake.labels import Labelling
from client.intake.pixels import MAX_PIXELS, Square
from client.intake.records import Axes, Header, Region, Seen
from client.intake.rules import IntakeRules

MAX_REASON_BYTES = 200
MAX_HEADER_BYTES = 2**13
"""Of the reply with a header: the few elements that a scan asks for, which are kept for each image."""
MAX_DIRECTORY_BYTES = 64 * 2**20
"""Of the reply with what a DICOMDIR names: some hundred thousand files."""
_ROWS_A_REPLY = 256

FileIds = list[list[str]]
"""Of each file that a DICOMDIR names, the parts of its path."""

Answer = TypeVar("Answer")


@final
@dataclass(frozen=True)
class Job:
    """A file or member as the scan saw it, and which of its frames are asked. Its repr shows nothing."""

    path: Path = field(repr=False)
    member: str | None = field(repr=False)
    frames: tuple[int | None, ...] = field(repr=False)
    seen: Seen = field(repr=False)
    blank: tuple[Region, ...] = field(default=(), repr=False)

    def frames_a_reply(self) -> int:
        """Return how many frames are answered together: rows of an NPZ are small and need no decoder."""
        return _ROWS_A_REPLY if is_npz(self.path) else 1


@final
@dataclass(frozen=True)
class Form:
    """What is asked of every image."""

    size: int
    channels: int
    rules: IntakeRules

    def square_bytes(self) -> int:
        """Return the bytes of one image."""
        return self.channels * self.size * self.size


@final
@dataclass(frozen=True)
class Asked(Generic[Answer]):
    """A request to a decoder's process. Its repr shows nothing.

    Attributes:
        request: What is sent.
        answers: How many answers come.
        together: How many of them make a reply; fewer in the last.
        longest: Most bytes of an answer.
        unpack: Reads a reply of so many answers; ValueError: it is none.
    """

    request: bytes = field(repr=False)
    answers: int
    together: int
    longest: int
    unpack: Callable[[bytes, int], list[Answer | str]] = field(repr=False)


def is_npz(path: Path) -> bool:
    """Return whether a file is called like an NPZ."""
    return path.suffix.lower() == ".npz"


def ask_pixels(job: Job, form: Form) -> Asked[Square]:
    """Ask for the pixels of a job's frames, or the reasons why they are refused."""
    what = {"path": str(job.path), "member": job.member, "frames": job.frames, "seen": job.seen, "blank": job.blank}
    request = json.dumps([what, form.size, form.channels, form.rules.model_dump_json()]).encode()
    longest = 2 + max(form.square_bytes(), MAX_REASON_BYTES)

    def unpack(reply: bytes, frames: int) -> list[Square | str]:
        return unpack_pixels(reply, frames, form)

    return Asked(request, len(job.frames), job.frames_a_reply(), longest, unpack)


def ask_header(path: Path, member: str | None, labels: Labelling, rules: IntakeRules) -> Asked[Header]:
    """Ask for what a scan needs of a DICOM file or member, or the reason why it is refused."""
    what = {"path": str(path), "member": member, "labels": labels.model_dump_json(by_alias=True)}
    request = json.dumps([what, 0, 0, rules.model_dump_json()]).encode()
    return Asked(request, 1, 1, MAX_HEADER_BYTES, lambda reply, _answers: _unpack_header(reply, rules))


def ask_directory(path: Path, rules: IntakeRules) -> Asked[FileIds]:
    """Ask for the names of files in a DICOMDIR, or the reason why it is refused."""
    request = json.dumps([{"directory": str(path)}, 0, 0, rules.model_dump_json()]).encode()
    return Asked(request, 1, 1, MAX_DIRECTORY_BYTES, _unpack_directory)


def ask_volume(path: Path, rules: IntakeRules) -> Asked[Axes]:
    """Ask for the axes of a NIfTI volume, or the reason why it is refused."""
    request = json.dumps([{"volume": str(path)}, 0, 0, rules.model_dump_json()]).encode()
    return Asked(request, 1, 1, MAX_HEADER_BYTES, lambda reply, _answers: _unpack_axes(reply, rules))


def unpack_pixels(reply: bytes, frames: int, form: Form) -> list[Square | str]:
    """Read a reply for so many frames.

    Raises:
        ValueError: It is not one.
    """
    found: list[Square | str] = []
    place, length = 0, form.square_bytes()
    for _ in range(frames):
        if reply[place : place + 1] == b"+" and len(reply) >= place + 1 + length:
            pixels = np.frombuffer(reply, np.uint8, length, place + 1)
            found.append(pixels.reshape(form.channels, form.size, form.size))
            place += 1 + length
        else:
            found.append(_reason(reply, place))
            place += 2 + reply[place + 1]
    return found


def _unpack_header(reply: bytes, rules: IntakeRules) -> list[Header | str]:
    if not reply.startswith(b"+"):
        return [_reason(reply, 0)]
    try:
        (issuer, patient), label, frames, facts, (state, digest) = json.loads(reply[1:])
        texts = (issuer, patient, label, *facts, *facts.values(), state, digest)
    except (TypeError, AttributeError, RecursionError) as error:
        raise ValueError("not a header") from error
    known = all(map(_is_short, texts)) and facts.keys() <= _FACTS
    if not known or not (frames is None or (type(frames) is int and 1 < frames <= rules.max_frames)):
        raise ValueError("not a header")
    shared = {intern(name): intern(text) for name, text in facts.items()}  # most are the same in thousands of files
    return [Header((intern(issuer), intern(patient)), intern(label), frames, shared, (state, digest))]


def _unpack_axes(reply: bytes, rules: IntakeRules) -> list[Axes | str]:
    if not reply.startswith(b"+"):
        return [_reason(reply, 0)]
    try:
        slices, (columns, rows), state = json.loads(reply[1:])
    except (TypeError, RecursionError) as error:
        raise ValueError("not the axes of a volume") from error
    whole = all(type(number) is int and number > 0 for number in (slices, columns, rows))
    if not whole or slices > rules.max_frames or columns * rows > MAX_PIXELS or not _is_short(state):
        raise ValueError("not the axes of a volume")
    return [Axes(slices, (columns, rows), state)]


def _is_short(text: object) -> bool:
    return isinstance(text, str) and len(text) <= MAX_VALUE


def _unpack_directory(reply: bytes, _answers: int) -> list[FileIds | str]:
    if not reply.startswith(b"+"):
        return [_reason(reply, 0)]
    try:
        found = json.loads(reply[1:])
        known = all(isinstance(part, str) for parts in found for part in parts)
    except (TypeError, RecursionError) as error:
        raise ValueError("no names of files") from error
    if not known or not all(isinstance(parts, list) for parts in found):
        raise ValueError("no names of files")
    return [found]


_FACTS = {*FACTS, "TransferSyntaxUID"}


def _reason(reply: bytes, place: int) -> str:
    if reply[place : place + 1] != b"-" or len(reply) < place + 2 or len(reply) < place + 2 + reply[place + 1]:
        raise ValueError("not a reply of a decoder")
    return reply[place + 2 : place + 2 + reply[place + 1]].decode("ascii")
