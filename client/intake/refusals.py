"""Why an image is not used: one closed list of reasons for code, reports and tests. Out of scope: deciding it."""

import logging
import warnings
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from enum import StrEnum
from typing import final


@final
class Reason(StrEnum):
    """The closed list of reasons; `NO_DECODER` is followed by the name of the transfer syntax."""

    FOLDER = "folder not readable"
    NOT_A_FILE = "not a regular file"
    MISSING = "file missing"
    OUTSIDE = "path leads out of the folder"
    NOT_DICOM = "not DICOM"
    NOT_PNG_JPEG = "neither PNG nor JPEG"
    HEADER = "header not readable"
    DEFLATED = "deflated data set"
    NO_IMAGE = "no image in the file"
    MULTI_FRAME = "more than one frame"
    TOO_LARGE = "larger than the limits"
    NO_PATIENT = "no patient id"
    NO_LABEL = "no label"
    OTHER_LABEL = "label not among the classes"
    NO_DECODER = "decoder missing for"
    PIXELS = "pixels not decodable"
    NOT_FINITE = "pixel values not finite"
    OUT_OF_RANGE = "pixel values out of range"


@final
class Refused(Exception):
    """One image is refused; carries the reason and nothing of the image. Caught and counted inside the intake."""

    def __init__(self, reason: Reason, detail: str = "") -> None:
        """Refuse with a reason, and for `NO_DECODER` the transfer syntax's registered name."""
        self.reason = f"{reason} {detail}".strip()
        super().__init__(self.reason)


def describe(refused: Mapping[str, int]) -> str:
    """Return the counts by reason as one phrase, the most frequent first.

    >>> describe({"no label": 1, "not DICOM": 3})
    '3 not DICOM, 1 no label'
    """
    return ", ".join(f"{count} {reason}" for reason, count in sorted(refused.items(), key=lambda it: (-it[1], it[0])))


@contextmanager
def quiet() -> Generator[None, None, None]:
    """Silence pydicom and Pillow: their warnings and log lines quote values of the file, which may name a patient."""
    logger = logging.getLogger("pydicom")
    before, logger.disabled = logger.disabled, True
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.disabled = before
