"""What a DICOM header states of its picture: the kind of object, the size, the frames, and whether these are there.

Out of scope: reading the header (client/intake/headers).
"""

import math

from pydicom import Dataset
from pydicom.uid import (
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    RTDoseStorage,
    SegmentationStorage,
)

from client.intake.attributes import JUDGED, all_text, as_text
from client.intake.pixels import check_size
from client.intake.refusals import Reason, Refused
from client.intake.rules import IntakeRules

_NATIVE = (ImplicitVRLittleEndian, ExplicitVRLittleEndian, ExplicitVRBigEndian, DeflatedExplicitVRLittleEndian)
_PACKED_FRAME_BYTES = 32
"""Least that any codec's headers and the item around them take."""
_LABEL_MAP_STORAGE = "1.2.840.10008.5.1.4.1.1.66.7"
_NO_PICTURES = (SegmentationStorage, _LABEL_MAP_STORAGE, RTDoseStorage)


def check_header(dataset: Dataset, rules: IntakeRules) -> int | None:
    """Refuse a header without a picture, or with one beyond the limits; return how many frames it states.

    Raises:
        Refused: With the reason.
    """
    if not all_text(dataset, *JUDGED) or not all_text(dataset.file_meta, "MediaStorageSOPClassUID"):
        raise Refused(Reason.HEADER)
    if sop_class(dataset) in _NO_PICTURES:
        raise Refused(Reason.NO_PICTURE)
    rows, columns = dataset.get("Rows"), dataset.get("Columns")
    if rows is None or columns is None:
        raise Refused(Reason.NO_IMAGE)
    check_size(int(rows), int(columns))
    if dataset.get("BitsAllocated") not in (1, 8, 16, 32, 64) or dataset.get("SamplesPerPixel", 1) not in (1, 3):
        raise Refused(Reason.HEADER)
    stated = dataset.get("NumberOfFrames")
    if stated is None or str(stated) == "":
        return None
    frames = int(stated)
    if frames < 1:
        raise Refused(Reason.NO_IMAGE)
    if frames > rules.max_frames:
        raise Refused(Reason.TOO_MANY_FRAMES)
    return frames if frames > 1 else None


def check_pixels(dataset: Dataset, frames: int, there: int) -> None:
    """Refuse a file of several frames that is too short for them: each is a record, and to state more costs nothing.

    Args:
        dataset: Its header.
        frames: How many it states.
        there: Bytes of pixels that are there, packed or not.

    Raises:
        Refused: With the reason.

    Guarantees:
        - frames_are_there: A file of several frames that is too short for what it states is refused.

    Source: DICOM PS3.5 8.1.1 (native pixels), 8.2 (encapsulated), PS3.3 C.7.6.3.1.2 (YBR_FULL_422).
    """
    least = _PACKED_FRAME_BYTES * frames
    if dataset.file_meta.TransferSyntaxUID in _NATIVE:
        sizes = dataset.Rows, dataset.Columns, dataset.get("SamplesPerPixel", 1), dataset.BitsAllocated
        thirds = 2 if dataset.get("PhotometricInterpretation") == "YBR_FULL_422" else 3
        least = math.prod(map(int, sizes)) * frames * thirds // 24
    if frames > 1 and there < least:
        raise Refused(Reason.PIXELS if there > 0 else Reason.NO_IMAGE)


def sop_class(dataset: Dataset) -> str:
    """Return what kind of object a file holds, by its data set or, where that does not say, by its file meta.

    Raises:
        Refused: They name two.
    """
    names = {as_text(dataset.get("SOPClassUID")), as_text(dataset.file_meta.get("MediaStorageSOPClassUID"))} - {""}
    if len(names) > 1:
        raise Refused(Reason.SOP_CLASS)
    return names.pop() if names else ""
