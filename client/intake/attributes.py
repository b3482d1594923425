"""What values of a DICOM header say as text, and who issued a patient's id. Out of scope: reading the header."""

from typing import Any

from pydicom import Dataset
from pydicom.multival import MultiValue
from pydicom.uid import UID

JUDGED = (
    "SOPClassUID",
    "Modality",
    "BurnedInAnnotation",
    "ImageType",
    "ConversionType",
    "Manufacturer",
    "ManufacturerModelName",
    "IssuerOfPatientID",
)
"""By these an image is refused, blanked, or told from another patient's."""

QUALIFIERS = "IssuerOfPatientIDQualifiersSequence"


def as_text(value: Any) -> str:
    """Return a tag's value as text; several values are joined as DICOM writes them."""
    if value is None or isinstance(value, bytes | Dataset):
        return ""
    several = not isinstance(value, str | UID) and hasattr(value, "__getitem__")
    return ("\\".join(str(item) for item in value) if several else str(value)).strip().strip("\0").strip()


def all_text(dataset: Dataset, *keywords: str) -> bool:
    """Return whether what a header says in some attributes is text, as far as they are there.

    Under another VR it would read as nothing, and no rule would see it.
    """
    for value in filter(None, map(dataset.get, keywords)):
        values = value if isinstance(value, MultiValue) else [value]
        if not all(isinstance(one, str) for one in values):
            return False
    return True


def qualified_issuer(dataset: Dataset) -> str:
    """Return the universal id of whoever issued the patient's id, as "TYPE:ID"; "" where none is stated.

    Source: DICOM PS3.3 table 10-18 (Issuer of Patient ID macro): one item, and a type wherever there is an id.

    Raises:
        Exception: One of `DAMAGED_DICOM`, where the sequence is none.
    """
    items = dataset.get(QUALIFIERS) or [Dataset()]
    if not all_text(items[0], "UniversalEntityID", "UniversalEntityIDType"):
        raise TypeError("no text")
    number, kind = (as_text(items[0].get(name)) for name in ("UniversalEntityID", "UniversalEntityIDType"))
    return f"{kind}:{number}" if number and kind else number
