"""The headers of DICOM files: which file holds a picture, of whom, and how many. Pure Python, no pixel is decoded.

A header is read once by the scan, with the elements of `FACTS` alone, and once more where the image is decoded. A
deflated data set is inflated within the site's limit before pydicom inflates it without one.

Source: DICOM PS3.10 7.1 (preamble and file meta), PS3.3 C.7.6.6 (multi-frame). Out of scope: pixels
(client/intake/dicom), which of the pictures may be used.
"""

import hashlib
import io
import struct
import zlib
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO

from pydicom import Dataset
from pydicom.dataset import FileMetaDataset
from pydicom.errors import BytesLengthException, InvalidDicomError
from pydicom.filereader import read_dataset
from pydicom.tag import BaseTag, Tag
from pydicom.uid import (
    UID,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ImplicitVRLittleEndian,
    MediaStorageDirectoryStorage,
    UID_dictionary,
)

from client.intake.attributes import QUALIFIERS, as_text, qualified_issuer
from client.intake.labels import Labelling
from client.intake.memory import header_bytes, within
from client.intake.records import Header
from client.intake.refusals import DAMAGED, Reason, Refused
from client.intake.rules import IntakeRules
from client.intake.stated import check_header, check_pixels, sop_class
from common.files import open_regular

FACTS = (
    "SOPClassUID",
    "SOPInstanceUID",
    "StudyInstanceUID",
    "SeriesInstanceUID",
    "AccessionNumber",
    "Modality",
    "PatientBirthDate",
    "PatientSex",
    "BurnedInAnnotation",
    "ImageType",
    "ConversionType",
    "Manufacturer",
    "ManufacturerModelName",
    "PhotometricInterpretation",
    "Rows",
    "Columns",
)
"""What a `Record.header` holds, as far as it is there; `TransferSyntaxUID` of the file meta comes with it."""
MAX_VALUE = 512
"""Characters of an id, a label or a fact. A longer one is refused and never cut: that could merge two patients."""

_FORM = ("PatientID", "IssuerOfPatientID", QUALIFIERS, "NumberOfFrames", "SamplesPerPixel", "BitsAllocated")

# What pydicom, its decoders and NumPy raise beside, found by the fuzz test and by reading pydicom: values of a wrong
# type (TypeError, AttributeError, ArithmeticError), unknown VRs (NotImplementedError, a RuntimeError), nesting
# (RecursionError, also one).
DAMAGED_DICOM = (
    *DAMAGED,
    InvalidDicomError,
    BytesLengthException,
    TypeError,
    AttributeError,
    ArithmeticError,
    RuntimeError,
    AssertionError,
)

_QUALIFIERS = Tag(QUALIFIERS)  # pydicom may have parsed it already: what it says is digested
_COPIES = 3
"""Of the pixels, while pydicom joins what it read of them."""
_PIXELS = (0x7FE00010, 0x7FE00009, 0x7FE00008)
"""Pixels as whole numbers, as doubles and as floats."""


def is_dicom(path: Path) -> bool:
    """Return whether a file has the DICOM preamble.

    Source: DICOM PS3.10 7.1.
    """
    with open_regular(path) as handle:
        return handle.read(132)[128:] == b"DICM"


def read_header(source: BinaryIO, size: int, labels: Labelling, rules: IntakeRules, state: str = "") -> Header:
    """Read a header for the scan.

    Args:
        source: The file, or a member of an archive in memory.
        size: Its bytes.
        labels: Where labels are read from.
        rules: The limits.
        state: Of the file.

    Raises:
        Refused: There is no picture in it, it is damaged or too large, or names no patient.

    Guarantees:
        - values_are_bounded: A header of which a value that is kept is longer than `MAX_VALUE` is refused.
    """
    try:
        dataset, pixel_bytes = _contents(source, size, rules, _tags((*_FORM, *FACTS, *labels.tags())))
        with within(header_bytes(rules)):
            seen = (state, digest_of(dataset))
            frames = check_header(dataset, rules)
            check_pixels(dataset, frames or 1, pixel_bytes)
            issuer = as_text(dataset.get("IssuerOfPatientID")) or qualified_issuer(dataset)
            dataset.pop(QUALIFIERS, None)
            said = {element.keyword: as_text(element.value) for element in dataset}
            said["SOPClassUID"] = sop_class(dataset)
        facts = {name: text for name in FACTS if (text := said.get(name))}
        facts["TransferSyntaxUID"] = str(dataset.file_meta.TransferSyntaxUID)
    except DAMAGED_DICOM as error:
        raise damaged(error, Reason.HEADER) from error
    patient = (issuer, said.get("PatientID", ""))
    if not patient[1]:
        raise Refused(Reason.NO_PATIENT)
    header = Header(patient, labels.class_of(said) or "", frames, facts, seen)
    if any(len(text) > MAX_VALUE for text in (*patient, header.label, *facts.values())):
        raise Refused(Reason.LONG_VALUE)
    return header


def damaged(error: BaseException, reason: Reason) -> Refused:
    """Return the refusal for one of `DAMAGED_DICOM`: a header that takes more memory than it may is too large."""
    return Refused(Reason.TOO_LARGE if isinstance(error, MemoryError) else reason)


