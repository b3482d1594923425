"""Decode, resize and group what a scan found. Out of scope: finding it (sources.py)."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby, pairwise
from operator import attrgetter
from pathlib import Path

import numpy as np
from jaxtyping import Int64

from client.intake import arrays, dicom, images
from client.intake.dataset import Dataset
from client.intake.isolation import DecoderProcess
from client.intake.pixels import Square, fit
from client.intake.records import Record, Scan
from client.intake.refusals import Reason, Refused, describe, quiet
from common.config import IMAGE_CHANNELS, IMAGE_SIZES
from common.errors import ConfigError, IntakeError


def read(scan: Scan, classes: Sequence[str], size: int, channels: int = 1) -> tuple[Dataset, Mapping[str, int]]:
    """Decode and resize the images of a scan, one patient after the other.

    Args:
        scan: What `scan` found, or a part of it.
        classes: Class names in the order of their numbers.
        size: Side of the images in pixels, one of `IMAGE_SIZES`.
        channels: 1 for grey, colour becomes luminance; 3 for colour, grey becomes three equal channels.

    Returns:
        The data set, and the count of refused images by reason, those of the scan included.

    Raises:
        IntakeError: No image could be used.
        ConfigError: `size`, `channels` or `classes` are out of bounds.

    Guarantees:
        - patients_adjacent: Patients are numbered by (issuer, id) in sorted order; one's images are adjacent.
        - no_cross_patient_statistics: An image's pixels depend on that image alone, whoever else is there.
    """
    if size not in IMAGE_SIZES or not classes or len(set(classes)) != len(classes):
        raise ConfigError(f"Expected a size of {IMAGE_SIZES} and distinct classes, got {size} and {len(classes)}.")
    if channels not in IMAGE_CHANNELS:
        raise ConfigError(f"Expected channels={channels} as 1 (grey) or 3 (red, green and blue).")
    refused = Counter(scan.refused)
    wanted = _wanted(scan.records, classes, refused)
    pixels = np.empty((len(wanted), channels, size, size), dtype=np.uint8)
    kept: list[Record] = []
    with quiet(), DecoderProcess() as decoder:
        for record, square in zip(wanted, _squares(wanted, size, channels, decoder), strict=True):
            if isinstance(square, str):
                refused[square] += 1
            else:
                pixels[len(kept)] = square
                kept.append(record)
    counts = {reason: count for reason, count in sorted(refused.items()) if count}
    if not kept:
        raise IntakeError(f"No image could be used ({describe(counts) or 'nothing found'}). Mend these and run again.")
    numbers = {name: number for number, name in enumerate(classes)}
    labels = np.array([numbers[str(record.label)] for record in kept], dtype=np.int64)
    return Dataset(pixels[: len(kept)], labels, _patient_numbers(kept)), counts


def _wanted(records: Sequence[Record], classes: Sequence[str], refused: Counter[str]) -> list[Record]:
    """Return the records of the asked classes by patient, each patient's in the order of the scan."""
    known = set(classes)
    refused[Reason.NO_LABEL] += sum(record.label is None for record in records)
    refused[Reason.OTHER_LABEL] += sum(record.label is not None and record.label not in known for record in records)
    return sorted((record for record in records if record.label in known), key=attrgetter("patient"))


def _squares(records: Sequence[Record], size: int, channels: int, decoder: DecoderProcess) -> Iterator[Square | str]:
    """Yield for each record its pixels or the reason why it is refused; an NPZ is opened once."""
    for path, group in groupby(records, key=attrgetter("path")):
        rows = [record.row for record in group]
        in_array = [row for row in rows if row is not None]
        if in_array:
            yield from arrays.decode_rows(path, in_array, size, channels)
        else:
            yield from (_square(path, size, channels, decoder) for _ in rows)


def _square(path: Path, size: int, channels: int, decoder: DecoderProcess) -> Square | str:
    try:
        if not dicom.is_dicom(path):
            return fit(images.decode(path), size, channels)
        if dicom.is_compressed(path):
            return decoder.square(path, size, channels)
        return fit(dicom.decode(path), size, channels)
    except Refused as refusal:
        return refusal.reason
    except OSError:  # the file went away since the scan
        return str(Reason.MISSING)


def _patient_numbers(records: Sequence[Record]) -> Int64[np.ndarray, "images"]:
    keys = [record.patient for record in records]
    new = [False, *(before != after for before, after in pairwise(keys))]
    return np.cumsum(new, dtype=np.int64)
