"""Find the images of a source: which kind it is, and whether it can be used. Out of scope: pixels (decode.py).

A file: an NPZ, an index CSV, a zip archive of DICOM, a DICOMDIR or one DICOM file. A folder, by the first of these:

1. With `index.csv`: the PNG, JPEG, TIFF and NIfTI files that it names.
2. With `labels.csv`, or with a DICOM file or a zip archive anywhere below: a tree of DICOM files and zip archives.
3. With exactly one CSV file that has a column `file`: the files that it names.
4. With no such CSV file and exactly one NPZ: that.
5. Else a tree of DICOM files.

Files that are no part of what was chosen are counted as refused.
"""

from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

from client.intake.arrays import scan_arrays
from client.intake.directory import is_directory
from client.intake.folders import enter, is_archive, scan_directory, scan_file, scan_folder, walk
from client.intake.headers import is_dicom
from client.intake.images import scan_index
from client.intake.labels_file import LABELS_FILE
from client.intake.records import NOTHING_KNOWN, Known, LabelSource, Refusal, Scan, parse_label, scan_of, stamp_of
from client.intake.refusals import Reason, describe, quiet
from client.intake.rules import IntakeRules
from client.intake.table import columns_of
from client.paths import INCOMING
from common.errors import IntakeError, UnreadableSource


def scan(path: Path, label: str = "auto", rules: IntakeRules | None = None, known: Known = NOTHING_KNOWN) -> Scan:
    """List the images of a source from headers and indexes; no pixel is decoded.

    Args:
        path: A file or folder as above.
        label: `auto`, `none`, `tag:KEYWORD` (DICOM) or `column:NAME` (CSV column or NPZ array),
            `rules:FILE` (client/intake/labels).
        rules: Which frames are read, and the limits.
        known: Asked for each DICOM file and archive; one that the caller knows already is not opened.

    Returns:
        The images in a fixed order, and the count of refused files by reason.

    Raises:
        UnreadableSource: It is not there or cannot be read.
        IntakeError: Nothing there is usable, or patients or labels are missing altogether.
        ConfigError: `label` is none of the forms or does not fit the source.

    Guarantees:
        - one_bad_file_stops_nothing: A file that cannot be used is counted with its reason, and the rest is read.
        - deterministic_order: The same folder gives the same records in the same order.
        - known_files_are_not_opened: A file that is `known` is neither opened nor refused, but named in `skipped`.
    """
    found = find(path, label, rules, known)
    require_usable(found)
    return found


def find(path: Path, label: str, rules: IntakeRules | None = None, known: Known = NOTHING_KNOWN) -> Scan:
    """Do the same without asking whether anything is usable.

    Raises:
        UnreadableSource, IntakeError, ConfigError: The source cannot be listed at all.
    """
    source, rules = parse_label(label), rules or IntakeRules()
    if not _is_there(path):
        raise UnreadableSource(f"{path} does not exist. Check the path of the images, and that its disk is mounted.")
    with quiet():
        return (_scan_file if path.is_file() else _scan_folder)(path, source, rules, known)


def _is_there(path: Path) -> bool:
    try:
        return path.exists()
    except OSError as error:  # a folder above it cannot be entered
        raise UnreadableSource(f"{path} cannot be reached: {error.strerror}. Mend its permissions.") from error


def _scan_file(path: Path, label: LabelSource, rules: IntakeRules, known: Known) -> Scan:
    suffix = path.suffix.lower()
    if suffix == ".npz":
        return replace(scan_arrays(path, label), kind="NPZ")
    if suffix == ".csv":
        return _indexed(path, label, rules)
    try:
        dicom = is_dicom(path)
    except OSError as error:
        raise UnreadableSource(
            f"The file of the images cannot be read: {error.strerror}. Mend its permissions."
        ) from error
    if dicom and is_directory(path):
        return replace(scan_directory(path, label, rules, known), kind="files that a DICOMDIR names")
    if dicom or suffix == ".zip":
        return replace(scan_file(path, label, rules, known), kind="DICOM file" if dicom else "zip archive of DICOM")
    raise IntakeError(
        "Expected an NPZ file or a folder, an index CSV, a zip archive, a DICOMDIR or a DICOM file, got a file of "
        "another kind. Give its folder."
    )


