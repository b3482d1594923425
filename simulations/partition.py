"""Divide one source among virtual hospitals, patient by patient. Out of scope: training, and what the sites are called.

Every part of a scan keeps the scan's order and carries no refusals: those belong to the source.
"""

import io
import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from operator import attrgetter
from pathlib import Path

import numpy as np

from client.intake.arrays import load_stack
from client.intake.headers import is_dicom
from client.intake.labels_file import LABELS_FILE
from client.intake.records import Record, Scan
from client.intake.table import write_table
from common.errors import ConfigError, IntakeError, StorageError
from common.files import make_folder, write_atomic

Patient = tuple[str, str]


def hold_out(scan: Scan, fraction: float, seed: int) -> tuple[Scan, Scan]:
    """Set aside a part of the patients that no site gets.

    Patients are ordered by class and, within a class, by chance; every `1 / fraction`-th is held out. So each class
    gives its share up to one patient, and the total is `floor(fraction * patients)`.

    Args:
        scan: The source.
        fraction: Part of the patients to hold out, in [0, 1).
        seed: Seed of the draw.

    Returns:
        What remains, and what is held out.

    Raises:
        ConfigError: `fraction` is out of bounds.

    Guarantees:
        - disjoint_patients: All images of a patient are in one of the two.
        - every_patient_once: Every image of the scan is in exactly one of the two.
        - deterministic: The same scan, fraction and seed give the same parts.
    """
    if not 0 <= fraction < 1:
        raise ConfigError(f"Expected simulation.holdout={fraction} in [0, 1).")
    rng = np.random.default_rng(seed)
    by_class = _patients_by_class(scan.records)
    ordered = [patient for name in sorted(by_class) for patient in _shuffled(by_class[name], rng)]
    held = {
        patient: math.floor((place + 1) * fraction) - math.floor(place * fraction)
        for place, patient in enumerate(ordered)
    }
    remaining, aside = _split(scan, held, 2)
    return remaining, aside


def at_most(scan: Scan, patients: int, seed: int) -> Scan:
    """Keep so many patients, drawn by chance, with all their images.

    Args:
        scan: The source, less what is held out.
        patients: How many to keep; all when there are no more.
        seed: Seed of the draw.

    Guarantees:
        - nested: With the same seed, fewer patients are among more.
        - deterministic: The same scan, number and seed keep the same patients.
    """
    everyone = sorted({record.patient for record in scan.records})
    kept = set(_shuffled(everyone, np.random.default_rng(seed))[:patients])
    return Scan(tuple(record for record in scan.records if record.patient in kept), {})


def assign(scan: Scan, sites: int, partition: str, seed: int, one_class_site: bool = False) -> tuple[Scan, ...]:
    """Give every patient to one of the virtual hospitals.

    Args:
        scan: The source, less what is held out.
        sites: Number of hospitals.
        partition: `iid` (equal sizes), `dirichlet:ALPHA` (for every class, its shares over the sites are drawn from
            Dirichlet(ALPHA); small ALPHA skews classes and sizes), or `by-site-column` (the source says; a patient
            with images of several sites goes to the one with most of them).
        seed: Seed of the draw.
        one_class_site: Swap patients until the first hospital has those of the most frequent class alone.

    Returns:
        One scan for each site; of `by-site-column` in the alphabetical order of its values.

    Raises:
        ConfigError: There are fewer patients than sites, `partition` is unknown, the column names another number of
            sites, or no class is as large as the site that shall have no other.

    Guarantees:
        - disjoint_patients: All images of a patient are at one site.
        - every_patient_once: Every image of the scan is at exactly one site.
        - no_empty_site: Every site has a patient.
        - one_class_keeps_sizes: With `one_class_site` every hospital has as many patients as without.
        - deterministic: The same arguments give the same parts.

    Source: Hsu, Qi, Brown (2019), arXiv 1909.06335, turned around as usual (Yurochkin et al., 2019): shares of each
        class over sites.
    """
    by_class = _patients_by_class(scan.records)
    patients = sum(map(len, by_class.values()))
    if not 1 <= sites <= patients:
        raise ConfigError(f"Expected simulation.sites={sites} in [1, {patients}], the number of patients. Lower it.")
    rng = np.random.default_rng(seed)
    if partition == "iid":
        everyone = _shuffled([patient for name in sorted(by_class) for patient in by_class[name]], rng)
        chosen = {patient: place % sites for place, patient in enumerate(everyone)}
    elif partition == "by-site-column":
        chosen = _by_site_column(scan.records, sites)
    else:
        chosen = _without_empty_sites(_dirichlet(by_class, sites, _alpha(partition), rng), sites)
    if one_class_site:
        chosen = _one_class_at_the_first(by_class, chosen, rng)
    return _split(scan, chosen, sites)


