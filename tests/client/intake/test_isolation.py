from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from pydicom import dcmread
from pydicom.encaps import encapsulate
from pydicom.uid import JPEG2000Lossless

from client.intake import Reason, read, scan
from client.intake.dicom import is_compressed
from client.intake.isolation import DecoderProcess

WriteDicom = Callable[..., Path]


# Dies, hangs, says too much or answers, as the file's name says.
FAULTY = """
import os, sys, time
from multiprocessing.connection import Connection
connection = Connection(int(sys.argv[1]))
while True:
    request = connection.recv_bytes()
    if request.endswith(b"abort"):
        os.abort()
    if request.endswith(b"hang"):
        time.sleep(60)
    connection.send_bytes(b"+" + bytes(10**6 if request.endswith(b"long") else request[2] * 28 * 28))
"""


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["abort", "long"])
def test_survives_abort(fault: str) -> None:
    with DecoderProcess(FAULTY) as decoder:
        assert decoder.square(Path(fault), 28) == Reason.PIXELS
        assert np.array_equal(decoder.square(Path("good"), 28), np.zeros((1, 28, 28)))
        assert np.array_equal(decoder.square(Path("good"), 28, 3), np.zeros((3, 28, 28)))


@pytest.mark.slow
def test_survives_hang() -> None:
    with DecoderProcess(FAULTY, timeout_s=0.2) as decoder:
        assert decoder.square(Path("hang"), 28) == Reason.PIXELS


@pytest.mark.slow
def test_compressed_files_are_decoded_outside(tmp_path: Path, write_dicom: WriteDicom) -> None:
    plain = write_dicom(tmp_path / "plain")
    packed = write_dicom(tmp_path / "packed", syntax=JPEG2000Lossless, PixelData=encapsulate([bytes(100)]))
    assert not is_compressed(plain)
    assert is_compressed(packed)
    dataset, refused = read(scan(tmp_path, "none"), ["all"], 28)
    assert len(dataset.images) == 1
    assert refused == {Reason.PIXELS: 1}
    assert dcmread(packed).file_meta.TransferSyntaxUID == JPEG2000Lossless
