"""Importing: what changed is read, the rest stays, what is gone goes; kill -9 and a full disk cost nothing."""

import resource
import signal
import subprocess
import sys
import time
import zipfile
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pydicom.uid import JPEGLSLossless

from client.intake import Form, IntakeRules, Reason, importing, records
from client.intake import vault as vaults
from client.intake.cautions import cautions
from client.intake.forgetting import forget
from client.intake.importing import Imported, import_source
from client.intake.patients import PatientTable
from client.intake.sealed import open_dataset
from client.intake.selection import Practice
from client.intake.survey import survey
from client.intake.vault import read_manifest
from common.errors import IntakeError, MissingExtra, StorageError, TooFewPatients
from common.sealing import SealingKey
from tests.client.intake.conftest import WriteDicom

FORM = Form(("all",), 28, 1)
KEY = SealingKey(bytes(range(32)))


def write(folder: Path, number: int, patient: str | None = None, value: int | None = None) -> None:
    """Write a picture of one value, which says whose it is."""
    pixels = np.full((28, 28), number if value is None else value, np.uint8)
    Image.fromarray(pixels).save(folder / f"{number:04d}.png")


def index(folder: Path, patients: dict[int, str]) -> None:
    lines = [f"{number:04d}.png,{patient},all" for number, patient in patients.items()]
    (folder / "index.csv").write_text("\n".join(["file,patient,label", *lines]) + "\n")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Twelve pictures of six patients, whose order in the folder is not that of their names."""
    folder = tmp_path / "source"
    folder.mkdir()
    patients = {number: f"p{5 - number % 6}" for number in range(12)}
    for number in patients:
        write(folder, number)
    index(folder, patients)
    return folder


def run(vault: Path, source: Path, key: SealingKey = KEY, form: Form = FORM, least: int = 1) -> Imported:
    return import_source(vault, key, form, Practice(source), least)


def values(vault: Path, key: SealingKey = KEY) -> list[list[int]]:
    """Return the values of each patient's pictures."""
    dataset = open_dataset(vault, key)
    found: list[list[int]] = [[] for _ in range(dataset.number_of_patients)]
    for patient, image in zip(dataset.patients, dataset.images[:], strict=True):
        found[patient].append(int(image[0, 0, 0]))
    return found


def test_order_of_patients(tmp_path: Path, source: Path) -> None:
    """A first import gives the same order whatever the key, so that a simulation can be repeated."""
    for name in ("one", "two"):
        key = SealingKey.generate()
        run(tmp_path / name, source, key)
        assert values(tmp_path / name, key) == [[5, 11], [4, 10], [3, 9], [2, 8], [1, 7], [0, 6]]


