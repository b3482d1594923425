"""What values of a DICOM header say as text, and who issued a patient's id. Out of scope: reading the header."""

from typing import Any

from pydicom import Dataset
from pydicom.uid import UID

QUALIFIERS = "IssuerOfPatientIDQualifiersSequence"


def as_text(value: Any) -> str:
    """Return a tag's value as text; several values are joined as DICOM writes them."""
    if value is None or isinstance(value, bytes | Dataset):
        return ""
    several = not isinstance(value, str | UID) and hasattr(value, "__getitem__")
    return ("\\".join(str(item) for item in value) if several else str(value)).strip().strip("\0").strip()


def qualified_issuer(dataset: Dataset) -> str:
    """Return the universal id of whoever issued the patient's id, as "TYPE:ID"; "" where none is stated.

    Source: DICOM PS3.3 table 10-18 (Issuer of Patient ID macro): one item, and a type wherever there is an id.

    Raises:
        Exception: One of `DAMAGED_DICOM`, where the sequence is none.
    """
    items = dataset.get(QUALIFIERS) or [Dataset()]
    number, kind = (as_text(items[0].get(name)) for name in ("UniversalEntityID", "UniversalEntityIDType"))
    return f"{kind}:{number}" if number and kind else number
