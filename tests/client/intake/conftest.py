"""Small DICOM files made on the spot, and a folder where permissions count even for root's tests."""

import ctypes
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.uid import DigitalXRayImageStorageForPresentation, ExplicitVRLittleEndian, generate_uid

WriteDicom = Callable[..., Path]


@pytest.fixture(scope="session")
def write_dicom() -> WriteDicom:
    """Write a DICOM file of 12 stored bits; keyword arguments set or (None) remove elements."""

    def write(path: Path, pixels: np.ndarray | None = None, syntax: str = ExplicitVRLittleEndian, **tags: Any) -> Path:
        meta = FileMetaDataset()
        meta.MediaStorageSOPClassUID = tags.get("SOPClassUID", DigitalXRayImageStorageForPresentation)
        meta.MediaStorageSOPInstanceUID = generate_uid(entropy_srcs=[path.name])
        meta.TransferSyntaxUID = syntax
        dataset = FileDataset(str(path), {}, file_meta=meta, preamble=b"\0" * 128)
        pixels = np.arange(24 * 16, dtype=np.uint16).reshape(24, 16) if pixels is None else pixels
        dataset.Rows, dataset.Columns = pixels.shape[:2]
        dataset.SamplesPerPixel = 3 if pixels.ndim == 3 else 1
        dataset.PhotometricInterpretation = "RGB" if pixels.ndim == 3 else "MONOCHROME2"
        dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit = (8, 8, 7) if pixels.itemsize == 1 else (16, 12, 11)
        dataset.PixelRepresentation = 0
        if pixels.ndim == 3:
            dataset.PlanarConfiguration = 0
        dataset.PixelData = pixels.tobytes()
        dataset.PatientID = "P1"
        for keyword, value in tags.items():
            if value is None:
                delattr(dataset, keyword)
            else:
                setattr(dataset, keyword, value)
        path.parent.mkdir(parents=True, exist_ok=True)
        dataset.save_as(path, enforce_file_format=False)
        return path

    return write


_DAC = 0b110
"""CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH: by these alone root reads what its mode forbids."""


def _effective(change: Callable[[int], int]) -> None:
    """Change the capabilities that this thread uses, of those that it has.

    Source: capabilities(7), capget(2).
    """
    libc = ctypes.CDLL(None, use_errno=True)
    header, sets = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
    assert libc.capget(header, sets) == 0
    sets[0] = change(sets[0])
    assert libc.capset(header, sets) == 0


@pytest.fixture
def permissions(tmp_path: Path) -> Iterator[Path]:
    """A folder whose modes count in this process, also where the tests are root's; not in a decoder's process."""
    if os.geteuid() == 0:
        _effective(lambda now: now & ~_DAC)
    try:
        yield tmp_path
    finally:
        if os.geteuid() == 0:
            _effective(lambda now: now | _DAC)
        for root, folders, _ in os.walk(tmp_path):
            for name in folders:
                (Path(root) / name).chmod(0o700)
