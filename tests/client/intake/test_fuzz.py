"""Damaged DICOM files by the thousand: each is read or refused with a reason, in bounded memory and time."""

import resource
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import psutil
import pytest
from pydicom import dcmread
from pydicom.dataset import Dataset
from pydicom.uid import DeflatedExplicitVRLittleEndian, JPEG2000Lossless, JPEGLSLossless, RLELossless

from client.intake import IntakeRules, decode_records
from client.intake.folders import scan_folder
from client.intake.records import LabelSource
from client.intake.refusals import quiet
from client.intake.worker import MEMORY_BYTES

FILES = 10_000
RULES = IntakeRules(frames="all", max_frames=16, decode_seconds=20)
WriteDicom = Callable[..., Path]


def seeds(folder: Path, write_dicom: WriteDicom) -> list[bytes]:
    """One small file of each kind: native, deflated, RLE, three codecs, many frames, colours, a palette, LUTs."""
    grey = np.random.default_rng(0).integers(0, 4096, (36, 32)).astype(np.uint16)
    item = Dataset()
    item.LUTDescriptor, item.LUTData = [100, 50, 8], list(range(0, 200, 2))
    item["LUTDescriptor"].VR, item["LUTData"].VR = "US", "US"
    palette = {
        f"{name}PaletteColorLookupTable{what}": value
        for name in ("Red", "Green", "Blue")
        for what, value in (("Descriptor", [256, 0, 8]), ("Data", bytes(range(256))))
    }
    window = {"WindowCenter": [100, 7], "WindowWidth": [50, 9], "RescaleSlope": 2, "RescaleIntercept": 1}
    paths = [
        write_dicom(folder / "native", grey, **window, PixelPaddingValue=3),
        write_dicom(folder / "deflated", grey, syntax=DeflatedExplicitVRLittleEndian),
        write_dicom(folder / "film", grey, NumberOfFrames=3, PixelData=grey.tobytes() * 3),
        write_dicom(folder / "luts", grey, ModalityLUTSequence=[item], VOILUTSequence=[item]),
        write_dicom(folder / "colour", np.zeros((36, 32, 3), np.uint8)),
        write_dicom(folder / "palette", grey.astype(np.uint8), PhotometricInterpretation="PALETTE COLOR", **palette),
    ]
    for syntax in (RLELossless, JPEG2000Lossless, JPEGLSLossless):
        dataset = dcmread(paths[0])
        dataset.SOPClassUID, dataset.SOPInstanceUID = dataset.file_meta.MediaStorageSOPClassUID, "1.2.3"
        dataset.compress(syntax, generate_instance_uid=False)
        paths.append(folder / str(syntax))
        dataset.save_as(paths[-1])
    return [path.read_bytes() for path in [*paths, jpeg_lossless(paths[0])]]


def jpeg_lossless(path: Path) -> Path:
    import gdcm

    reader, change, writer = gdcm.ImageReader(), gdcm.ImageChangeTransferSyntax(), gdcm.ImageWriter()
    reader.SetFileName(str(path))
    reader.Read()
    change.SetTransferSyntax(gdcm.TransferSyntax(gdcm.TransferSyntax.JPEGLosslessProcess14_1))
    change.SetInput(reader.GetImage())
    change.Change()
    writer.SetFile(reader.GetFile())
    writer.SetImage(change.GetOutput())
    writer.SetFileName(str(path.with_name("sv1")))
    writer.Write()
    return path.with_name("sv1")


def mutated(content: bytes, rng: np.random.Generator) -> bytes:
    """Change, cut, repeat or drop some bytes behind the preamble; one time in four of the file's last third."""
    data = bytearray(content)
    first = 132 if rng.random() < 0.75 else 2 * len(data) // 3
    for _ in range(rng.integers(1, 9)):
        place = int(rng.integers(first, len(data)))
        kind = rng.integers(0, 10)
        if kind < 6:
            data[place] = int(rng.integers(0, 256))
        elif kind == 6:
            data[place : place + 4] = rng.choice([b"\xff\xff\xff\xff", b"\0\0\0\x80", b"\xff\xff\xff\x7f"])
        elif kind == 7:
            del data[place : place + int(rng.integers(1, 40))]
        elif kind == 8:
            data[place:place] = data[place : place + int(rng.integers(1, 200))]
        else:
            del data[max(place, 200) :]
        first = min(first, len(data) - 1)
    return bytes(data)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_every_mutated_file_is_accounted_for(tmp_path: Path, write_dicom: WriteDicom) -> None:
    sources = seeds(tmp_path, write_dicom)
    folder = tmp_path / "mutated"
    folder.mkdir()
    rng = np.random.default_rng(20)
    for number in range(FILES):
        (folder / f"{number:05d}").write_bytes(mutated(sources[number % len(sources)], rng))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started = time.monotonic()
    with quiet():
        found = scan_folder(folder, LabelSource("none"), RULES)
    named = {record.path for record in found.records} | {refusal.path for refusal in found.refusals}
    assert len(named) == FILES
    read, refused = 0, dict(found.refused)
    for (_, square), expected in zip(decode_records(found.records, 28, 1, RULES), found.records, strict=True):
        assert _ is expected
        if isinstance(square, str):
            refused[square] = refused.get(square, 0) + 1
        else:
            assert square.shape == (1, 28, 28)
            read += 1
    seconds = time.monotonic() - started
    children = [child.memory_info().rss for child in psutil.Process().children(recursive=True)]
    growth = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    print(
        f"\n{FILES} files, {read} images read, {refused}; {seconds:.1f} s, {growth:.0f} MiB more, decoders {children}"
    )
    assert read > FILES / 10
    assert growth < 300
    assert all(held < min(MEMORY_BYTES, 2 * 2**30) for held in children)