def _scan_folder(folder: Path, label: LabelSource, rules: IntakeRules, known: Known) -> Scan:
    try:
        names = sorted(entry.name for entry in folder.iterdir() if entry.name != INCOMING)
        enter(folder)
    except OSError as error:
        raise UnreadableSource(
            f"The folder of the images cannot be read: {error.strerror}. Mend its permissions."
        ) from error
    if not names:
        raise IntakeError("The folder of the images is empty. Put DICOM files, or images with index.csv, into it.")
    if "index.csv" in names:
        return _indexed(folder / "index.csv", label, rules)
    tables = [name for name in names if name.lower().endswith(".csv")]
    arrays = [name for name in names if name.lower().endswith(".npz")]
    if (tables or arrays) and LABELS_FILE not in names and not _holds_dicom(folder):
        indexes = [name for name in tables if "file" in columns_of(folder / name)]
        if len(indexes) > 1:
            raise IntakeError(
                "The folder has several CSV files with a column file. Name the one that counts index.csv (PNG, JPEG, "
                "TIFF, NIfTI) or labels.csv (DICOM), or give its path in place of the folder's."
            )
        if indexes:
            return _indexed(folder / indexes[0], label, rules)
        if len(arrays) == 1:
            found = scan_arrays(folder / arrays[0], label)
            return replace(_with_strays(found, folder, {folder / arrays[0]}), kind="NPZ in a folder")
    return replace(scan_folder(folder, label, rules, known), kind="DICOM folder")


def _indexed(index: Path, label: LabelSource, rules: IntakeRules) -> Scan:
    found = scan_index(index.parent, index, label, rules)
    folder = index.parent.resolve()
    named = {item.path for item in (*found.records, *found.refusals)} | {folder / index.name}
    return replace(_with_strays(found, folder, named), kind="files that an index CSV names")


def _with_strays(found: Scan, folder: Path, used: Iterable[Path]) -> Scan:
    """Count what stands in the folder and is no part of the source."""
    strays = scan_of((), _strays(folder, frozenset(used)))
    refused = {**found.refused}
    for reason, count in strays.refused.items():
        refused[reason] = refused.get(reason, 0) + count
    return replace(found, refused=refused, refusals=(*found.refusals, *strays.refusals))


def _strays(folder: Path, used: frozenset[Path]) -> Iterator[Refusal]:
    for item in walk(folder):
        if (item.path if isinstance(item, Refusal) else item) in used:
            continue
        if isinstance(item, Refusal):
            yield item
        else:
            yield Refusal(item, None, Reason.NOT_OF_SOURCE, stamp_of(item))


def _holds_dicom(folder: Path) -> bool:
    """Return whether a DICOM file or a zip archive stands anywhere below a folder."""
    return any(is_archive(path) or _is_dicom(path) for path in walk(folder) if isinstance(path, Path))


def _is_dicom(path: Path) -> bool:
    try:
        return is_dicom(path)
    except OSError:
        return False


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
            f"No usable image ({describe(found.refused) or 'there is none'}). Expected DICOM, PNG, "
            f"JPEG, TIFF or NIfTI with index.csv, or an NPZ.{_where(found)}"
        )
    if all(record.label is None for record in found.records):
        raise IntakeError(
            f"None of {len(found.records)} images has a label. Give --label none to learn one class, or name where "
            "labels are: --label tag:KEYWORD for DICOM, --label column:NAME for a CSV file or an NPZ."
        )


def _where(found: Scan) -> str:
    if Reason.MISSING not in found.refused:
        return ""
    return " An index names files from its own folder: `a/1.png` is 1.png in the folder a beside it."