def test_only_what_changed(tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(tmp_path / "vault", source)
    decoded: list[str] = []
    real = importing.decode_records
    monkeypatch.setattr(
        importing, "decode_records", lambda *a: ((decoded.append(r.path.name), (r, s))[1] for r, s in real(*a))
    )
    assert run(tmp_path / "vault", source).added == 0
    write(source, 7, value=70)  # changed
    write(source, 12)  # new
    index(source, {number: f"p{5 - number % 6}" for number in range(13) if number != 3})  # 3 is gone
    found = run(tmp_path / "vault", source)
    assert decoded == ["0007.png", "0012.png"]
    assert (found.added, found.images) == (2, 12)
    assert values(tmp_path / "vault") == [[5, 11], [4, 10], [9], [2, 8], [1, 70], [0, 6, 12]]


def test_another_patient_in_the_table_is_a_change(tmp_path: Path, source: Path) -> None:
    run(tmp_path / "vault", source)
    index(source, {number: "q" if number == 4 else f"p{5 - number % 6}" for number in range(12)})
    found = run(tmp_path / "vault", source)
    assert found.added == 1
    assert sorted(values(tmp_path / "vault")) == sorted([[5, 11], [10], [3, 9], [2, 8], [1, 7], [0, 6], [4]])


def test_gone_is_gone(tmp_path: Path, source: Path) -> None:
    """Nothing of a patient who left stands in any file: the files that held it are not there any more."""
    vault = tmp_path / "vault"
    run(vault, source)
    before = {path.name: path.read_bytes() for path in vault.glob("pixels-*")}
    index(source, {number: f"p{5 - number % 6}" for number in range(12) if number % 6 != 2})
    run(vault, source)
    assert len(open_dataset(vault, KEY).images) == 10
    assert not set(before) & {path.name for path in vault.glob("pixels-*")}
    manifest = read_manifest(vault, KEY)
    assert manifest.current().all()
    assert KEY.pseudonym(b'["", "p3"]', "patient") not in set(manifest.rows["patient"].tolist())


def test_other_rules_read_everything_again(tmp_path: Path, source: Path) -> None:
    run(tmp_path / "vault", source)
    merged = PatientTable({("", "p4"): ("", "p5")})
    found = import_source(tmp_path / "vault", KEY, FORM, Practice(source, patients=merged))
    assert (found.added, found.images, len(found.patients)) == (12, 12, 5)


def test_dicom_files_that_are_known_are_not_opened(tmp_path: Path, write_dicom: WriteDicom) -> None:
    folder = tmp_path / "source"
    for number in range(6):
        write_dicom(folder / f"{number}", PatientID=f"p{number}", SOPInstanceUID=f"1.2.{number}")
    with zipfile.ZipFile(folder / "more.zip", "w") as archive:
        archive.write(write_dicom(tmp_path / "a", PatientID="p7"), "a")
    (folder / "note").write_text("no image")
    practice = Practice(folder, "none")
    first = import_source(tmp_path / "vault", KEY, FORM, practice)
    write_dicom(folder / "twin", PatientID="p9", SOPInstanceUID="1.2.3")
    again = import_source(tmp_path / "vault", KEY, FORM, practice)
    assert (first.images, again.images, again.added, again.unchanged) == (7, 7, 0, 8)
    assert again.refused == {Reason.NOT_DICOM: 1, Reason.DUPLICATE: 1}
    (folder / "3").unlink()
    last = import_source(tmp_path / "vault", KEY, FORM, practice)
    assert (last.images, last.added, last.refused) == (7, 1, {Reason.NOT_DICOM: 1})


def test_a_table_of_labels_that_comes_later_counts_for_files_that_it_does_not_name(
    tmp_path: Path, write_dicom: WriteDicom
) -> None:
    folder, form = tmp_path / "source", Form(("sick",), 28, 1)
    for number in range(4):
        uid = f"1.2.{number}"
        write_dicom(folder / f"{number}", PatientID=uid, SOPInstanceUID=uid, AdmittingDiagnosesDescription="sick")
    assert import_source(tmp_path / "vault", KEY, form, Practice(folder), 1).images == 4
    (folder / "labels.csv").write_text("file,label\n0,sick\n1,sick\n")
    for _ in range(2):
        found = import_source(tmp_path / "vault", KEY, form, Practice(folder), 1)
        assert (found.images, found.refused) == (2, {Reason.NO_LABEL: 2})
    (folder / "labels.csv").unlink()
    assert import_source(tmp_path / "vault", KEY, form, Practice(folder), 1).images == 4


def test_too_few_patients_give_no_images_and_are_kept(tmp_path: Path, source: Path) -> None:
    vault = tmp_path / "vault"
    with pytest.raises(TooFewPatients, match="min_patients=7 usable patients at this site, found 6") as caught:
        run(vault, source, least=7)
    assert "imported before" not in str(caught.value)
    with pytest.raises(IntakeError, match="fewer patients"):
        open_dataset(vault, KEY)
    write(source, 12)
    index(source, {number: "p9" if number == 12 else f"p{5 - number % 6}" for number in range(13)})
    found = run(vault, source, least=7)
    assert (found.added, found.taken_up, found.images) == (1, 12, 13)


def test_refused_before_deleted(tmp_path: Path, source: Path) -> None:
    """A wrong setting or a disk that is not there takes nothing from the vault, and the message says so."""
    vault = tmp_path / "vault"
    run(vault, source, least=6)
    before = values(vault)
    index(source, {number: f"p{5 - number % 6}" for number in range(12) if number % 6 != 2})
    with pytest.raises(TooFewPatients, match=r"stay in use as they were.*delete the folder of the vault"):
        run(vault, source, least=6)
    assert values(vault) == before
    (source / "index.csv").write_text("file,patient,label\n0000.png,p1,other\n")
    with pytest.raises(IntakeError, match=r"1 label not among the classes.*stay in use as they were"):
        run(vault, source)
    for number in range(12):
        (source / f"{number:04d}.png").unlink()
    index(source, {number: f"p{5 - number % 6}" for number in range(12)})
    with pytest.raises(IntakeError, match=r"12 file missing.*stay in use as they were"):
        run(vault, source)
    assert values(vault) == before


def test_an_instance_of_another_patient_shows_also_in_the_next_import(tmp_path: Path, write_dicom: WriteDicom) -> None:
    """The first file is not opened again; whose image it was is known by pseudonym."""
    practice = Practice(tmp_path / "source", "none")
    for name, patient, instance in (("a", "A", "1.1"), ("b", "B", "1.1"), ("c", "C", "1.2"), ("d", "c", "1.2")):
        write_dicom(practice.source / name, PatientID=patient, SOPInstanceUID=instance)
    for unchanged in (0, 2):
        found = import_source(tmp_path / "vault", KEY, FORM, practice)
        assert (found.unchanged, found.images, found.refused) == (unchanged, 2, {Reason.DUPLICATE: 2})
        said = [one.said for one in cautions(found.found.records, found.choice, practice, bool(unchanged))]
        assert sum("1 image is there under two patients" in one for one in said) == 1


def test_gone_images_are_counted(tmp_path: Path, source: Path) -> None:
    run(tmp_path / "vault", source)
    index(source, {number: f"p{5 - number % 6}" for number in range(12) if number not in (2, 3, 8)})
    write(source, 4, value=40)
    found = run(tmp_path / "vault", source)
    assert (found.images, found.added, found.gone) == (9, 1, (3, 3))
    assert run(tmp_path / "vault", source).gone == (0, 0)


def tree(folder: Path, write_dicom: WriteDicom) -> Practice:
    for number in range(6):
        write_dicom(folder / f"p{number}" / "deep" / "a", PatientID=f"p{number}", SOPInstanceUID=f"1.2.{number}")
    return Practice(folder, "none")


def test_not_reached_is_not_gone(permissions: Path, write_dicom: WriteDicom) -> None:
    """What stands below a folder that cannot be read stays and is counted; what vanished elsewhere goes."""
    practice, vault = tree(permissions / "source", write_dicom), permissions / "vault"
    import_source(vault, KEY, FORM, practice)
    (practice.source / "p2").chmod(0)
    (practice.source / "p4" / "deep").chmod(0o444)
    (practice.source / "p5" / "deep" / "a").unlink()
    for _ in range(2):
        found = import_source(vault, KEY, FORM, practice)
        assert (found.images, found.held, found.unchanged, found.added) == (5, 2, 3, 0)
        assert found.refused == {Reason.FOLDER: 2}
    (practice.source / "p2").chmod(0o700)
    found = import_source(vault, KEY, FORM, practice)
    assert (found.images, found.held, found.unchanged, found.added) == (5, 1, 4, 0)
    other = Practice(practice.source, "none", patients=PatientTable({("", "p4"): ("", "p0")}))
    found = import_source(vault, KEY, FORM, other)  # whose image it is can no longer be said
    assert (found.images, found.held, found.gone) == (4, 0, (1, 1))


def test_a_picture_that_cannot_be_read_stays_while_its_row_does(permissions: Path) -> None:
    source, vault = permissions / "source", permissions / "vault"
    (source / "closed").mkdir(parents=True)
    write(source, 1)
    write(source / "closed", 2)
    (source / "index.csv").write_text("file,patient,label\n0001.png,a,all\nclosed/0002.png,b,all\n")
    run(vault, source)
    (source / "closed").chmod(0)
    found = run(vault, source)
    assert (found.images, found.held, found.refused) == (2, 1, {Reason.FOLDER: 1})
    (source / "index.csv").write_text("file,patient,label\n0001.png,a,all\nclosed/0002.png,c,all\n")
    found = run(vault, source)
    assert (found.images, found.held) == (1, 0)


def test_gone_from_all(tmp_path: Path, source: Path) -> None:
    """A patient who was taken out leaves the other sets of the home too."""
    other, form = tmp_path / "other", Form(("all", "more"), 28, 1)
    run(tmp_path / "vault", source)
    run(other, source, form=form)
    before = {path.name for path in other.glob("pixels-*")}
    index(source, {number: f"p{5 - number % 6}" for number in range(12) if number % 6 != 2})
    write(source, 3, value=30)
    done = run(tmp_path / "vault", source)
    gone = forget(other, KEY, done.states, 1, nullcontext())
    assert gone is not None
    assert (gone.form, gone.images, gone.usable) == (form, 3, True)
    assert sorted(values(other)) == sorted([[5, 11], [4, 10], [9], [1, 7], [0, 6]])
    assert not before & {path.name for path in other.glob("pixels-*")}
    assert KEY.pseudonym(b'["", "p3"]', "patient") not in read_manifest(other, KEY).rows["patient"].tolist()
    assert forget(other, KEY, done.states, 1, nullcontext()) is None
    assert run(other, source, form=form).added == 1
    index(source, {0: "p0", 1: "p1"})
    gone = forget(other, KEY, run(tmp_path / "vault", source).states, 3, nullcontext())
    assert gone is not None
    assert (gone.images, gone.usable) == (8, False)
    with pytest.raises(IntakeError, match="fewer patients"):
        open_dataset(other, KEY)
    assert run(other, source, form=form).taken_up == 0


def test_a_file_that_is_named_twice_is_used_once(tmp_path: Path, source: Path) -> None:
    """However it is spelled; the second is refused as a duplicate, and nothing is decoded again."""
    (source / "index.csv").write_text(
        "file,patient,label\n0000.png,a,all\n./0000.png,b,all\n0001.png,b,all\n.//0001.png,b,all\n"
    )
    first, again = run(tmp_path / "vault", source), run(tmp_path / "vault", source)
    for found in (first, again):
        assert (found.images, found.patients) == (2, (1, 1))
        assert found.refused == {Reason.DUPLICATE: 2, Reason.NOT_OF_SOURCE: 10}
    assert (first.added, again.added, again.gone) == (2, 0, (0, 0))


def test_damage_shows(tmp_path: Path, source: Path) -> None:
    """Also where nothing is new: every chunk is opened."""
    run(tmp_path / "vault", source)
    path = tmp_path / "vault" / "pixels-00000"
    whole = path.read_bytes()
    for content in (whole[:-1], whole + b"\0", whole[:3] + b"\1" + whole[4:], whole[:-1] + bytes([whole[-1] ^ 1])):
        path.write_bytes(content)
        with pytest.raises(StorageError, match="damaged"):
            run(tmp_path / "vault", source)
    path.unlink()
    with pytest.raises(StorageError, match="damaged"):
        run(tmp_path / "vault", source)
    path.write_bytes(whole)
    assert run(tmp_path / "vault", source).added == 0


def test_a_damaged_copy_does_not_hide_a_whole_one(tmp_path: Path, write_dicom: WriteDicom) -> None:
    """An image counts as there once a copy has decoded; the next import of the same files gives the same."""
    folder, pixels = tmp_path / "source", np.random.default_rng(0).integers(0, 4096, (32, 32)).astype(np.uint16)
    write_dicom(folder / "p", pixels, PatientID="other", SOPInstanceUID="1.2.1")
    for name in ("a", "b", "c", "d"):
        whole = write_dicom(folder / name, pixels, SOPInstanceUID="1.2.3").read_bytes()
        if name in "ab":
            (folder / name).write_bytes(whole[:-1000])
    practice = Practice(folder, "none")
    seen = survey(practice).report
    assert (seen.usable, seen.patients, seen.expected) == (2, 2, 5)
    for added in (2, 0):
        found = import_source(tmp_path / "vault", KEY, FORM, practice)
        assert (found.images, found.added, found.gone) == (2, added, (0, 0))
        assert found.refused == {Reason.PIXELS: 2, Reason.DUPLICATE: 1}
        assert {group.said: group.count for group in seen.refused} == found.refused


def test_nothing_usable(tmp_path: Path, source: Path) -> None:
    with pytest.raises(IntakeError, match="12 label not among the classes"):
        run(tmp_path / "vault", source, form=Form(("other",), 28, 1))


def test_a_missing_decoder_is_named_with_its_pip_line(
    tmp_path: Path, write_dicom: WriteDicom, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_dicom(tmp_path / "source" / "a", pixels=np.zeros((8, 8), np.uint16))
    missing = f"{Reason.NO_DECODER} {JPEGLSLossless.name}"
    monkeypatch.setattr(importing, "decode_records", lambda records, *_: ((record, missing) for record in records))
    with pytest.raises(MissingExtra, match=r"JPEG-LS.*pip install"):
        import_source(tmp_path / "vault", KEY, FORM, Practice(tmp_path / "source", "none"))


def test_two_imports_at_once(tmp_path: Path, source: Path) -> None:
    with importing.alone_in(tmp_path / "vault"), pytest.raises(StorageError, match="Another import"):
        run(tmp_path / "vault", source)


def test_long_segments_are_split(tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importing, "SEGMENT_BYTES", 0)
    monkeypatch.setattr("client.intake.chunks.CHUNK_BYTES", 28 * 28 * 2)
    run(tmp_path / "vault", source)
    assert [len(segment.counts) for segment in read_manifest(tmp_path / "vault", KEY).segments] == [1] * 6
    assert values(tmp_path / "vault")[0] == [5, 11]


PROGRAM = """
import sys
from pathlib import Path
from client.intake import Form, chunks
from client.intake.importing import import_source
from client.intake.selection import Practice
from common.sealing import SealingKey
chunks.CHUNK_BYTES = 28 * 28 * 4
def told(what, done, total):
    print(done, flush=True)
import_source(Path(sys.argv[1]), SealingKey(bytes(range(32))), Form(("all",), 28, 1), Practice(Path(sys.argv[2])),
              progress=told)
"""


@pytest.mark.parametrize("after", [1, 50])
def test_goes_on(tmp_path: Path, after: int) -> None:
    """kill -9 after some images: the next import decodes only what is missing, and the end is as if unbroken."""
    source = tmp_path / "source"
    source.mkdir()
    for number in range(100):
        write(source, number)
    index(source, {number: f"p{number // 3:02d}" for number in range(100)})
    command = [sys.executable, "-c", PROGRAM, str(tmp_path / "vault"), str(source)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if int(line) >= after:
                process.send_signal(signal.SIGKILL)
                break
    assert process.returncode == -signal.SIGKILL
    found = run(tmp_path / "vault", source)
    assert found.images == 100
    assert found.added <= 100 - after // 4 * 4
    run(tmp_path / "unbroken", source)
    assert values(tmp_path / "vault") == values(tmp_path / "unbroken")


def test_a_full_disk(tmp_path: Path, source: Path) -> None:
    """What a write could not finish is dropped, the old state stands, and the next import goes on."""
    vault = tmp_path / "vault"
    run(vault, source)
    for number in range(12, 40):
        write(source, number)
    index(source, {number: f"p{number % 6}" for number in range(40)})
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8000, before[1]))
    try:
        with pytest.raises(StorageError, match="Free space"):
            run(vault, source)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, ignored)
    assert len(open_dataset(vault, KEY).images) == 12
    assert run(vault, source).images == 40


