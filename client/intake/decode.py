"""Decode and resize what a scan found. Out of scope: finding it (client/intake/sources)."""

from collections import deque
from collections.abc import Iterable, Iterator
from itertools import groupby
from operator import attrgetter

from client.intake.isolation import DecoderPool
from client.intake.pixels import Square
from client.intake.records import Record
from client.intake.requests import Asked, Form, Job, ask_pixels
from client.intake.rules import IntakeRules


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
        - only_what_was_seen: Bytes that are not those of the scan, by the file's state and what its header says of
          patient, instance and kind, are refused.
        - no_cross_patient_statistics: An image's pixels depend on that image alone, whoever else is there.
    """
    waiting: deque[Record] = deque()

    form = Form(size, channels, rules or IntakeRules())

    def asked() -> Iterator[Asked[Square]]:
        for (path, member, seen, blank), group in groupby(records, key=attrgetter("path", "member", "seen", "blank")):
            same = list(group)
            waiting.extend(same)
            yield ask_pixels(Job(path, member, tuple(record.frame for record in same), seen, blank), form)

    with DecoderPool(form.rules) as pool:
        for square in pool.answers(asked()):
            yield waiting.popleft(), square
