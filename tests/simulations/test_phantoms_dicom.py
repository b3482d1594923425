"""The written files: valid DICOM, every encoding, the same picture whatever the encoding, the same bytes every time."""

import shutil
import subprocess
from dataclasses import replace

import numpy as np
import pydicom
import pytest
from pydicom.pixels import apply_rescale, apply_windowing
from pydicom.uid import ExplicitVRLittleEndian, RLELossless

from common.errors import StorageError
from simulations.phantoms.anatomy import render
from simulations.phantoms.cohort import CLASSES, ENCODINGS, draw_patients, draw_scanner
from simulations.phantoms.dicom import write_hospital, write_patient

PATIENT = replace(draw_patients(1, 21)[0], images=1)
SCANNER = draw_scanner(0, 21)


def write_one(folder, encoding, size=32, patient=PATIENT):
    write_patient(folder, patient, replace(SCANNER, encodings=(encoding,)), size)
    (path,) = folder.rglob("*.dcm")
    return path


def shown(dataset):
    """Show the picture as a viewer does: rescale, window or full range, inversion; in [0, 1]."""
    values = apply_rescale(dataset.pixel_array, dataset).astype(np.float64)
    if "WindowCenter" in dataset:
        # Without bits of the result to scale to, the window's own ends are the range.
        low = dataset.WindowCenter - 0.5 - (dataset.WindowWidth - 1) / 2
        values = np.clip((values - low) / (dataset.WindowWidth - 1), 0.0, 1.0)
    else:
        slope, intercept = dataset.get("RescaleSlope", 1), dataset.get("RescaleIntercept", 0)
        values = (values - float(intercept)) / (float(slope) * (2**dataset.BitsStored - 1))
    return 1.0 - values if dataset.PhotometricInterpretation == "MONOCHROME1" else values


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("size", [32, 33])
@pytest.mark.parametrize("encoding", ENCODINGS, ids=str)
def test_round_trip(tmp_path, encoding, size):
    dataset = pydicom.dcmread(write_one(tmp_path, encoding, size))
    step = 1.0 / ((2**encoding.bits - 1) * (0.74 if encoding.windowed else 1.0))
    assert np.abs(shown(dataset) - render(PATIENT, 0, SCANNER, size)).max() <= 0.5 * step + 1e-6
    assert dataset.file_meta.TransferSyntaxUID == (RLELossless if encoding.compressed else ExplicitVRLittleEndian)
    assert dataset.BitsStored == encoding.bits
    assert ("RescaleSlope" in dataset) == encoding.rescaled
    assert ("WindowCenter" in dataset) == encoding.windowed


@pytest.mark.parametrize("encoding", [encoding for encoding in ENCODINGS if encoding.windowed], ids=str)
def test_window_agrees_with_pydicom(tmp_path, encoding):
    dataset = pydicom.dcmread(write_one(tmp_path, encoding))
    values = apply_windowing(apply_rescale(dataset.pixel_array, dataset), dataset).astype(np.float64)
    slope, intercept = float(dataset.get("RescaleSlope", 1)), float(dataset.get("RescaleIntercept", 0))
    values = (values - intercept) / (slope * (2**encoding.bits - 1))
    shown_values = 1.0 - values if encoding.inverted else values
    assert np.abs(shown_values - shown(dataset)).max() < 1e-6


def test_same_bytes(tmp_path):
    patients = draw_patients(8, 22)
    for name in ("one", "two"):
        assert sum(write_hospital(tmp_path / name, patients, SCANNER, 32)) == sum(p.images for p in patients)
    one = contents(tmp_path / "one")
    assert one == contents(tmp_path / "two")
    list(write_hospital(tmp_path / "other", draw_patients(8, 23), SCANNER, 32))
    assert set(one.values()).isdisjoint(contents(tmp_path / "other").values())


