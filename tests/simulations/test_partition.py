from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian

from client.intake import Dataset, Record, Scan, scan
from common.errors import ConfigError, IntakeError, StorageError
from simulations.partition import assign, at_most, hold_out, place
from tests.client.intake.pictures import read

PARTITIONS = ["iid", "dirichlet:0.05", "dirichlet:1", "dirichlet:100", "by-site-column"]


def make(labels: list[tuple[int, str]]) -> Scan:
    """Make a scan of (patient, class) pairs, one an image; the site is the patient's number modulo 3."""
    records = (
        Record(Path("images.npz"), row, ("", str(patient)), name, str(patient % 3))
        for row, (patient, name) in enumerate(labels)
    )
    return Scan(tuple(records), {"no label": 3})


def patients(part: Scan) -> set[tuple[str, str]]:
    return {record.patient for record in part.records}


images = st.lists(st.tuples(st.integers(0, 30), st.sampled_from("abc")), min_size=1, max_size=80)
cohorts = images.map(lambda extra: [*((patient, "a") for patient in range(3)), *extra])
parts = st.sampled_from(PARTITIONS)
seeds = st.integers(0, 2**31)


@settings(deadline=None, derandomize=True)
@given(cohorts, parts, seeds, st.floats(0, 0.99))
def test_disjoint_patients(cohort: list[tuple[int, str]], partition: str, seed: int, fraction: float) -> None:
    source = make(cohort)
    for divided in (assign(source, 3, partition, seed), hold_out(source, fraction, seed)):
        assert sum(len(patients(part)) for part in divided) == len(patients(source))


@settings(deadline=None, derandomize=True)
@given(cohorts, parts, seeds, st.floats(0, 0.99))
def test_every_patient_once(cohort: list[tuple[int, str]], partition: str, seed: int, fraction: float) -> None:
    """Nobody and no image is lost or doubled, and each part keeps the order."""
    source = make(cohort)
    for divided in (assign(source, 3, partition, seed), hold_out(source, fraction, seed)):
        rows = [record.frame for part in divided for record in part.records]
        assert sorted(rows) == [record.frame for record in source.records]
        assert all(list(part.records) == sorted(part.records, key=lambda it: it.frame or 0) for part in divided)
        assert not any(part.refused for part in divided)


@settings(deadline=None, derandomize=True)
@given(cohorts, parts, seeds, st.floats(0, 0.99))
def test_deterministic(cohort: list[tuple[int, str]], partition: str, seed: int, fraction: float) -> None:
    source = make(cohort)
    assert assign(source, 3, partition, seed) == assign(source, 3, partition, seed)
    assert hold_out(source, fraction, seed) == hold_out(source, fraction, seed)


@settings(deadline=None, derandomize=True)
@given(cohorts, st.sampled_from(PARTITIONS[:-1]), seeds, st.data())
def test_no_empty_site(cohort: list[tuple[int, str]], partition: str, seed: int, data: st.DataObject) -> None:
    source = make(cohort)
    sites = data.draw(st.integers(1, len(patients(source))))
    divided = assign(source, sites, partition, seed)
    assert len(divided) == sites
    assert all(part.records for part in divided)


def test_another_seed_gives_another_division() -> None:
    source = make([(patient, "a") for patient in range(40)])
    for partition in PARTITIONS[:-1]:
        assert assign(source, 4, partition, 0) != assign(source, 4, partition, 1)
    assert hold_out(source, 0.5, 0) != hold_out(source, 0.5, 1)


def test_hold_out_is_stratified() -> None:
    """150 patients in classes of 100, 40 and 10: a fifth of each, up to one patient, and 30 in all."""
    source = make([(patient, "a" if patient < 100 else "b" if patient < 140 else "c") for patient in range(150)])
    for seed in range(5):
        remaining, aside = hold_out(source, 0.2, seed)
        counts = Counter(record.label for record in aside.records)
        assert sum(counts.values()) == 30
        assert all(abs(counts[name] - share) <= 1 for name, share in {"a": 20, "b": 8, "c": 2}.items())
        assert len(remaining.records) == 120
    assert not hold_out(source, 0.0, 0)[1].records
    with pytest.raises(ConfigError, match="holdout"):
        hold_out(source, 1.0, 0)


def test_iid_sites_are_of_one_size() -> None:
    sizes = [len(patients(part)) for part in assign(make([(patient, "a") for patient in range(41)]), 4, "iid", 0)]
    assert sorted(sizes) == [10, 10, 10, 11]


