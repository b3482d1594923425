"""The images of a scan in memory, twins and doubtful ones too: what an import decodes before it leaves any out."""

from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import groupby

import numpy as np

from client.intake import Dataset, IntakeRules, Reason, Record, Scan, decode_records
from client.intake.shortage import too_few


def read(
    found: Scan, classes: Sequence[str], size: int, channels: int = 1, rules: IntakeRules | None = None
) -> tuple[Dataset, Mapping[str, int]]:
    """Return the images, one patient after the other, and how many were refused for each reason."""
    refused = Counter(found.refused)
    refused[Reason.NO_LABEL] += sum(record.label is None for record in found.records)
    refused[Reason.OTHER_LABEL] += sum(record.label not in (None, *classes) for record in found.records)
    wanted = sorted((record for record in found.records if record.label in classes), key=lambda it: it.patient)
    kept: list[tuple[Record, np.ndarray]] = []
    for record, square in decode_records(wanted, size, channels, rules):
        if isinstance(square, str):
            refused[square] += 1
        else:
            kept.append((record, square))
    counts = {reason: count for reason, count in refused.items() if count}
    if not kept:
        raise too_few(0, 1, counts)
    patients = [number for number, (_, group) in enumerate(groupby(kept, lambda it: it[0].patient)) for _ in group]
    labels = [list(classes).index(str(record.label)) for record, _ in kept]
    return Dataset(np.stack([square for _, square in kept]), np.array(labels), np.array(patients)), {
        reason: count for reason, count in refused.items() if count
    }