def test_an_unchanged_folder_takes_seconds(tmp_path: Path, write_dicom: WriteDicom) -> None:
    """Two thousand files here, ten thousand in the benchmark; the bound is what a loaded machine needs."""
    folder = tmp_path / "source"
    one = write_dicom(folder / "0000", pixels=np.zeros((8, 8), np.uint16)).read_bytes()
    for number in range(1, 2000):
        (folder / f"{number:04d}").write_bytes(one.replace(b"P1", f"{number % 100:02d}".encode()))
    practice = Practice(folder, "none")
    import_source(tmp_path / "vault", KEY, FORM, practice)
    started = time.process_time()
    found = import_source(tmp_path / "vault", KEY, FORM, practice)
    assert (found.added, found.images) == (0, 2000)
    assert time.process_time() - started < 2


def test_pseudonyms_only(tmp_path: Path, write_dicom: WriteDicom) -> None:
    """Not even with the key: what is sealed holds no value of a header and no name of a file."""
    folder = tmp_path / "source"
    write_dicom(folder / "SMITH.dcm", PatientID="CANARY", AccessionNumber="A4711", SOPInstanceUID="1.2.34567")
    import_source(tmp_path / "vault", KEY, FORM, Practice(folder, "none"))
    vault = tmp_path / "vault"
    opened = KEY.open((vault / "manifest").read_bytes(), b"manifest")
    place = vaults.place_of(read_manifest(vault, KEY), 0, 0)
    chunk = KEY.open(vaults.segment_path(vault, 0).read_bytes()[4:], place)
    for word in (b"SMITH", b"CANARY", b"4711", b"34567"):
        assert word not in opened
        assert word not in chunk


