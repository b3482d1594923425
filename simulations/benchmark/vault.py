"""Images a second out of a vault in random order; and seconds of an import that finds ten thousand files unchanged."""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import final
from unittest.mock import patch

import numpy as np

from client.intake import Form, sealed
from client.intake.importing import import_source
from client.intake.sealed import open_dataset
from client.intake.selection import Practice
from common.sealing import SealingKey
from simulations.phantoms.cohort import draw_patients, draw_scanner
from simulations.phantoms.dicom import write_hospital

IMAGES = 8192
SIZE = 64
BATCH = 64
FILES = 10_000


@final
@dataclass(frozen=True)
class ReadRates:
    """Images a second: each read once, and each decrypted again with the chunk around it."""

    once: float
    without_cache: float


@final
@dataclass(frozen=True)
class ImportTimes:
    """Seconds of a first import and of the next, which finds nothing changed."""

    first: float
    unchanged: float


def read_rates(folder: Path) -> ReadRates:
    """Import images of noise and read all of them in random order, in batches, by a fresh reader."""
    folder.mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (IMAGES, SIZE, SIZE)).astype(np.uint8)
    np.savez(folder / "images.npz", images=pixels, patient_id=np.arange(IMAGES))
    key, vault = SealingKey.generate(), folder / "vault"
    import_source(vault, key, Form(("all",), SIZE, 1), Practice(folder / "images.npz", "none"))
    order = np.random.default_rng(1).permutation(IMAGES)
    once = _rate(vault, key, order)
    with patch.object(sealed, "CACHE_BYTES", 0):
        return ReadRates(once, _rate(vault, key, order))


def seconds_of_imports(folder: Path) -> ImportTimes:
    """Import ten thousand small DICOM files, and again."""
    files = 0
    patients = draw_patients(FILES // 2, 0)
    scanner = draw_scanner(0, 0)
    for number, patient in enumerate(patients):
        part = folder / f"{number % 100:02d}"
        part.mkdir(parents=True, exist_ok=True)
        files += sum(write_hospital(part, [patient], scanner, 32))
        if files >= FILES:
            break
    key, vault, practice = SealingKey.generate(), folder.parent / "many-vault", Practice(folder, "none")
    form = Form(("all",), 28, 1)
    started = time.perf_counter()
    import_source(vault, key, form, practice)
    between = time.perf_counter()
    done = import_source(vault, key, form, practice)
    times = ImportTimes(between - started, time.perf_counter() - between)
    if done.added or done.unchanged < FILES:
        raise RuntimeError(f"Expected {FILES} unchanged files, got {done.unchanged} and {done.added} images anew.")
    return times


def _rate(vault: Path, key: SealingKey, order: np.ndarray) -> float:
    images = open_dataset(vault, key).images
    started = time.perf_counter()
    for start in range(0, len(order), BATCH):
        images[order[start : start + BATCH]]
    return len(order) / (time.perf_counter() - started)
