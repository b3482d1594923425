"""Find the images of a source: which kind it is, and whether it can be used. Out of scope: pixels (decode.py).

A file: an NPZ, a zip archive of DICOM, a DICOMDIR or one DICOM file. A folder: with an index CSV, PNG, JPEG, TIFF and
NIfTI; with one NPZ, that; else a tree of DICOM files and zip archives.
"""

from pathlib import Path

from client.intake.arrays import scan_arrays
from client.intake.directory import is_directory
from client.intake.folders import LABELS_FILE, scan_directory, scan_file, scan_folder
from client.intake.headers import is_dicom
from client.intake.images import scan_index
from client.intake.records import LabelSource, Scan, Skip, parse_label
from client.intake.refusals import Reason, describe, quiet
from client.intake.rules import IntakeRules
from client.paths import INCOMING
from common.errors import IntakeError, UnreadableSource


def scan(path: Path, label: str = "auto", rules: IntakeRules | None = None, skip: Skip | None = None) -> Scan:
    """List the images of a source from headers and indexes; no pixel is decoded.

    Args:
        path: A file or folder as above.
        label: `auto`, `none`, `tag:KEYWORD` (DICOM) or `column:NAME` (CSV column or NPZ array),
            `rules:FILE` (client/intake/labels).
        rules: Which frames are read, and the limits.
        skip: Asked for each DICOM file and archive; one that the caller knows already is not opened.

    Returns:
        The images in a fixed order, and the count of refused files by reason.

    Raises:
        UnreadableSource: It is not there or cannot be read.
        IntakeError: Nothing there is usable, or patients or labels are missing altogether.
        ConfigError: `label` is none of the forms or does not fit the source.

    Guarantees:
        - one_bad_file_stops_nothing: A file that cannot be used is counted with its reason, and the rest is read.
        - deterministic_order: The same folder gives the same records in the same order.
        - known_files_are_not_opened: A file that `skip` knows is neither opened nor refused, but named in `skipped`.
    """
    found = find(path, label, rules, skip)
    require_usable(found)
    return found


def find(path: Path, label: str, rules: IntakeRules | None = None, skip: Skip | None = None) -> Scan:
    """Do the same without asking whether anything is usable.

    Raises:
        UnreadableSource, IntakeError, ConfigError: The source cannot be listed at all.
    """
    source, rules = parse_label(label), rules or IntakeRules()
    if not path.exists():
        raise UnreadableSource(f"{path} does not exist. Check the path of the images, and that its disk is mounted.")
    with quiet():
        return (_scan_file if path.is_file() else _scan_folder)(path, source, rules, skip)


def _scan_file(path: Path, label: LabelSource, rules: IntakeRules, skip: Skip | None) -> Scan:
    suffix = path.suffix.lower()
    if suffix == ".npz":
        return scan_arrays(path, label)
    try:
        dicom = is_dicom(path)
    except OSError as error:
        raise UnreadableSource(
            f"The file of the images cannot be read: {error.strerror}. Mend its permissions."
        ) from error
    if dicom and is_directory(path):
        return scan_directory(path, label, rules, skip)
    if dicom or suffix == ".zip":
        return scan_file(path, label, rules, skip)
    raise IntakeError(
        "Expected an NPZ file or a folder, a zip archive, a DICOMDIR or a DICOM file, got a file of another kind. Give "
        "its folder."
    )


def _scan_folder(folder: Path, label: LabelSource, rules: IntakeRules, skip: Skip | None) -> Scan:
    try:
        names = sorted(entry.name for entry in folder.iterdir() if entry.name != INCOMING)
    except OSError as error:
        raise UnreadableSource(
            f"The folder of the images cannot be read: {error.strerror}. Mend its permissions."
        ) from error
    if not names:
        raise IntakeError("The folder of the images is empty. Put DICOM files, or images with index.csv, into it.")
    tables = [name for name in names if name.lower().endswith(".csv") and name != LABELS_FILE]
    if "index.csv" in tables or (len(tables) == 1 and LABELS_FILE not in names):
        return scan_index(folder, folder / ("index.csv" if "index.csv" in tables else tables[0]), label, rules)
    if len(tables) > 1 and LABELS_FILE not in names:
        raise IntakeError("The folder has several CSV files. Name one index.csv (PNG/JPEG) or labels.csv (DICOM).")
    arrays = [name for name in names if name.lower().endswith(".npz")]
    if len(arrays) == 1:
        return scan_arrays(folder / arrays[0], label)
    return scan_folder(folder, label, rules, skip)


def require_usable(found: Scan) -> None:
    """Refuse a source of which no image can be used at all, by its headers.

    Raises:
        IntakeError: No record, no patient, or no label.
    """
    if found.skipped:
        return
    if not found.records and Reason.NO_PATIENT in found.refused:
        raise IntakeError(
            f"No image names its patient ({describe(found.refused)}). Privacy is promised to each patient as a whole: "
            "export the images with PatientID (a pseudonym will do), or give an index with a column patient."
        )
    if not found.records:
        raise IntakeError(
            f"No usable image ({describe(found.refused) or 'nothing found'}). Expected DICOM, PNG, "
            "JPEG, TIFF or NIfTI with index.csv, or an NPZ."
        )
    if all(record.label is None for record in found.records):
        raise IntakeError(
            f"None of {len(found.records)} images has a label. Give --label none to learn one class, or name where "
            "labels are: --label tag:KEYWORD for DICOM, --label column:NAME for a CSV file or an NPZ."
        )