def place(scan: Scan, folder: Path) -> None:
    """Give a virtual hospital a folder of its own, which the intake's `scan` reads as it would a real one.

    DICOM and PNG/JPEG become symbolic links beside a CSV file with labels; rows of an NPZ become a smaller NPZ. New
    names are numbers, so that no name of the source shows.

    Args:
        scan: The hospital's part.
        folder: Its folder: new or empty.

    Raises:
        IntakeError: The scan is empty or of an archive, or the NPZ cannot be read again.
        StorageError: The folder holds something, or cannot be written.

    Guarantees:
        - reads_back_identically: `scan(folder, "auto")` gives the same patients, labels, sites and pixels in the same
          order; the file names differ.
    """
    if not scan.records:
        raise IntakeError("A virtual hospital without images cannot be placed. Lower simulation.sites.")
    make_folder(folder, mode=0o700)
    if any(folder.iterdir()):
        raise StorageError(f"The folder {folder} of a virtual hospital is not empty. Choose another or clear it.")
    if scan.records[0].path.suffix.lower() == ".npz":
        _place_rows(scan.records, folder)
    else:
        _place_links(scan.records, folder)


def _place_rows(records: Sequence[Record], folder: Path) -> None:
    rows = [record.frame for record in records if record.frame is not None]
    content = io.BytesIO()
    with records[0].path.open("rb") as handle:
        images = load_stack(handle)[rows]
    np.savez(
        content,
        images=images,
        labels=np.array([record.label or "" for record in records]),
        issuer=np.array([record.patient[0] for record in records]),
        patient_id=np.array([record.patient[1] for record in records]),
        site=np.array([record.site or "" for record in records]),
    )
    write_atomic(folder / "images.npz", content.getvalue(), mode=0o600)


def _place_links(records: Sequence[Record], folder: Path) -> None:
    if any(record.member is not None for record in records):
        raise IntakeError("Virtual hospitals cannot be given members of an archive. Unpack the archives into a folder.")
    dicom = is_dicom(records[0].path)
    records = [next(group) for _, group in groupby(records, key=attrgetter("path"))]  # a file of many frames once
    names = [f"{number:07d}{'.dcm' if dicom else _suffix(record.path)}" for number, record in enumerate(records)]
    try:
        for name, record in zip(names, records, strict=True):
            (folder / name).symlink_to(record.path.resolve())
    except OSError as error:
        raise StorageError(f"Could not make links in {folder}: {error.strerror}. Choose another folder.") from error
    columns = ("file", "label", "site") if dicom else ("file", "label", "site", "issuer", "patient")
    rows = [
        (name, record.label or "", record.site or "", *record.patient)[: len(columns)]
        for name, record in zip(names, records, strict=True)
    ]
    write_atomic(folder / (LABELS_FILE if dicom else "index.csv"), write_table(columns, rows), mode=0o600)


def _suffix(path: Path) -> str:
    """Return a file's last suffixes by which the intake knows it: of a packed volume both."""
    return ".nii.gz" if path.name.lower().endswith(".nii.gz") else path.suffix.lower()