@pytest.mark.parametrize("partition", ["iid", "dirichlet:0.3", "by-site-column"])
def test_one_class_keeps_sizes(partition: str) -> None:
    source = make([(patient, "aab"[patient * 7 % 11 % 3]) for patient in range(60)])
    for seed in range(5):
        without, divided = assign(source, 3, partition, seed), assign(source, 3, partition, seed, one_class_site=True)
        assert [len(patients(part)) for part in divided] == [len(patients(part)) for part in without]
        assert sorted(row.frame or 0 for part in divided for row in part.records) == list(range(60))
        assert {record.label for record in divided[0].records} == {"a"}
        # nobody but those who were swapped has moved
        assert all(patients(part) & patients(same) for part, same in zip(divided[1:], without[1:], strict=True))
        assert divided == assign(source, 3, partition, seed, one_class_site=True)


def test_one_class_that_is_too_small_is_refused() -> None:
    source = make([(patient, "ab"[patient % 2]) for patient in range(20)])
    with pytest.raises(ConfigError, match=r"one_class_site needs 20 patients of one class.*has 10"):
        assign(source, 1, "iid", 0, one_class_site=True)


def test_nested_draws_of_patients() -> None:
    source = make([(patient % 30, "ab"[patient % 2]) for patient in range(60)])
    kept = {most: at_most(source, most, 5) for most in (5, 10, 30, 99)}
    assert [len(patients(part)) for part in kept.values()] == [5, 10, 30, 30]
    assert patients(kept[5]) < patients(kept[10])
    assert kept[30].records == source.records
    assert len(kept[10].records) == 20  # with all their images
    assert at_most(source, 5, 5) == kept[5] != at_most(source, 5, 6)


@pytest.mark.parametrize("alpha", [0.3, 3.0])
def test_dirichlet_shares_follow_their_law(alpha: float) -> None:
    """A class's share at a site has variance (1/S)(1-1/S)/(S alpha + 1); a tenfold other alpha is rejected.

    Over 300 repetitions the variance of 400 draws of 4 shares had a standard error of 2.9 % (alpha 0.3) and 3.9 %
    (alpha 3), so 20 % is over five standard errors, while a tenfold alpha changes the variance by a factor above 3.
    """
    sites, count, draws = 4, 200, 400
    source = make([(patient, "a") for patient in range(count)])
    shares = np.array(
        [[len(part.records) / count for part in assign(source, sites, f"dirichlet:{alpha}", s)] for s in range(draws)]
    )

    def variance(value: float) -> float:
        return (1 / sites) * (1 - 1 / sites) / (sites * value + 1)

    assert abs(shares.var() / variance(alpha) - 1) < 0.2
    assert not abs(shares.var() / variance(alpha * 10) - 1) < 0.2
    assert not abs(shares.var() / variance(alpha / 10) - 1) < 0.2


def test_by_site_column() -> None:
    source = make([(0, "a"), (1, "a"), (2, "a"), (4, "b")])
    divided = assign(source, 3, "by-site-column", 0)
    assert [[record.frame for record in part.records] for part in divided] == [[0], [1, 3], [2]]
    with pytest.raises(ConfigError, match=r"sites=2 .* 3\."):
        assign(source, 2, "by-site-column", 0)
    visitor = Record(Path("images.npz"), 9, ("", "0"), "a", "1")
    twice = Scan((*source.records, visitor, visitor), {})
    assert [len(part.records) for part in assign(twice, 2, "by-site-column", 0)] == [5, 1]
    with pytest.raises(ConfigError, match="some have none"):
        assign(Scan((Record(Path("a"), None, ("", "1"), "a", None),), {}), 1, "by-site-column", 0)


@pytest.mark.parametrize("partition", ["", "dirichlet", "dirichlet:0", "dirichlet:inf", "dirichlet:nan", "iid:1"])
def test_unknown_partitions(partition: str) -> None:
    with pytest.raises(ConfigError, match="partition"):
        assign(make([(0, "a")]), 1, partition, 0)


@pytest.mark.parametrize("sites", [0, 3])
def test_more_sites_than_patients(sites: int) -> None:
    with pytest.raises(ConfigError, match="sites"):
        assign(make([(0, "a"), (1, "a"), (1, "b")]), sites, "iid", 0)


def dicom(folder: Path) -> None:
    for number in range(12):
        meta = FileMetaDataset()
        meta.TransferSyntaxUID = ExplicitVRLittleEndian
        dataset = FileDataset(folder / "x", {}, file_meta=meta, preamble=b"\0" * 128)
        dataset.PatientID, dataset.IssuerOfPatientID = f"P{number // 2}", "" if number % 4 else "X"
        dataset.AdmittingDiagnosesDescription = ["sick, very", "well"][number % 2]
        dataset.Modality = "CR" if number % 3 else "DX"
        dataset.Rows, dataset.Columns, dataset.SamplesPerPixel, dataset.PixelRepresentation = 20, 12, 1, 0
        dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit = 8, 8, 7
        dataset.PhotometricInterpretation = "MONOCHROME2"
        dataset.PixelData = np.random.default_rng(number).bytes(240)
        (folder / f"{number % 3}").mkdir(exist_ok=True)
        dataset.save_as(folder / f"{number % 3}" / f"{number}", enforce_file_format=False)


