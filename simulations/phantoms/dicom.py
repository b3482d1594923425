"""Write made-up patients as a hospital's PACS would export them: valid DICOM, many encodings, marked as synthetic.

The objects are Computed Radiography images: the other radiographs' definition (Digital X-Ray) forbids a rescale and
demands a window, and a federation must read files with and without either. Out of scope: reading (the intake).

Source: DICOM PS3.3 A.2 (the object), C.7.6.3 (pixels), C.11.1 and C.11.2 (rescale, window), C.12.1 (Synthetic Data);
PS3.5 B.2 (identifiers from a UUID).
"""

import hashlib
import uuid
from collections.abc import Iterator, Sequence
from datetime import date, timedelta
from pathlib import Path
from typing import Final

import numpy as np
from jaxtyping import Float, UInt
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import UID, ComputedRadiographyImageStorage, ExplicitVRLittleEndian, RLELossless

from common.errors import StorageError
from simulations.phantoms.anatomy import render
from simulations.phantoms.cohort import CLASSES, Encoding, PhantomPatient, Scanner

RESCALE_SLOPE: Final = 4
RESCALE_INTERCEPT: Final = -1024

_NAMESPACE: Final = uuid.uuid5(uuid.NAMESPACE_DNS, "phantoms.fedmedgan")
_FIRST_DAY: Final = date(2020, 1, 1)
_CALENDAR_STREAM: Final = 2  # 0 and 1 are the anatomy's and the poses'


def write_hospital(
    folder: Path, patients: Sequence[PhantomPatient], scanner: Scanner, size: int = 128
) -> Iterator[int]:
    """Write the files of a hospital, patient by patient.

    Args:
        folder: Where the export shall stand; made when it does not exist.
        patients: The patients, each with an identifier of its own.
        scanner: The hospital's scanner.
        size: Width and height, pixels.

    Yields:
        The number of files of each patient, as soon as they are written.

    Raises:
        StorageError: The disk is full or the folder cannot be written.

    Guarantees:
        - same_bytes: The same arguments write the same files, byte for byte, on the same machine.
    """
    for patient in patients:
        yield write_patient(folder, patient, scanner, size)


def write_patient(folder: Path, patient: PhantomPatient, scanner: Scanner, size: int = 128) -> int:
    """Write one patient's images to a folder of their own below `folder`.

    Args:
        folder: The hospital's export; made when it does not exist.
        patient: The patient.
        scanner: The hospital's scanner; its encodings take turns.
        size: Width and height, pixels.

    Returns:
        The number of files.

    Raises:
        StorageError: The disk is full or the folder cannot be written.
    """
    try:
        below = folder / hashlib.sha256(f"{patient.issuer}/{patient.patient_id}".encode()).hexdigest()[:16]
        below.mkdir(parents=True, exist_ok=True)
        for image in range(patient.images):
            dataset = _encode(patient, image, scanner, size)
            dataset.save_as(below / f"{dataset.SOPInstanceUID}.dcm", enforce_file_format=True)
    except OSError as error:
        raise StorageError(
            f"Could not write phantom images to {folder}: {error.strerror or type(error).__name__}. "
            "Free space, make the folder writable or choose another, then run the same command again."
        ) from error
    return patient.images


def _encode(patient: PhantomPatient, image: int, scanner: Scanner, size: int) -> Dataset:
    encoding = scanner.encodings[(patient.seed + image) % len(scanner.encodings)]
    dataset = Dataset()
    _describe_patient(dataset, patient)
    _describe_acquisition(dataset, patient, image, scanner)
    _describe_pixels(dataset, encoding, size)
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.MediaStorageSOPClassUID = dataset.SOPClassUID
    dataset.file_meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    # pydicom would write its own version, and another version would write other bytes.
    dataset.file_meta.ImplementationClassUID = _uid("implementation")
    dataset.file_meta.ImplementationVersionName = "FEDMEDGAN"
    pixels = _quantise(render(patient, image, scanner, size), encoding)
    if encoding.compressed:
        dataset.compress(RLELossless, pixels, encoding_plugin="pydicom", generate_instance_uid=False)
    else:
        content = pixels.tobytes()
        dataset.PixelData = content + b"\0" * (len(content) % 2)
    return dataset