def test_however_often(permissions: Path, write_dicom: WriteDicom, monkeypatch: pytest.MonkeyPatch) -> None:
    """The limit on the frames of a source holds over imports, and no import takes images of one before."""
    monkeypatch.setattr(records, "MAX_FRAMES", 7)
    folder = permissions / "source"
    (folder / "far").mkdir(parents=True)
    for number, name in enumerate(("a", "b", "c", "far/d", "e")):
        frames = np.full((3, 8, 8), number, np.uint8)
        frames = frames if name != "e" else frames[:1]
        more = {"NumberOfFrames": len(frames), "PixelData": frames.tobytes()}
        write_dicom(folder / name, frames[0], PatientID=name, SOPInstanceUID=f"1.2.{number}", **more)
    practice = Practice(folder, "none", IntakeRules(frames="all"))
    vault, least = permissions / "v", 1
    first = import_source(vault, KEY, FORM, practice, least)
    assert (first.images, first.refused) == (7, {Reason.SOURCE_FRAMES: 2})
    for rules in (practice.rules, practice.rules, practice.rules.model_copy(update={"percentiles": (1.0, 99.0)})):
        again = import_source(vault, KEY, FORM, replace(practice, rules=rules), least)
        assert (again.images, again.refused, again.gone) == (7, first.refused, (0, 0))
    for gone in "bc":
        (folder / gone).rename(permissions / gone)
        freed = import_source(vault, KEY, FORM, practice, least)
    assert (freed.images, freed.refused) == (7, {})
    (permissions / "c").rename(folder / "c")
    (folder / "far").chmod(0)
    held = import_source(vault, KEY, FORM, practice, least)
    assert (held.images, held.held, held.refused[Reason.SOURCE_FRAMES]) == (7, 1, 1)
