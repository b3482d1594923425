"""Every file of the shared DICOM sets: what the intake makes of it, and an independent decoder's word on the pixels.

Run as a program it writes the table of docs/dicom.md anew: `python -m tests.client.intake.golden`.
"""

import shutil
import subprocess
import tempfile
from collections import defaultdict
from pathlib import Path

import numpy as np
import pydicom
from PIL import Image

from client.intake.folders import scan_file
from client.intake.headers import DAMAGED_DICOM, is_dicom
from client.intake.records import LabelSource
from client.intake.refusals import Reason, Refused, quiet
from client.intake.rules import IntakeRules
from client.intake.worker import Source

ROOT = Path(__file__).resolve().parents[3]
SHARED = ROOT.parent / "shared" / "data"
DOCUMENT = ROOT / "docs" / "dicom.md"
BEGIN, END = "<!-- table: begin -->", "<!-- table: end -->"
RULES = IntakeRules(frames="all", percentiles=(0, 100))
TOOLS = ("dcm2pnm", "dcmj2pnm", "dcml2pnm", "zstd")
LOSSLESS, LOSSY = 1.01, 3.0
"""Most levels of 255 by which a decoder may differ: rounding to 8 bits; conversion of colours or inverse transform."""


def files() -> list[Path]:
    return sorted(path for path in SHARED.glob("dicom_*/**/*") if path.is_file())


def unpacked(path: Path, folder: Path) -> Path:
    """The dcmqi set is kept with zstd, which no PACS writes: its files are unpacked first."""
    if path.suffix != ".zst":
        return path
    plain = folder / "plain.dcm"
    with plain.open("wb") as handle:
        subprocess.run(["zstd", "-dcq", str(path)], stdout=handle, check=True)
    return plain


def examine(path: Path, folder: Path) -> tuple[str, str, str]:
    """Return what the file is, the result, and how the pixels were checked; raises where they were not."""
    path = unpacked(path, folder)
    with quiet():
        about = describe(path)
        found = scan_file(path, LabelSource("none"), RULES)
        reasons = [refusal.reason for refusal in found.refusals]
        nobody = reasons == [Reason.NO_PATIENT]
        if reasons and not nobody:
            return about, f"refused: {reasons[0]}", ""
        frames = [record.frame for record in found.records] or all_frames(path)
        try:
            source = Source(path, None, RULES)
            levels = [source.levels(frame) for frame in frames]
        except Refused as refusal:
            return about, f"refused: {refusal.reason}", ""
        how = check(path, frames, levels, folder)
    return about, "read, then refused: no patient id" if nobody else "read", how


def all_frames(path: Path) -> list[int | None]:
    frames = int(pydicom.dcmread(path, stop_before_pixels=True).get("NumberOfFrames") or 1)
    return list(range(frames)) if frames > 1 else [None]


def describe(path: Path) -> str:
    if not is_dicom(path):
        return "no DICOM file of PS3.10 | | "
    try:
        header = pydicom.dcmread(path, stop_before_pixels=True)
    except DAMAGED_DICOM:
        return "damaged | | "
    kind = pydicom.uid.UID(str(header.get("SOPClassUID") or header.file_meta.get("MediaStorageSOPClassUID", ""))).name
    syntax = header.file_meta.get("TransferSyntaxUID")
    signed = {0: "unsigned", 1: "signed"}.get(header.get("PixelRepresentation"), "")
    bits = f"{header.get('BitsStored', '')}/{header.get('BitsAllocated', '')} {signed}" if "Rows" in header else ""
    kind = {"1.2.840.10008.5.1.4.1.1.66.7": "Label Map Segmentation Storage"}.get(kind, kind)
    return f"{kind} | {syntax.name if syntax else ''} | {header.get('PhotometricInterpretation', '')} {bits}".strip()