def _uid(*parts: str) -> UID:
    return UID(f"2.25.{uuid.uuid5(_NAMESPACE, '/'.join(parts)).int}")


def _describe_patient(dataset: Dataset, patient: PhantomPatient) -> None:
    generator = np.random.default_rng([patient.seed, _CALENDAR_STREAM])
    dataset.PatientName = f"PHANTOM^{patient.patient_id}"
    dataset.PatientID = patient.patient_id
    dataset.IssuerOfPatientID = patient.issuer
    dataset.PatientBirthDate = _FIRST_DAY - timedelta(days=int(generator.integers(20 * 365, 90 * 365)))
    dataset.PatientSex = str(generator.choice(["F", "M"]))
    dataset.PatientIdentityRemoved = "YES"
    dataset.DeidentificationMethod = "SYNTHETIC: NO PERSON STANDS BEHIND THIS IMAGE"
    dataset.AdmittingDiagnosesDescription = CLASSES[patient.label]


def _describe_acquisition(dataset: Dataset, patient: PhantomPatient, image: int, scanner: Scanner) -> None:
    """Make every image a study of its own, as follow-up images are."""
    generator = np.random.default_rng([patient.seed, _CALENDAR_STREAM, image + 1])
    name = (scanner.name, patient.issuer, patient.patient_id, str(patient.seed), str(image))
    dataset.SOPClassUID = ComputedRadiographyImageStorage
    dataset.SOPInstanceUID = _uid("instance", *name)
    dataset.StudyInstanceUID = _uid("study", *name)
    dataset.SeriesInstanceUID = _uid("series", *name)
    dataset.SyntheticData = "YES"
    dataset.StudyDate = _FIRST_DAY + timedelta(days=90 * image + int(generator.integers(90)))
    dataset.StudyTime = f"{generator.integers(7, 20):02d}{generator.integers(60):02d}00"
    dataset.StudyID = str(image + 1)
    dataset.SeriesNumber = 1
    dataset.InstanceNumber = 1
    dataset.AccessionNumber = ""
    dataset.ReferringPhysicianName = ""
    dataset.Modality = "CR"
    dataset.Manufacturer = "FEDMEDGAN"
    dataset.ManufacturerModelName = scanner.name
    dataset.BodyPartExamined = "CHEST"
    dataset.ViewPosition = "PA"
    dataset.PatientOrientation = ["L", "F"]
    dataset.ImageType = ["ORIGINAL", "PRIMARY"]
    dataset.BurnedInAnnotation = "NO"
    dataset.LossyImageCompression = "00"


def _describe_pixels(dataset: Dataset, encoding: Encoding, size: int) -> None:
    dataset.SamplesPerPixel = 1
    dataset.PhotometricInterpretation = "MONOCHROME1" if encoding.inverted else "MONOCHROME2"
    dataset.Rows = dataset.Columns = size
    dataset.BitsAllocated = 8 if encoding.bits == 8 else 16
    dataset.BitsStored = encoding.bits
    dataset.HighBit = encoding.bits - 1
    dataset.PixelRepresentation = 0
    slope, intercept = 1, 0
    if encoding.rescaled:
        slope, intercept = dataset.RescaleSlope, dataset.RescaleIntercept = RESCALE_SLOPE, RESCALE_INTERCEPT
        dataset.RescaleType = "US"
    if encoding.windowed:
        low, high = (slope * value + intercept for value in _range(encoding))
        # A linear window maps centre - 0.5 +- (width - 1) / 2 to the ends.
        dataset.WindowCenter, dataset.WindowWidth = (low + high + 1) / 2, high - low + 1


def _range(encoding: Encoding) -> tuple[int, int]:
    """Give the stored values of black and white (of white and black when inverted)."""
    highest = 2**encoding.bits - 1
    margin = highest // 8 if encoding.windowed else 0
    return margin, highest - margin


def _quantise(film: Float[np.ndarray, "size size"], encoding: Encoding) -> UInt[np.ndarray, "size size"]:
    low, high = _range(encoding)
    shown = 1.0 - film if encoding.inverted else film
    stored = np.rint(low + shown * (high - low))
    return stored.astype(np.uint8 if encoding.bits == 8 else "<u2")
