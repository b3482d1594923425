"""Real chest X-rays as a hospital's PACS would export them: one DICOM file an image, a folder for each patient.

Where the shared images are absent, phantom radiographs take their place, written the same way.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import ComputedRadiographyImageStorage, ExplicitVRLittleEndian, generate_uid

from simulations.phantoms.anatomy import render
from simulations.phantoms.cohort import draw_patients, draw_scanner
from tests.e2e.test_real_images import KERMANY

CLASSES = ("normal", "pneumonia")
REAL = KERMANY.exists()
PATIENTS = 40
"""Of each hospital, half of each class."""
_SIZE = 64
_MOST_IMAGES = 3


@dataclass(frozen=True)
class Patient:
    """A person, what was found, and the images, 8 bits grey."""

    name: str
    finding: str
    images: np.ndarray


def write_hospitals(folders: list[Path]) -> None:
    """Write each hospital its own patients; no patient is at two hospitals."""
    queues = [iter(patients_of(finding)) for finding in CLASSES]
    for folder in folders:
        for queue in queues:
            for _ in range(PATIENTS // len(CLASSES)):
                write_patient(folder, next(queue))


def patients_of(finding: str) -> Iterator[Patient]:
    """Yield patients with a finding, in an order that does not change."""
    if not REAL:
        scanner, wanted = draw_scanner(0, 0), CLASSES.index(finding)
        for one in draw_patients(400, 0):
            if one.label % 2 == wanted:
                films = [render(one, image, scanner, _SIZE) for image in range(min(one.images, _MOST_IMAGES))]
                yield Patient(one.patient_id, finding, np.rint(255 * np.stack(films)).astype(np.uint8))
        return
    with np.load(KERMANY) as shared:
        images, names, labels = shared["images"], shared["patient_id"], shared["labels"]
    mine = labels == CLASSES.index(finding)
    both = set(names[mine]) & set(names[~mine])
    for name in sorted(set(names[mine]) - both):
        yield Patient(str(name), finding, images[mine & (names == name)][:_MOST_IMAGES])


def write_patient(folder: Path, patient: Patient) -> None:
    below = folder / patient.name
    below.mkdir(parents=True)
    for number, image in enumerate(patient.images):
        dataset = Dataset()
        dataset.SOPClassUID = ComputedRadiographyImageStorage
        dataset.SOPInstanceUID = generate_uid(entropy_srcs=[patient.name, str(number)])
        dataset.StudyInstanceUID = generate_uid(entropy_srcs=[patient.name, str(number), "study"])
        dataset.SeriesInstanceUID = generate_uid(entropy_srcs=[patient.name, str(number), "series"])
        dataset.PatientID, dataset.PatientName, dataset.IssuerOfPatientID = patient.name, "", "e2e"
        dataset.PatientIdentityRemoved = "YES"
        dataset.Modality, dataset.BodyPartExamined = "CR", "CHEST"
        dataset.AdmittingDiagnosesDescription = patient.finding
        dataset.SamplesPerPixel, dataset.PhotometricInterpretation = 1, "MONOCHROME2"
        dataset.Rows, dataset.Columns = image.shape
        dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit, dataset.PixelRepresentation = 8, 8, 7, 0
        dataset.PixelData = image.tobytes()
        dataset.file_meta = FileMetaDataset()
        dataset.file_meta.MediaStorageSOPClassUID = dataset.SOPClassUID
        dataset.file_meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID
        dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        dataset.save_as(below / f"{number}.dcm", enforce_file_format=True)