def check(path: Path, frames: list, levels: list, folder: Path) -> str:
    dataset = pydicom.dcmread(path)
    worst: dict[str, float] = {}
    few = {0, len(frames) // 2, len(frames) - 1}
    for name, reference in (("dcmtk", by_dcmtk), ("GDCM", by_gdcm)):
        differences = []
        for frame, mine in ((frames[number], levels[number]) for number in sorted(few)):
            other = reference(path, dataset, frame or 0, folder)
            if other is None or other.shape != mine.shape:
                break
            differences.append(float(np.abs(other - mine).max()))
        else:
            worst[name] = max(differences)
            if worst[name] <= (LOSSY if is_lossy(dataset) else LOSSLESS):
                return name
    raise AssertionError(f"no decoder agrees on {path.name}: {worst}")


def is_lossy(dataset: pydicom.Dataset) -> bool:
    """Where two decoders may round differently: lossy streams, and colours that are converted."""
    lossy = ("1.2.840.10008.1.2.4.50", "1.2.840.10008.1.2.4.51", "1.2.840.10008.1.2.4.91")
    return dataset.file_meta.TransferSyntaxUID in lossy or dataset.PhotometricInterpretation.startswith("YBR")


def by_dcmtk(path: Path, dataset: pydicom.Dataset, frame: int, folder: Path) -> np.ndarray | None:
    syntax = dataset.file_meta.TransferSyntaxUID
    jpeg, jpegls = syntax.startswith("1.2.840.10008.1.2.4.5"), syntax in pydicom.uid.JPEGLSTransferSyntaxes
    tool = "dcml2pnm" if jpegls else "dcmj2pnm" if jpeg or syntax.endswith(".70") else "dcm2pnm"
    options = ["--write-8-bit-pnm", "--frame", str(frame + 1)]
    if dataset.PhotometricInterpretation.startswith("MONOCHROME"):
        if "VOILUTSequence" in dataset:
            options += ["--use-voi-lut", "1"]
        else:
            options += ["--use-window", "1"] if window(dataset) else ["--min-max-window"]
    out = folder / "dcmtk.pnm"
    out.unlink(missing_ok=True)
    done = subprocess.run([tool, *options, str(path), str(out)], capture_output=True)
    if done.returncode or not out.exists():
        return None
    return np.asarray(Image.open(out)).astype(float)


def by_gdcm(path: Path, dataset: pydicom.Dataset, frame: int, folder: Path) -> np.ndarray | None:
    """GDCM's own reader, then rescale, window and inversion by hand."""
    stack, space = gdcm_stack(path, dataset)
    if stack is None or dataset.PhotometricInterpretation == "PALETTE COLOR":
        return None
    stored = stack[frame].astype(float)
    if stored.ndim == 3:
        return by_hand_colour(stored, space, dataset)
    if dataset.PixelRepresentation:  # some streams are marked as unsigned, although the header says signed
        half = 2.0 ** (dataset.BitsStored - 1)
        stored = (stored + half) % (2 * half) - half
    return by_hand(stored, dataset, frame)


def gdcm_stack(path: Path, dataset: pydicom.Dataset) -> tuple[np.ndarray | None, str]:
    import gdcm

    reader = gdcm.ImageReader()
    reader.SetFileName(str(path))
    if not reader.Read():
        return None, ""
    image = reader.GetImage()
    form = image.GetPixelFormat()
    kinds = {gdcm.PixelFormat.UINT8: "u1", gdcm.PixelFormat.INT8: "i1", gdcm.PixelFormat.UINT16: "<u2"}
    kinds |= {gdcm.PixelFormat.INT16: "<i2", gdcm.PixelFormat.UINT32: "<u4", gdcm.PixelFormat.INT32: "<i4"}
    if form.GetScalarType() not in kinds:
        return None, ""
    content = image.GetBuffer().encode("utf-8", "surrogateescape")
    values = np.frombuffer(content, kinds[form.GetScalarType()])
    samples = form.GetSamplesPerPixel()
    colour = (samples,) if samples > 1 else ()
    try:
        stack = values.reshape(-1, dataset.Rows, dataset.Columns, *colour)
    except ValueError:
        return None, ""
    if image.GetPlanarConfiguration() and samples > 1:
        stack = np.moveaxis(values.reshape(-1, samples, dataset.Rows, dataset.Columns), 1, -1)
    return stack, str(image.GetPhotometricInterpretation())


def by_hand_colour(stored: np.ndarray, space: str, dataset: pydicom.Dataset) -> np.ndarray:
    if "YBR_FULL" in space:
        y, b, r = stored[..., 0], stored[..., 1] - 128, stored[..., 2] - 128
        stored = np.clip(np.stack([y + 1.402 * r, y - 0.344136 * b - 0.714136 * r, y + 1.772 * b], -1), 0, 255)
    return stored * (255 / (2.0**dataset.BitsStored - 1))


def by_hand(stored: np.ndarray, dataset: pydicom.Dataset, frame: int) -> np.ndarray:
    padding = dataset.get("PixelPaddingValue")
    image = np.full(stored.shape, True) if padding is None else stored != float(padding)
    values = stored * float(dataset.get("RescaleSlope") or 1) + float(dataset.get("RescaleIntercept") or 0)
    if stated := window(dataset):
        share = (values - (stated[0] - 0.5)) / (stated[1] - 1) + 0.5
    else:
        low, high = values[image].min(), values[image].max()
        share = (values - low) / max(high - low, 1e-9)
    share = np.clip(share, 0, 1)
    return 255 * np.where(image, 1 - share if dataset.PhotometricInterpretation == "MONOCHROME1" else share, 0)


def window(dataset: pydicom.Dataset) -> tuple[float, float] | None:
    found = []
    for name in ("WindowCenter", "WindowWidth"):
        value = dataset.get(name)
        if value in (None, ""):
            return None
        found.append(float(value if isinstance(value, int | float) else value[0]))
    return (found[0], found[1]) if found[1] >= 1 else None


def table() -> str:
    """Examine all files and return the table; files of one kind with one result share a row."""
    groups: dict[tuple[str, str, str, str], list[Path]] = defaultdict(list)
    with tempfile.TemporaryDirectory() as name:
        for path in files():
            groups[(path.relative_to(SHARED).parts[0], *examine(path, Path(name)))].append(path)
    lines = [
        "| set | files | for example | what | transfer syntax | pixels | result | checked by |",
        "|" + " --- |" * 8,
    ]
    for (folder, about, result, how), paths in sorted(groups.items()):
        lines.append(f"| {folder[6:]} | {len(paths)} | {paths[0].name} | {about} | {result} | {how} |")
    return "\n".join(lines) + f"\n\nTogether {sum(map(len, groups.values()))} files; every one has a row.\n"


def missing_tools() -> list[str]:
    return [tool for tool in TOOLS if shutil.which(tool) is None]


if __name__ == "__main__":
    text = DOCUMENT.read_text()
    start, end = text.index(BEGIN) + len(BEGIN), text.index(END)
    DOCUMENT.write_text(f"{text[:start]}\n{table()}{text[end:]}")
