"""Why an image is not used: one closed list of reasons for code, reports and tests. Out of scope: deciding it."""

import logging
import struct
import warnings
import zlib
from collections.abc import Generator, Iterable, Mapping
from contextlib import contextmanager
from enum import StrEnum
from typing import final


@final
class Reason(StrEnum):
    """The closed list of reasons; `NO_DECODER` is followed by the name of the transfer syntax."""

    FOLDER = "folder not readable"
    NOT_READABLE = "file not readable"
    NOT_A_FILE = "not a regular file"
    MISSING = "file missing"
    OUTSIDE = "path leads out of the folder"
    NOT_OF_SOURCE = "not part of this source"
    NOT_DICOM = "not DICOM"
    NO_PREAMBLE = "DICOM data set without the preamble and file meta of PS3.10"
    NO_SYNTAX = "transfer syntax not stated"
    INDEX = "DICOMDIR, an index of files"
    SOP_CLASS = "SOP class of the header is not that of the file meta"
    NO_PICTURE = "segmentation, map of labels or dose, not a picture"
    ARCHIVE = "archive damaged, encrypted or in another one"
    ARCHIVE_LIMITS = "archive expands beyond the limits"
    TOO_MANY_MEMBERS = "archive of more members than the limit"
    COMPRESSION = "archive member neither stored nor compressed by deflate"
    NOT_PNG_JPEG = "neither PNG nor JPEG nor TIFF nor NIfTI"
    HEADER = "header not readable"
    NO_IMAGE = "no image in the file"
    LONG_VALUE = "id, label or fact of the header longer than the limit"
    TOO_LARGE = "larger than the limits"
    MULTI_FRAME = "several pages in a file of one image"
    TOO_MANY_FRAMES = "more frames than the limit"
    SOURCE_FRAMES = "more frames in the whole source than the limit"
    NO_PATIENT = "no patient id"
    PATIENT_UNREADABLE = "patient id or issuer not readable in its character set"
    NO_LABEL = "no label"
    OTHER_LABEL = "label not among the classes"
    NO_DECODER = "decoder missing for"
    PIXELS = "pixels not decodable"
    DIED = "decoder died on it"
    TOO_SLOW = "decoding took longer than the limit"
    NOT_FINITE = "pixel values not finite"
    OUT_OF_RANGE = "pixel values out of range"
    BURNED_IN = "text burned in, says the header"
    SECONDARY_CAPTURE = "secondary capture or screen save"
    ULTRASOUND = "ultrasound"
    DUPLICATE = "the same image as another"
    CHANGED = "changed while it was read"


DAMAGED = (OSError, EOFError, ValueError, LookupError, MemoryError, struct.error, zlib.error)
"""What every reader raises for a damaged file: unreadable, cut short, values and lengths that cannot be. Each reader
adds what its libraries raise beside."""

_AFTER_READING = (
    Reason.NO_LABEL,
    Reason.OTHER_LABEL,
    Reason.NO_DECODER,
    Reason.PIXELS,
    Reason.DIED,
    Reason.TOO_SLOW,
    Reason.NOT_FINITE,
    Reason.OUT_OF_RANGE,
    Reason.BURNED_IN,
    Reason.SECONDARY_CAPTURE,
    Reason.ULTRASOUND,
    Reason.DUPLICATE,
    Reason.CHANGED,
)
_NOT_THE_FILES_OWN = (
    Reason.FOLDER,
    Reason.NOT_READABLE,
    Reason.MISSING,
    Reason.INDEX,
    Reason.SOURCE_FRAMES,
    Reason.NO_DECODER,
    Reason.DIED,
    Reason.TOO_SLOW,
    Reason.DUPLICATE,
    Reason.CHANGED,
)


DECODERS = 'pip install "fedmedgan[decoders]"'

_OF_THE_EXTRA = ("JPEG Lossless", "JPEG-LS", "JPEG 2000 Image Compression", "High-Throughput JPEG 2000")
_REMEDIES = (
    (_OF_THE_EXTRA, f"install the decoders: {DECODERS}"),
    (
        ("JPEG Extended",),
        "no decoder that comes with this release reads 12 bits of it, and none can be installed for that; make copies "
        "without compression, a file each: dcmdjpeg IN OUT (Debian package dcmtk)",
    ),
    (
        ("MPEG", "Fragmentable MPEG", "HEVC", "SMPTE"),
        "films are not read; have the pictures that you need exported one by one",
    ),
)
_NO_REMEDY = "nothing reads it here; have the PACS send these images as Explicit VR Little Endian"


def for_want_of_an_extra(reason: str) -> bool:
    """Return whether installing the extra `decoders` makes these images readable."""
    syntax = reason.removeprefix(f"{Reason.NO_DECODER} ")
    return syntax != reason and syntax.startswith(_OF_THE_EXTRA)


def remedies(refused: Iterable[str]) -> list[str]:
    """Say what makes images readable for which there is no decoder, a line for each transfer syntax.

    Guarantees:
        - true_for_each_syntax: The pip line comes for what it installs a decoder for, and for nothing else.
    """
    said: list[str] = []
    for reason in sorted(reason for reason in refused if reason.startswith(Reason.NO_DECODER)):
        syntax = reason.removeprefix(f"{Reason.NO_DECODER} ")
        remedy = next((text for names, text in _REMEDIES if syntax.startswith(names)), _NO_REMEDY)
        said.append(f"{syntax}: {remedy}")
    return said


_AT_DECODING = ", found at decoding"


def at_decoding(reason: str) -> str:
    """Return how a refusal at decoding is counted: its header was read, whatever the same reason means in a scan."""
    return reason if was_read(reason) else f"{reason}{_AT_DECODING}"


def was_read(reason: str) -> bool:
    """Return whether a refusal came after a header, or a row of an index, was read whole and named a patient."""
    return reason.startswith(_AFTER_READING) or reason.endswith(_AT_DECODING)


def may_pass(reason: str) -> bool:
    """Return whether an unchanged file may be used another time: with a decoder, more time or without its twin."""
    return reason.startswith(_NOT_THE_FILES_OWN)


@final
class Refused(Exception):
    """One image is refused; carries the reason and nothing of the image. Caught and counted inside the intake."""

    def __init__(self, reason: Reason, detail: str = "") -> None:
        """Refuse with a reason, and for `NO_DECODER` the transfer syntax's registered name."""
        self.reason = f"{reason} {detail}".strip()
        super().__init__(self.reason)


def unopened(error: OSError) -> Refused:
    """Return the refusal of a file that does not open: it is gone, or this user may not read it, or the disk fails."""
    gone = isinstance(error, FileNotFoundError | NotADirectoryError)
    return Refused(Reason.MISSING if gone else Reason.NOT_READABLE)


def describe(refused: Mapping[str, int]) -> str:
    """Return the counts by reason as one phrase, the most frequent first.

    >>> describe({"no label": 1, "not DICOM": 3})
    '3 not DICOM, 1 no label'
    """
    return ", ".join(f"{count} {reason}" for reason, count in sorted(refused.items(), key=lambda it: (-it[1], it[0])))


_TALKATIVE = ("pydicom", "nibabel.global")


@contextmanager
def quiet() -> Generator[None, None, None]:
    """Silence pydicom, nibabel and Pillow: what they warn of and log quotes the file, which may name a patient."""
    loggers = [logging.getLogger(name) for name in _TALKATIVE]
    before = [logger.disabled for logger in loggers]
    for logger in loggers:
        logger.disabled = True
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, disabled in zip(loggers, before, strict=True):
            logger.disabled = disabled
