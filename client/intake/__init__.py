"""From a hospital's files to training tensors. Nothing here leaves the site, and nothing here has a network.

Two steps, between which a caller can stop, store, skip or choose:

    found = scan(path, label, rules)                    # headers and indexes only, no pixel
    for record, square in decode_records(found.records, size, channels, rules):
        ...                                             # uint8 (channels, size, size), or the reason of the refusal

- A `Record` names one image: (`path`, `member`, `frame`) is its identity within the source and all that is needed to
  read it again; `stamp` (size, time of change of `path`) tells whether it changed since; `header` holds `FACTS` of a
  DICOM header, for checks at the site.
- `found.refusals` names every file, member or row that is not used, with its reason; `found.refused` counts them.
  Records and refusals together account for every file.
- `scan(..., known=Known(skip))` does not open DICOM files and archives that the caller knows, by path and stamp.
- `decode_records` decodes in child processes, in order and within bounded memory; whatever is in a file costs that
  file's frames at most. `decode` reads one record in its own size, float32 levels in [0, 255], in this process.

`IntakeRules` is the `[intake]` table of site.toml; `scan` and `decode_records` must be given the same.
"""

from client.intake.dataset import Dataset, Form, Pixels
from client.intake.decode import decode_records
from client.intake.headers import FACTS
from client.intake.records import Record, Refusal, Scan
from client.intake.refusals import Reason, Refused
from client.intake.rules import IntakeRules
from client.intake.sources import scan
from client.intake.worker import decode

__all__ = [
    "FACTS",
    "Dataset",
    "Form",
    "IntakeRules",
    "Pixels",
    "Reason",
    "Record",
    "Refusal",
    "Refused",
    "Scan",
    "decode",
    "decode_records",
    "scan",
]
