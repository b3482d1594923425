"""Images a second of the whole import, beside a bare loop of pydicom on the same files; and memory by number of files.

The files are of a realistic size: 1024 x 1024 pixels of 12 bits, a smooth body with grain, one half native, a quarter
JPEG 2000 and a quarter JPEG-LS, both lossless. Import means headers, decoding, windowing, resizing to 64 pixels. The
decoders' processes are running already, as they are after the first files of a real import. Rates are medians, times
on processors the least: these hardly depend on what else the machine does. The loop runs twice: as it is, where GDCM
decodes JPEG 2000 on all cores by itself, and kept to one core, as a loop without threads would be.
"""

import contextlib
import os
import resource
import statistics
import tempfile
import time
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from jaxtyping import UInt16
from pydicom import dcmread
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.uid import (
    DigitalXRayImageStorageForPresentation,
    ExplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGLSLossless,
    generate_uid,
)

from client.intake import decode_records, scan
from client.intake.isolation import number_of_workers, stop_idle
from simulations.benchmark import vault
from simulations.benchmark.report import Result

SIDE = 1024
FILES = {ExplicitVRLittleEndian: 24, JPEG2000Lossless: 12, JPEGLSLossless: 12}
DIFFERENT = 4
"""Images that are really different in each encoding; the rest are copies under other patients' names."""
REPEATS = 3
SIZE = 64


def measure() -> Result:
    """Write the files, run both in turn, and compare."""
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for syntax, count in FILES.items():
            _write(folder / syntax, syntax, count)
        _import(folder)  # starts the decoders and fills the page cache
        parts = [(syntax.name, folder / syntax) for syntax in FILES]
        rows += [_compare(title, part) for title, part in [("all together", folder), *parts]]
        few, many = _peak_bytes(folder, 1), _peak_bytes(folder, 4)
        read = vault.read_rates(folder / "vault")
        again = vault.seconds_of_imports(folder / "many")
    files = sum(FILES.values())
    decoded = rows[0]["import_images_s"]
    ratios = {
        "vault_read_over_decode": read.once / decoded,
        "vault_read_without_cache_over_decode": read.without_cache / decoded,
        "vault_read_images_s": read.once,
        "import_of_10000_small_files_s": again.first,
        "import_of_10000_unchanged_files_s": again.unchanged,
        "import_over_bare_loop": rows[0]["ratio"],
        "import_over_bare_loop_on_one_core": rows[0]["ratio_to_one_core"],
        "cpu_of_the_loop_over_import": rows[0]["loop_cpu_ms"] / rows[0]["import_cpu_ms"],
        "peak_memory_of_4_times_the_files_over_once": many / few,
        "peak_memory_mib": many / 2**20,
    }
    return Result(f"intake: {number_of_workers(None)} decoders, {files} files", rows, ratios)


def _compare(title: str, folder: Path) -> dict[str, Any]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    bare: list[tuple[float, float]] = []
    alone: list[tuple[float, float]] = []
    whole: list[tuple[float, float]] = []
    for _ in range(REPEATS):
        bare.append(_seconds(lambda: _loop(files)))
        with _one_core():
            alone.append(_seconds(lambda: _loop(files)))
        whole.append(_seconds(lambda: _import(folder)))
    loop, single, ours = (statistics.median(wall for wall, _ in times) for times in (bare, alone, whole))
    loop_cpu, ours_cpu = (min(cpu for _, cpu in times) for times in (bare, whole))
    return {
        "encoding": title,
        "files": len(files),
        "loop_images_s": len(files) / loop,
        "loop_on_one_core_images_s": len(files) / single,
        "import_images_s": len(files) / ours,
        "ratio": loop / ours,
        "ratio_to_one_core": single / ours,
        "loop_cpu_ms": 1000 * loop_cpu / len(files),
        "import_cpu_ms": 1000 * ours_cpu / len(files),
    }


def _loop(files: list[Path]) -> None:
    for path in files:
        _ = dcmread(path).pixel_array


@contextlib.contextmanager
def _one_core() -> Generator[None]:
    """Keep this thread, and the threads that a decoder starts from it, to one core."""
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(cores)})
    try:
        yield
    finally:
        os.sched_setaffinity(0, cores)


def _import(folder: Path, times: int = 1) -> None:
    records = scan(folder, "none").records
    found = sum(not isinstance(square, str) for _, square in decode_records(_repeated(records, times), SIZE))
    if found != len(records) * times:
        raise RuntimeError(f"Expected {len(records) * times} images, got {found}: install the extra `decoders`.")


def _repeated(records: tuple[Any, ...], times: int) -> Iterator[Any]:
    for _ in range(times):
        yield from records


def _seconds(what: Callable[[], object]) -> tuple[float, float]:
    """Return how long it took, and the time on processors of this process and its decoders together."""
    started, before = time.perf_counter(), _cpu_seconds()
    what()
    return time.perf_counter() - started, _cpu_seconds() - before


def _cpu_seconds() -> float:
    this = psutil.Process()
    times = [process.cpu_times() for process in [this, *this.children(recursive=True)]]
    return sum(spent.user + spent.system for spent in times)


def _peak_bytes(folder: Path, times: int) -> int:
    """Return what this process and fresh decoders held at most, all together, while files were imported."""
    stop_idle()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    _import(folder, times)
    children = psutil.Process().children(recursive=True)
    peaks = [_high_water(child.pid) for child in children]
    return sum(peaks) + max(before, _high_water(psutil.Process().pid))


def _high_water(process: int) -> int:
    """Source: proc(5), VmHWM."""
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def _write(folder: Path, syntax: str, count: int) -> None:
    folder.mkdir()
    different = [_dicom(_body(seed), syntax) for seed in range(min(DIFFERENT, count))]
    for number in range(count):
        dataset = different[number % len(different)]
        dataset.PatientID = f"P{number}"
        dataset.save_as(folder / f"{number:05d}.dcm", enforce_file_format=True)


def _body(seed: int) -> UInt16[np.ndarray, "rows columns"]:
    """Return a smooth body with the grain of a detector, in 12 bits."""
    rng = np.random.default_rng(seed)
    across = np.linspace(-1, 1, SIDE)
    body = sum(
        rng.uniform(200, 900) * np.exp(-(((across[:, None] - x) / w) ** 2 + ((across[None, :] - y) / h) ** 2))
        for x, y, w, h in rng.uniform([-1, -1, 0.1, 0.1], [1, 1, 0.8, 0.8], (12, 4))
    )
    return np.clip(body + rng.normal(0, 12, (SIDE, SIDE)) + 200, 0, 4095).astype(np.uint16)


def _dicom(pixels: UInt16[np.ndarray, "rows columns"], syntax: str) -> FileDataset:
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = DigitalXRayImageStorageForPresentation
    meta.MediaStorageSOPInstanceUID = generate_uid()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset = FileDataset("", {}, file_meta=meta, preamble=b"\0" * 128)
    dataset.SOPClassUID, dataset.SOPInstanceUID = meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID
    dataset.Modality, dataset.PhotometricInterpretation, dataset.SamplesPerPixel = "DX", "MONOCHROME2", 1
    dataset.Rows, dataset.Columns = pixels.shape
    dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit, dataset.PixelRepresentation = 16, 12, 11, 0
    dataset.WindowCenter, dataset.WindowWidth = 1500, 3000
    dataset.PixelData = pixels.tobytes()
    if syntax != ExplicitVRLittleEndian:
        dataset.compress(syntax, generate_instance_uid=False)
    return dataset