def test_numbers_of_files_are_yielded_as_they_are_written(tmp_path):
    patients = draw_patients(6, 24)
    written = 0
    for patient, count in zip(patients, write_hospital(tmp_path, patients, SCANNER, 32), strict=True):
        written += count
        assert count == patient.images
        assert len(contents(tmp_path)) == written
    assert len(list(tmp_path.iterdir())) == len(patients)


@pytest.mark.slow
def test_every_encoding_occurs_in_four_hospitals(tmp_path):
    found = set()
    for site in range(4):
        list(write_hospital(tmp_path / str(site), draw_patients(40, 100 + site), draw_scanner(site, 25), 32))
    for path in tmp_path.rglob("*.dcm"):
        dataset = pydicom.dcmread(path, stop_before_pixels=True)
        found.add(
            (
                dataset.BitsStored,
                dataset.PhotometricInterpretation,
                "RescaleSlope" in dataset,
                "WindowCenter" in dataset,
                dataset.file_meta.TransferSyntaxUID,
            )
        )
    assert len(found) == len(ENCODINGS)


def test_headers_say_who_and_that_nobody_is_behind_it(tmp_path):
    patients = draw_patients(12, 26)
    list(write_hospital(tmp_path, patients, SCANNER, 32))
    datasets = [pydicom.dcmread(path) for path in tmp_path.rglob("*.dcm")]
    by_id = {patient.patient_id: patient for patient in patients}
    for dataset in datasets:
        patient = by_id[dataset.PatientID]
        assert dataset.IssuerOfPatientID == patient.issuer
        assert dataset.AdmittingDiagnosesDescription == CLASSES[patient.label]
        assert (dataset.SyntheticData, dataset.BurnedInAnnotation) == ("YES", "NO")
        assert dataset.PatientIdentityRemoved == "YES"
        assert all(uid.is_valid for uid in (dataset.SOPInstanceUID, dataset.StudyInstanceUID))
    uids = [dataset[name].value for dataset in datasets for name in ("SOPInstanceUID", "SeriesInstanceUID")]
    assert len(set(uids)) == len(uids)
    births = {(dataset.PatientID, dataset.PatientBirthDate, dataset.PatientSex) for dataset in datasets}
    assert len(births) == len(patients)


def test_folders_that_cannot_be_written_are_a_storage_error(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(StorageError, match="Could not write phantom images") as caught:
        write_patient(tmp_path / "file", PATIENT, SCANNER, 32)
    assert PATIENT.patient_id not in str(caught.value)


def test_full_disk_is_a_storage_error(tmp_path):
    path = write_one(tmp_path, ENCODINGS[0])
    path.unlink()
    path.symlink_to("/dev/full")
    with pytest.raises(StorageError, match="No space left"):
        write_one(tmp_path, ENCODINGS[0], size=128)


@pytest.mark.skipif(shutil.which("dciodvfy") is None, reason="dciodvfy (Debian package dicom3tools) is not installed")
@pytest.mark.parametrize("encoding", ENCODINGS, ids=str)
def test_dciodvfy_finds_no_error(tmp_path, encoding):
    path = write_one(tmp_path, encoding)
    done = subprocess.run(["dciodvfy", path], capture_output=True, text=True, timeout=30, check=False)
    lines = (done.stdout + done.stderr).splitlines()
    assert "CRImage" in lines
    # Synthetic Data is younger than the dictionary of many installed versions.
    assert [line for line in lines if "Error" in line and "(0x0008,0x001c)" not in line] == []


@pytest.mark.skipif(shutil.which("dciodvfy") is None, reason="dciodvfy (Debian package dicom3tools) is not installed")
def test_dciodvfy_would_find_an_error(tmp_path):
    path = write_one(tmp_path, ENCODINGS[0])
    dataset = pydicom.dcmread(path)
    del dataset.PhotometricInterpretation
    dataset.save_as(path)
    done = subprocess.run(["dciodvfy", path], capture_output=True, text=True, timeout=30, check=False)
    assert "Error - Missing attribute Type 1" in done.stdout + done.stderr
