"""Decode, resize and group what a scan found. Out of scope: finding it (client/intake/sources)."""

from collections import Counter, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import groupby, pairwise
from operator import attrgetter

import numpy as np
from jaxtyping import Int64

from client.intake.dataset import Dataset
from client.intake.isolation import DecoderPool
from client.intake.pixels import Square
from client.intake.records import Record, Scan
from client.intake.refusals import Reason, describe
from client.intake.requests import Asked, Form, Job, ask_pixels
from client.intake.rules import IntakeRules
from common.config import IMAGE_CHANNELS, IMAGE_SIZES
from common.errors import ConfigError, IntakeError


def read(
    scan: Scan, classes: Sequence[str], size: int, channels: int = 1, rules: IntakeRules | None = None
) -> tuple[Dataset, Mapping[str, int]]:
    """Decode and resize the images of a scan, one patient after the other.

    Args:
        scan: What `scan` found, or a part of it.
        classes: Class names in the order of their numbers.
        size: Side of the images in pixels, one of `IMAGE_SIZES`.
        channels: 1 for grey, colour becomes luminance; 3 for colour, grey becomes three equal channels.
        rules: How images are read; the scan's.

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
    for record, square in decode_records(wanted, size, channels, rules):
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


def decode_records(
    records: Iterable[Record], size: int, channels: int = 1, rules: IntakeRules | None = None
) -> Iterator[tuple[Record, Square | str]]:
    """Decode records in processes of their own, in order, few at a time.

    Args:
        records: From a scan by the same rules. Those of one file should be adjacent: it is then read once.
        size: Side of the images in pixels.
        channels: 1 for grey, 3 for colour.
        rules: How images are read.

    Yields:
        Each record with its pixels, or with the reason why it is refused.

    Guarantees:
        - every_record_once: Each record comes once and in its place, whatever is wrong with the others.
    """
    waiting: deque[Record] = deque()

    form = Form(size, channels, rules or IntakeRules())

    def asked() -> Iterator[Asked[Square]]:
        for (path, member, blank), group in groupby(records, key=attrgetter("path", "member", "blank")):
            same = list(group)
            waiting.extend(same)
            yield ask_pixels(Job(path, member, tuple(record.frame for record in same), blank), form)

    with DecoderPool(form.rules) as pool:
        for square in pool.answers(asked()):
            yield waiting.popleft(), square


def _wanted(records: Sequence[Record], classes: Sequence[str], refused: Counter[str]) -> list[Record]:
    """Return the records of the asked classes by patient, each patient's in the order of the scan."""
    known = set(classes)
    refused[Reason.NO_LABEL] += sum(record.label is None for record in records)
    refused[Reason.OTHER_LABEL] += sum(record.label is not None and record.label not in known for record in records)
    return sorted((record for record in records if record.label in known), key=attrgetter("patient"))


def _patient_numbers(records: Sequence[Record]) -> Int64[np.ndarray, "images"]:
    keys = [record.patient for record in records]
    new = [False, *(before != after for before, after in pairwise(keys))]
    return np.cumsum(new, dtype=np.int64)