def png(folder: Path) -> None:
    lines = ["file,patient,label,site,issuer"]
    for number in range(12):
        pixels = np.random.default_rng(number).integers(0, 256, (20, 12), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.{'png' if number % 2 else 'jpg'}")
        lines.append(f'{number}.{"png" if number % 2 else "jpg"},"P,{number // 2}","a ""b""{number % 2}",north,')
    (folder / "index.csv").write_text("\n".join(lines))


def npz(folder: Path, dtype: str = "uint8") -> None:
    rng = np.random.default_rng(0)
    np.savez(
        folder / "images.npz",
        images=(rng.random((12, 20, 12, 1)) * 255).astype(dtype),
        labels=np.arange(12) % 2,
        patient_id=np.arange(12) // 2,
        site=np.array(["north", ""] * 6),
    )


def wide(folder: Path) -> None:
    npz(folder, "float16")


def mnist(folder: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (12, 28, 28), dtype=np.uint8)
    np.savez(folder / "images.npz", x_train=pixels, y_train=np.arange(12) % 2)


SOURCES = [(dicom, "auto"), (dicom, "none"), (dicom, "tag:Modality"), (png, "auto"), (png, "none"), (npz, "auto")]


def bags(dataset: Dataset) -> Counter[tuple[int, bytes]]:
    return Counter((int(label), image.tobytes()) for label, image in zip(dataset.labels, dataset.images, strict=True))


@pytest.mark.parametrize(("build", "label"), [*SOURCES, (npz, "column:site"), (wide, "none"), (mnist, "auto")])
def test_reads_back_identically(tmp_path: Path, build: Callable[[Path], None], label: str) -> None:
    source = tmp_path / "source"
    source.mkdir()
    build(source)
    found = scan(source, label)
    classes = sorted({record.label for record in found.records if record.label})
    together: Counter[tuple[int, bytes]] = Counter()
    for number, part in enumerate(assign(found, 3, "iid", 0)):
        folder = tmp_path / f"hospital-{number}"
        place(part, folder)
        again = scan(folder, "auto")
        assert [(it.patient, it.label, it.site) for it in again.records] == [
            (it.patient, it.label, it.site) for it in part.records
        ]
        before, after = read(part, classes, 28)[0], read(again, classes, 28)[0]
        assert np.array_equal(before.images, after.images)
        assert np.array_equal(before.patients, after.patients)
        together += bags(after)
    assert together == bags(read(found, classes, 28)[0])


def test_place_keeps_the_type_and_hides_names(tmp_path: Path) -> None:
    (tmp_path / "source").mkdir()
    npz(tmp_path / "source", "float16")
    place(scan(tmp_path / "source"), tmp_path / "array")
    assert np.load(tmp_path / "array" / "images.npz", allow_pickle=False)["images"].dtype == np.float16
    (tmp_path / "dicom").mkdir()
    dicom(tmp_path / "dicom")
    place(scan(tmp_path / "dicom"), tmp_path / "links")
    assert sorted(path.name for path in (tmp_path / "links").iterdir())[:2] == ["0000000.dcm", "0000001.dcm"]


def test_place_refuses_a_folder_in_use_and_an_empty_scan(tmp_path: Path) -> None:
    (tmp_path / "source").mkdir()
    npz(tmp_path / "source")
    found = scan(tmp_path / "source")
    with pytest.raises(StorageError, match="not empty"):
        place(found, tmp_path)
    with pytest.raises(IntakeError, match="without images"):
        place(Scan((), {}), tmp_path / "new")


def test_a_file_of_many_frames_is_placed_once_and_an_archive_not_at_all(tmp_path: Path) -> None:
    film = tmp_path / "film"
    film.write_bytes(b"\0" * 128 + b"DICM")
    records = [Record(film, frame, ("", "p"), "a", None) for frame in range(3)]
    place(Scan(tuple(records), {}), tmp_path / "one")
    assert sorted(path.name for path in (tmp_path / "one").iterdir()) == ["0000000.dcm", "labels.csv"]
    member = Record(tmp_path / "a.zip", None, ("", "p"), "a", None, "member")
    with pytest.raises(IntakeError, match="Unpack"):
        place(Scan((member,), {}), tmp_path / "two")
