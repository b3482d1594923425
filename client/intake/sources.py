"""Find the images of a source: which kind it is, and whether it can be used. Out of scope: pixels (decode.py)."""

from pathlib import Path

from client.intake.arrays import scan_arrays
from client.intake.dicom import LABELS_FILE, scan_folder
from client.intake.images import scan_index
from client.intake.records import LabelSource, Scan, parse_label
from client.intake.refusals import Reason, describe, quiet
from common.errors import IntakeError


def scan(path: Path, label: str = "auto") -> Scan:
    """List the images of a source from headers and indexes; no pixel is decoded.

    Args:
        path: An NPZ file or a folder holding one, a folder of PNG/JPEG with a CSV index, or a folder of DICOM.
        label: `auto`, `none`, `tag:KEYWORD` (DICOM) or `column:NAME` (CSV column or NPZ array).

    Returns:
        The images in a fixed order, and the count of refused files by reason.

    Raises:
        IntakeError: Nothing there is usable, or patients or labels are missing altogether.
        ConfigError: `label` is none of the forms or does not fit the source.

    Guarantees:
        - one_bad_file_stops_nothing: A file that cannot be used is counted with its reason, and the rest is read.
        - deterministic_order: The same folder gives the same records in the same order.
    """
    source = parse_label(label)
    if not path.exists():
        raise IntakeError(f"{path} does not exist. Check the path of the images.")
    with quiet():
        found = _scan_file(path, source) if path.is_file() else _scan_folder(path, source)
    _check(found)
    return found


def _scan_file(path: Path, label: LabelSource) -> Scan:
    if path.suffix.lower() != ".npz":
        raise IntakeError(f"Expected an NPZ file or a folder, got a file of type {path.suffix!r}. Give its folder.")
    return scan_arrays(path, label)


def _scan_folder(folder: Path, label: LabelSource) -> Scan:
    try:
        names = sorted(entry.name for entry in folder.iterdir())
    except OSError as error:
        raise IntakeError(
            f"The folder of the images cannot be read: {error.strerror}. Mend its permissions."
        ) from error
    if not names:
        raise IntakeError("The folder of the images is empty. Put DICOM files, or images with index.csv, into it.")
    tables = [name for name in names if name.lower().endswith(".csv") and name != LABELS_FILE]
    if "index.csv" in tables or (len(tables) == 1 and LABELS_FILE not in names):
        return scan_index(folder, folder / ("index.csv" if "index.csv" in tables else tables[0]), label)
    if len(tables) > 1 and LABELS_FILE not in names:
        raise IntakeError("The folder has several CSV files. Name one index.csv (PNG/JPEG) or labels.csv (DICOM).")
    arrays = [name for name in names if name.lower().endswith(".npz")]
    if len(arrays) == 1:
        return scan_arrays(folder / arrays[0], label)
    return scan_folder(folder, label)


def _check(found: Scan) -> None:
    if not found.records and Reason.NO_PATIENT in found.refused:
        raise IntakeError(
            f"No image names its patient ({describe(found.refused)}). Privacy is promised to each patient as a whole: "
            "export the images with PatientID (a pseudonym will do), or give an index with a column patient."
        )
    if not found.records:
        raise IntakeError(
            f"No usable image ({describe(found.refused) or 'nothing found'}). Expected single-frame DICOM, "
            "PNG/JPEG with index.csv, or an NPZ."
        )
    if all(record.label is None for record in found.records):
        raise IntakeError(
            f"None of {len(found.records)} images has a label. Give --label none to learn one class, or name where "
            "labels are: --label tag:KEYWORD for DICOM, --label column:NAME for a CSV file or an NPZ."
        )