def digest_of(dataset: Dataset) -> str:
    """Return a digest of what a header says about whose picture it is and whether it may be used.

    Taken before anything else looks at the data set, of the values as they stand in the file: pydicom puts what it
    makes of a value in its place.
    """
    values: list[Any] = [dataset.get_item(tag) for tag in _tags((*_FORM, *FACTS)) if tag != _QUALIFIERS]
    said = [None if element is None else element.value for element in values]
    others = dataset.file_meta.get("MediaStorageSOPClassUID"), qualified_issuer(dataset)
    return hashlib.sha256(repr([said, *others]).encode()).hexdigest()


@lru_cache(maxsize=8)
def _tags(keywords: tuple[str, ...]) -> tuple[BaseTag, ...]:
    return tuple(map(Tag, keywords))


def _contents(source: BinaryIO, size: int, rules: IntakeRules, tags: Sequence[BaseTag] = ()) -> tuple[Dataset, int]:
    """Read a DICOM file of PS3.10 from its start: whole, or of what stands before the pixels the given tags alone.

    As pydicom's `dcmread`, which would read the file meta a second time and inflate without a bound. Beside comes how
    many bytes of pixels are there, where these are not read.

    Raises:
        Refused: It is no such file, or too large now or when inflated.
        Exception: One of `DAMAGED_DICOM`.

    Guarantees:
        - inflates_within_the_limit: A deflated data set is refused when it would take more than the rules allow.
        - headers_are_bounded: What pydicom makes of a header takes `header_bytes` at most, in a decoder's process.
    """
    start = source.read(132)
    if start[128:] != b"DICM":
        raise Refused(Reason.NO_PREAMBLE if _is_bare_data_set(start) else Reason.NOT_DICOM)
    if size > rules.max_bytes:
        raise Refused(Reason.TOO_LARGE)
    meta = file_meta(source, rules)
    if meta.get("MediaStorageSOPClassUID") == MediaStorageDirectoryStorage:
        raise Refused(Reason.INDEX)
    syntax = meta.get("TransferSyntaxUID")
    if not syntax:
        raise Refused(Reason.NO_SYNTAX)
    _skip_command_set(source, rules)
    if syntax == DeflatedExplicitVRLittleEndian:
        inflated = _inflated(source.read(), rules.max_bytes)
        source, size = io.BytesIO(inflated), len(inflated)
    there = [0]

    def at_pixels(tag: BaseTag, _vr: str | None, length: int) -> bool:
        if tag in _PIXELS:
            there[0] = min(length, size - source.tell())
        return tag in _PIXELS

    with within(header_bytes(rules) + (0 if tags else _COPIES * size)):
        dataset = read_dataset(
            source,
            is_implicit_VR=syntax == ImplicitVRLittleEndian,
            is_little_endian=syntax != ExplicitVRBigEndian,
            stop_when=at_pixels if tags else None,
            specific_tags=list(tags) or None,
        )
    dataset.file_meta = FileMetaDataset(meta)
    return dataset, there[0]


def _inflated(data: bytes, limit: int) -> bytes:
    inflater = zlib.decompressobj(-zlib.MAX_WBITS)
    inflated = inflater.decompress(data, limit + 1)
    if len(inflated) > limit:
        raise Refused(Reason.TOO_LARGE)
    if not inflater.eof:
        raise zlib.error("cut short")
    return inflated


def file_meta(source: BinaryIO, rules: IntakeRules) -> Dataset:
    """Read the file meta of a file that has the preamble, and nothing behind it.

    Raises:
        Exception: One of `DAMAGED_DICOM`.
    """
    source.seek(132)
    # Not pydicom's read_file_meta_info, which takes names of files alone.
    with within(header_bytes(rules)):
        return read_dataset(source, False, True, stop_when=lambda tag, _vr, _length: tag.group != 2)


def _skip_command_set(source: BinaryIO, rules: IntakeRules) -> None:
    """Read over the command of a C-STORE, which some archives keep; it is always in Implicit VR Little Endian."""
    start = source.read(2)
    source.seek(-len(start), io.SEEK_CUR)
    if start == b"\0\0":
        with within(header_bytes(rules)):
            read_dataset(source, True, True, stop_when=lambda tag, _vr, _length: tag.group != 0)


def parse(data: bytes, rules: IntakeRules) -> tuple[Dataset, str]:
    """Read a whole file from memory, where a length that the header makes up cannot allocate more than the file has.

    Raises:
        Refused: As in `read_header`.
        Exception: One of `DAMAGED_DICOM`.
    """
    dataset, _ = _contents(io.BytesIO(data), len(data), rules)
    with within(header_bytes(rules)):
        digest = digest_of(dataset)
    check_header(dataset, rules)
    return dataset, digest


def syntax_name(uid: str) -> str:
    """Return a transfer syntax's registered name; a private UID is text of the file, so it is not shown."""
    return UID(uid).name if uid in UID_dictionary else "an unregistered transfer syntax"


def _is_bare_data_set(start: bytes) -> bool:
    """Return whether bytes begin like a data set, or file meta without a preamble: a low element of group 2 or 8."""
    if len(start) < 8:
        return False
    little, big = struct.unpack("<HH", start[:4]), struct.unpack(">HH", start[:4])
    return (little[0] in (2, 8) and little[1] < 0x100) or (big[0] == 8 and big[1] < 0x100)