def _patients_by_class(records: Iterable[Record]) -> dict[str, list[Patient]]:
    """Return the patients, sorted, of each class; a patient's class is that of most of its images."""
    labels: defaultdict[Patient, Counter[str]] = defaultdict(Counter)
    for record in records:
        labels[record.patient][record.label or ""] += 1
    by_class: defaultdict[str, list[Patient]] = defaultdict(list)
    for patient in sorted(labels):
        by_class[_most(labels[patient])].append(patient)
    return by_class


def _most(counts: Counter[str]) -> str:
    return min(counts, key=lambda name: (-counts[name], name))


def _shuffled(patients: Sequence[Patient], rng: np.random.Generator) -> list[Patient]:
    return [patients[index] for index in rng.permutation(len(patients))]


def _alpha(partition: str) -> float:
    name, _, text = partition.partition(":")
    try:
        alpha = float(text)
    except ValueError:
        alpha = math.nan
    if name != "dirichlet" or not 0 < alpha < math.inf:
        raise ConfigError(
            f"Expected simulation.partition={partition!r} as iid, by-site-column or dirichlet:ALPHA with a finite "
            "ALPHA > 0."
        )
    return alpha


def _dirichlet(
    by_class: Mapping[str, Sequence[Patient]], sites: int, alpha: float, rng: np.random.Generator
) -> dict[Patient, int]:
    chosen: dict[Patient, int] = {}
    for name in sorted(by_class):
        patients = _shuffled(by_class[name], rng)
        ends = np.rint(np.cumsum(rng.dirichlet(np.full(sites, alpha))) * len(patients))
        for index, patient in enumerate(patients):
            chosen[patient] = min(int(np.searchsorted(ends, index, side="right")), sites - 1)
    return chosen


def _without_empty_sites(chosen: Mapping[Patient, int], sites: int) -> dict[Patient, int]:
    """Move a patient of the largest site to each empty one."""
    members: list[list[Patient]] = [[] for _ in range(sites)]
    for patient, site in chosen.items():
        members[site].append(patient)
    for empty in [site for site in range(sites) if not members[site]]:
        members[empty].append(max(members, key=len).pop())
    return {patient: site for site, group in enumerate(members) for patient in group}


def _one_class_at_the_first(
    by_class: Mapping[str, Sequence[Patient]], chosen: Mapping[Patient, int], rng: np.random.Generator
) -> dict[Patient, int]:
    """Swap every other patient of the first site with one of the largest class, drawn from all other sites."""
    of_class = set(max(by_class.values(), key=len))
    leaving = [patient for patient, site in chosen.items() if site == 0 and patient not in of_class]
    coming = [patient for patient, site in chosen.items() if site != 0 and patient in of_class]
    if len(coming) < len(leaving):
        size = sum(site == 0 for site in chosen.values())
        raise ConfigError(
            f"simulation.one_class_site needs {size} patients of one class, as many as the first site has; the most "
            f"frequent has {len(of_class)}. Raise simulation.sites."
        )
    swapped = list(zip(leaving, _shuffled(coming, rng), strict=False))
    return {**chosen, **{one: chosen[other] for one, other in swapped}, **{other: 0 for _, other in swapped}}


def _by_site_column(records: Iterable[Record], sites: int) -> dict[Patient, int]:
    named: defaultdict[Patient, Counter[str]] = defaultdict(Counter)
    for record in records:
        if record.site is None:
            raise ConfigError("simulation.partition=by-site-column needs a site for every image, and some have none.")
        named[record.patient][record.site] += 1
    chosen = {patient: _most(counts) for patient, counts in named.items()}
    numbers = {name: number for number, name in enumerate(sorted(set(chosen.values())))}
    if len(numbers) != sites:
        raise ConfigError(
            f"Expected simulation.sites={sites} to equal the number of sites in the site column, {len(numbers)}. "
            f"Set simulation.sites={len(numbers)}."
        )
    return {patient: numbers[name] for patient, name in chosen.items()}


def _split(scan: Scan, chosen: Mapping[Patient, int], parts: int) -> tuple[Scan, ...]:
    records: list[list[Record]] = [[] for _ in range(parts)]
    for record in scan.records:
        records[chosen[record.patient]].append(record)
    return tuple(Scan(tuple(part), {}) for part in records)
