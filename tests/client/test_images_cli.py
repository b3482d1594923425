"""`check` and `import`: counts, reasons, exit codes; and no value of any input in anything that is written or sent."""

import errno
import json
import os
import stat
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
import pytest
from pydicom import dcmread
from pydicom.encaps import encapsulate
from pydicom.uid import MPEG2MPML

from client import cli, images, policy
from client.agent import answer, open_site
from client.home import Home, create_home, vault_key
from client.intake.records import Record
from client.intake.selection import Practice
from client.intake.shortage import too_few
from client.intake.survey import survey
from client.logs import log_to
from client.policy import Policy
from client.site_config import SiteConfig
from common.config import Proposal
from common.errors import ExitCode
from tests.client.intake.conftest import WriteDicom
from tests.client.intake.conftest import write_dicom as write_dicom
from tests.tiny_site import PROPOSAL, train_request, warmup_request

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    def call(*arguments: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as ended:
            cli.main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return int(ended.value.code or 0), captured.out, captured.err

    return call


def picture(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 4096, (32, 32)).astype(np.uint16)


@pytest.fixture
def source(tmp_path: Path, write_dicom: WriteDicom) -> Path:
    """Twenty-two patients, one with two images; and one file for each of five reasons of refusal."""
    folder = tmp_path / "source"
    for number in range(23):
        patient = f"P{max(1, number):02d}"
        write_dicom(folder / f"{number:02d}", picture(number), PatientID=patient, Modality="CR", **uid(number))
    write_dicom(folder / "us", Modality="US", **uid(50))
    write_dicom(folder / "burned", BurnedInAnnotation="YES", **uid(51))
    write_dicom(folder / "nobody", PatientID=None, **uid(52))
    write_dicom(folder / "twin", picture(3), PatientID="P90", **uid(53))
    (folder / "note.txt").write_text("no image")
    whole = write_dicom(folder / "cut", **uid(54)).read_bytes()
    (folder / "cut").write_bytes(whole[: len(whole) // 2])
    return folder


def uid(number: int) -> dict[str, str]:
    return {"SOPInstanceUID": f"1.2.{number}", "StudyInstanceUID": f"1.3.{number}"}


def test_adds_up(run: Run, source: Path, tmp_path: Path) -> None:
    code, out, _ = run("check", source, "--label", "none", "--json", tmp_path / "a.json", "--report", tmp_path / "seen")
    assert code == 0
    found = json.loads((tmp_path / "a.json").read_text())
    assert (found["expected"], found["read"], found["usable"], found["patients"]) == (29, 27, 24, 23)
    assert found["expected"] == found["usable"] + sum(group["count"] for group in found["refused"])
    assert found["images_per_patient"] == [1, 1.0, 2]
    assert found["kinds"]["modalities"] == {"CR": 23, "US": 1}
    assert found["kinds"]["syntaxes"] == {"Explicit VR Little Endian": 27}
    for line in (
        "source: DICOM folder",
        "expected: 29; read: 27; usable: 24",
        "1 ultrasound (as no. 29)",
        "epsilon",
        "Grouping is a privacy",
    ):
        assert line in out
    assert "1 pair of nearly the same pictures under two patients" in out


def test_text_before_labels_and_read_whatever_the_labels(
    run: Run, source: Path, tmp_path: Path, write_dicom: WriteDicom
) -> None:
    dataset = dcmread(write_dicom(source / "nothing", **uid(61)))
    del dataset.PixelData
    dataset.save_as(source / "nothing")
    found = {}
    for label in ("auto", "none"):
        run("check", source, "--label", label, "--json", tmp_path / "a.json", "--report", tmp_path / "seen")
        found[label] = json.loads((tmp_path / "a.json").read_text())
    assert [found[label]["read"] for label in ("auto", "none")] == [28, 28]
    counts = {label: {one["said"]: one["count"] for one in found[label]["refused"]} for label in found}
    assert counts["auto"]["ultrasound"] == counts["auto"]["text burned in, says the header"] == 1
    assert counts["auto"]["no label"] == 26
    assert counts["none"]["no image in the file, found at decoding"] == 1


def test_owner_alone_self_contained(run: Run, source: Path, tmp_path: Path) -> None:
    run("check", source, "--label", "none", "--report", tmp_path / "seen")
    assert stat.S_IMODE((tmp_path / "seen").stat().st_mode) == 0o700
    for name in ("report.html", "contact-sheet.png"):
        assert stat.S_IMODE((tmp_path / "seen" / name).stat().st_mode) == 0o600
    page = (tmp_path / "seen" / "report.html").read_text()
    assert "http" not in page.replace("<!doctype html>", "")
    assert "<script" not in page


def test_a_folder_that_was_there_keeps_its_mode(run: Run, source: Path, tmp_path: Path) -> None:
    (tmp_path / "shared").mkdir(mode=0o755)
    assert run("check", source, "--label", "none", "--report", tmp_path / "shared")[0] == 0
    assert stat.S_IMODE((tmp_path / "shared").stat().st_mode) == 0o755
    assert stat.S_IMODE((tmp_path / "shared" / "report.html").stat().st_mode) == 0o600


def test_no_older_sheet(run: Run, source: Path, tmp_path: Path) -> None:
    """A page that says which source it is of, and no pictures of another one beside it."""
    seen, empty = tmp_path / "seen", tmp_path / "empty"
    run("check", source, "--label", "none", "--report", seen)
    page = (seen / "report.html").read_text()
    assert "DICOM folder; 20" in page
    assert str(source) not in page
    run("check", source, "--label", "none", "--report", seen, "--show-files")
    assert f"DICOM folder: {source}; 20" in (seen / "report.html").read_text()
    empty.mkdir()
    (empty / "cut").write_bytes((source / "cut").read_bytes())
    assert run("check", empty, "--label", "none", "--report", seen)[0] == ExitCode.DATA
    assert [path.name for path in seen.iterdir()] == ["report.html"]
    assert "No usable image." in (seen / "report.html").read_text()
    assert "Too few" not in (seen / "report.html").read_text()


def test_no_hours_before_a_report_that_cannot_be_written(run: Run, source: Path) -> None:
    code, out, error = run("check", source, "--label", "none", "--report", "/proc/seen")
    assert (code, out, "read" in error) == (ExitCode.STORAGE, "", False)


def test_a_size_that_the_policy_does_not_allow(run: Run, source: Path, tmp_path: Path) -> None:
    home = make_home(tmp_path, source)
    code, _, error = run("import", home.folder, "--classes", "all", "--size", 128)
    assert code == 0
    assert "the policy allows runs of 28, 32, 64 px, not of 128: none may use this set" in error
    assert "the policy allows" not in run("import", home.folder, "--classes", "all", "--size", 28)[2]


def test_nothing_of_the_home_is_overwritten(run: Run, source: Path, tmp_path: Path) -> None:
    home = make_home(tmp_path, source)
    before = home.vault_key.read_bytes()
    for place in (("--json", home.vault_key), ("--report", home.folder / "keys")):
        code, out, error = run("check", source, "--home", home.folder, "--report", tmp_path / "seen", *place)
        assert (code, out) == (ExitCode.CONFIG, ""), place
        assert "outside the home" in error
    assert run("import", home.folder, "--classes", "all", "--json", tmp_path / "nowhere" / "a")[1] == ""
    assert home.vault_key.read_bytes() == before
    assert not (tmp_path / "seen").exists()


def test_names_only_when_asked(run: Run, source: Path, tmp_path: Path) -> None:
    common = ("check", source, "--label", "none", "--report", tmp_path / "seen")
    assert "burned" not in run(*common)[1].replace("text burned in", "")
    assert "(as burned)" in run(*common, "--show-files")[1]


def test_a_sites_policy_and_table_count(run: Run, source: Path, tmp_path: Path) -> None:
    home = make_home(tmp_path, source)
    rules = policy.load(home.policy).model_copy(update={"allow_doubtful_images": ("ultrasound", "burned-in")})
    policy.save(home.policy, rules)
    (home.folder / "patients.csv").write_text("patient,to\nP90,P03\n")
    with (home.folder / "site.toml").open("a") as handle:
        handle.write('patients = "patients.csv"\n')
    out = run("check", source, "--home", home.folder, "--report", tmp_path / "seen")[1]
    assert "usable: 26" in out
    assert "patients: 23" in out
    assert "nearly the same" not in out


def make_home(folder: Path, source: Path, least: int = 10) -> Home:
    rules = Policy(site="st-mary", declared_patients=20, max_epsilon=8.0, delta=1e-5, min_patients=least)
    return create_home(folder / "home", SiteConfig(data=str(source), label="none"), rules)


def test_an_image_under_two_patients_is_warned_of(
    run: Run, tmp_path: Path, source: Path, write_dicom: WriteDicom
) -> None:
    write_dicom(source / "zebra", picture(5), PatientID="ZEBRA", Modality="CR", **uid(5))
    home, said = make_home(tmp_path, source), "1 image is there under two patients: one person with two ids?"
    json_file = tmp_path / "a.json"
    for arguments in (
        ("check", source, "--home", home.folder, "--report", tmp_path / "seen", "--json", json_file),
        ("import", home.folder, "--classes", "all", "--size", 28, "--json", json_file),
    ):
        code, out, _ = run(*arguments)
        assert (code, f"warning: {said}" in out, "zebra" in out.lower()) == (0, True, False)
        assert any(one["said"].startswith(said) for one in json.loads(json_file.read_text())["warnings"])
    page = (tmp_path / "seen" / "report.html").read_text()
    assert (said in page, "zebra" in page.lower()) == (True, False)
    assert "zebra" in run("check", source, "--show-files", "--label", "none", "--report", tmp_path / "seen")[1]


def test_import_says_the_same(run: Run, source: Path, tmp_path: Path) -> None:
    home = make_home(tmp_path, source)
    arguments = ("import", home.folder, "--classes", "all", "--size", 28, "--json", tmp_path / "i.json")
    code, out, _ = run(*arguments)
    assert code == 0
    run("check", source, "--home", home.folder, "--json", tmp_path / "c.json", "--report", tmp_path / "seen")
    done, found = (json.loads((tmp_path / f"{name}.json").read_text()) for name in "ic")
    for name in ("expected", "read", "usable", "patients", "images_per_patient", "kinds", "refused"):
        assert done[name] == found[name], name
    assert "imported 24 images of 23 patients" in out
    again = run(*arguments)[1]
    assert "new or changed: 0 images; unchanged: 29 files" in again
    assert "expected: 29; read: 27; usable: 24" in again
    assert "1 pair of nearly the same pictures under two patients" in again
    assert "below, kinds, parts made black, examples and other warnings are of the files that were opened now" in again
    assert (again.count("opened now"), again.count("unchanged"), again.count("not opened")) == (1, 1, 1)
    assert (out.count("opened now"), out.count("unchanged")) == (0, 1)


def test_what_is_gone_leaves_every_set_of_the_home(run: Run, source: Path, tmp_path: Path) -> None:
    home = make_home(tmp_path, source)
    run("import", home.folder, "--classes", "all", "--size", 32)
    arguments = ("import", home.folder, "--classes", "all", "--size", 28)
    assert "gone" not in run(*arguments)[1]
    for number in range(3):
        (source / f"{number:02d}").unlink()
    out = run(*arguments)[1]
    assert "gone: 3 images of 3 files" in out
    assert "also gone: 3 images of the set of 32 px x 1 (all), whose files are gone or changed\n" in out
    assert "gone" not in run(*arguments)[1]
    for number in range(3, 15):
        (source / f"{number:02d}").unlink()
    policy.save(home.policy, policy.load(home.policy).model_copy(update={"min_patients": 1}))
    assert "too few" not in run(*arguments)[1]


def test_exit_codes(run: Run, source: Path, tmp_path: Path, write_dicom: WriteDicom) -> None:
    home = make_home(tmp_path, source, least=50)
    importing = ("import", home.folder, "--classes", "all", "--size", 28)
    checking = ("--label", "none", "--report", tmp_path / "seen")
    code, _, error = run(*importing)
    assert (code, "What was read is kept" in error) == (ExitCode.TOO_FEW_PATIENTS, True)
    code, _, error = run("check", source, "--home", home.folder, "--report", tmp_path / "seen")
    assert (code, "kept" in error) == (ExitCode.TOO_FEW_PATIENTS, False)
    assert "no image was refused" in str(too_few(14, 20, {}))
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / "a.txt").write_text("no image")
    assert run("check", empty, *checking)[0] == ExitCode.DATA
    assert run("check", tmp_path / "nowhere", *checking)[0] == ExitCode.UNREADABLE
    path = write_dicom(tmp_path / "movie" / "a")
    dataset = dcmread(path)
    dataset.file_meta.TransferSyntaxUID, dataset.PixelData = MPEG2MPML, encapsulate([b"\0" * 64])
    dataset.save_as(path)
    code, out, error = run("check", path.parent, *checking)
    assert (code, "films are not read" in error, "pip install" in error) == (ExitCode.DATA, True, False)
    assert "usable: 0" in out


def test_a_decoder_that_some_files_lack(run: Run, source: Path, tmp_path: Path, write_dicom: WriteDicom) -> None:
    path = write_dicom(source / "film", **uid(60))
    dataset = dcmread(path)
    dataset.file_meta.TransferSyntaxUID, dataset.PixelData = MPEG2MPML, encapsulate([b"\0" * 64])
    dataset.save_as(path)
    code, out, _ = run("check", source, "--label", "none", "--report", tmp_path / "seen")
    assert (code, "for want of a decoder: MPEG2 Main Profile / Main Level: films are not read" in out) == (0, True)
    assert "films are not read" in (tmp_path / "seen" / "report.html").read_text()


def test_labels_that_cannot_be_written_or_command_the_terminal(run: Run, tmp_path: Path) -> None:
    """A half of a pair of UTF-16 in an NPZ, and an escape."""
    labels = ["a\ud800", "\x1b[31mred\x1b]0;title\x07"]
    stack = np.random.default_rng(0).integers(0, 255, (60, 20, 20)).astype(np.uint8)
    np.savez(tmp_path / "x.npz", images=stack, patient_id=np.arange(60), labels=labels * 30)
    places = ("--report", tmp_path / "seen", "--json", tmp_path / "a.json")
    code, out, err = run("check", tmp_path / "x.npz", *places)
    assert (code, "\x1b" in out + err) == (0, False)
    assert r"by class: a\ud800 30, \x1b[31mred\x1b]0;title\x07 30" in out
    assert json.loads((tmp_path / "a.json").read_text())["classes"] == dict.fromkeys(labels, 30)
    assert r"a\ud800" in (tmp_path / "seen" / "report.html").read_text()
    (out + err).encode()
    for option in ((), ("--show-files",)):
        code, out, err = run("check", tmp_path / "x.npz", *places, "--classes", "b", *option)
        assert (code, "\x1b" in out + err) == (ExitCode.DATA, False)
        (out + err).encode()


@pytest.mark.skipif(os.geteuid() == 0, reason="root can read everything")
def test_an_unreadable_folder(run: Run, source: Path, tmp_path: Path) -> None:
    source.chmod(0)
    assert run("check", source, "--report", tmp_path / "seen")[0] == ExitCode.UNREADABLE
    source.chmod(0o700)


def test_a_folder_that_cannot_be_listed(
    run: Run, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_: Path) -> None:
        raise OSError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, "iterdir", refuse)
    monkeypatch.setattr("os.access", lambda _, mode, **__: mode != os.R_OK)  # what click looks at
    code, _, error = run("check", source, "--report", tmp_path / "seen")
    assert (code, "Permission denied" in error) == (ExitCode.UNREADABLE, True)


def test_a_folder_below_one_that_cannot_be_entered(
    run: Run, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path) -> bool:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(Path, "exists", refuse)
    code, _, error = run("check", source, "--report", tmp_path / "seen")
    assert (code, "Permission denied" in error) == (ExitCode.UNREADABLE, True)


def test_a_full_disk(run: Run, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = make_home(tmp_path, source)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("client.intake.chunks.os.fsync", full)
    code, _, error = run("import", home.folder, "--classes", "all", "--size", 28)
    assert (code, "Free space" in error) == (ExitCode.STORAGE, True)


def test_each_phase_has_its_clock(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 40.0, 5000.0, 5010.0, 5040.0, 5041.0])
    monkeypatch.setattr(images.time, "monotonic", lambda: next(clock))
    tell = images.progress()
    for done in (1, 80):
        tell("files looked at", done, 0)
    for done in (1, 10, 40, 41):
        tell("images read", done, 1000)
    said = ["files looked at: 80, 2 a second", "images read: 40 of 1000, 1 a second, 16 min 0 s left"]
    assert capsys.readouterr().err.splitlines() == said


def test_all_phases_are_told(source: Path) -> None:
    told: list[tuple[str, int, int]] = []
    survey(Practice(source, "none"), progress=lambda *state: told.append(state))
    assert [state for state in told if state[0] == "files looked at"] == [
        ("files looked at", number, 0) for number in range(1, 30)
    ]
    assert told[-1] == ("images read", 25, 25)


def test_an_interrupted_import_says_what_is_kept(
    run: Run, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = make_home(tmp_path, source)

    def interrupted(records: Iterable[Record], *_: object) -> Iterator[tuple[Record, np.ndarray]]:
        for number, record in enumerate(records):
            if number == 3:
                raise KeyboardInterrupt
            yield record, np.zeros((1, 28, 28), np.uint8)

    with monkeypatch.context() as patched:
        patched.setattr("client.intake.importing.decode_records", interrupted)
        code, _, error = run("import", home.folder, "--classes", "all", "--size", 28)
    assert code == ExitCode.INTERRUPTED
    assert "3 of 25 images were read, and are kept but for the last " in error
    assert "run the same command again to go on" in error


CANARIES = [f"CANARY{number:03d}" for number in range(200)]
TAGS = (
    *("PatientName", "StudyDescription", "InstitutionName", "ReferringPhysicianName", "StudyID", "AccessionNumber"),
    *("SeriesDescription", "Manufacturer", "ManufacturerModelName", "PatientComments", "OperatorsName", "StationName"),
)


def plant(folder: Path, write_dicom: WriteDicom) -> list[str]:
    """Write twenty-five files that hold two hundred canaries, dates and UIDs; return all that must not be seen."""
    words, dates = iter(CANARIES), [f"19{number:02d}0{1 + number % 9}17" for number in range(25, 50)]
    uids = [f"1.2.826.0.1.3680043.8.498.4711{number:03d}" for number in range(25)]
    for number in range(25):
        tags = {tag: next(words) for tag in (*TAGS[number % 12 :][:3], "PatientID")}
        if number % 5 == 4:
            tags["Modality"] = next(words)
        if number % 5 == 3:
            tags["BurnedInAnnotation"] = "YES"
        path = write_dicom(
            folder / next(words) / f"{next(words)}.dcm",
            picture(number),
            SOPInstanceUID=uids[number],
            PatientBirthDate=dates[number],
            **tags,
        )
        dataset = dcmread(path)
        dataset.private_block(0x0099, next(words), create=True).add_new(1, "LO", next(words))
        dataset.save_as(path)
        if number % 6 == 5:
            path.write_bytes(path.read_bytes()[:-300])
    for word in words:
        (folder / f"{word}.txt").write_text(word)
    return [*CANARIES, *dates, *uids]


def test_labels_of_headers_stay_out_of_logs(run: Run, tmp_path: Path, write_dicom: WriteDicom, monkeypatch) -> None:
    """Shown where a terminal shows them, or where that is asked for; else counted."""
    for number in range(25):
        write_dicom(
            tmp_path / "data" / f"{number}", picture(number), PatientID=f"P{number}", PatientName="DOE", **uid(number)
        )
    home = make_home(tmp_path, tmp_path / "data", least=5)
    site = home.folder / "site.toml"
    site.write_text(site.read_text().replace('"none"', '"tag:PatientName"'))
    checking = ("check", tmp_path / "data", "--label", "tag:PatientName", "--report", tmp_path / "seen")
    importing = ("import", home.folder, "--size", 28, "--classes")
    code, out, err = run(*checking)
    assert (code, "DOE" in out + err) == (0, False)
    assert "by label: 1 label, shown on a terminal alone or with --show-files\n" in out
    for command in ((*checking, "--classes", "x"), (*importing, "x"), (*importing, "x,y")):
        code, out, err = run(*command)
        assert (code, "DOE" in out + err) == (ExitCode.DATA, False)
        assert "25 images have labels that are no class of the run: 1 label, shown on a terminal alone" in err
        assert "no class of the run: DOE 25." in run(*command, "--show-files")[2]
    assert "by label: DOE 25\n" in run(*checking, "--show-files")[1]
    monkeypatch.setattr(images, "_EVERY_S", 1e9)
    for stream in ("stdout", "stderr"):
        with monkeypatch.context() as patched:
            patched.setattr(f"sys.{stream}.isatty", lambda: True)
            assert ("by label, on this terminal alone: DOE 25\n" in run(*checking)[1]) == (stream == "stdout")
            assert ("run: DOE 25." in run(*importing, "x")[2]) == (stream == "stderr")


def test_no_identifier(run: Run, tmp_path: Path, write_dicom: WriteDicom) -> None:
    """Two hundred canaries in names, ids, dates, private tags, UIDs and file names: none in vault, logs, journal,
    ledger, replies, reports or messages, sealed or opened."""
    folder = tmp_path / "data"
    forbidden = plant(folder, write_dicom)
    home = make_home(tmp_path, folder, least=5)
    log_to(home.log)
    said = "".join(run("check", folder, "--label", "none", "--report", home.folder / "seen")[1:])
    proposal = Proposal.model_validate(
        PROPOSAL.model_dump()
        | {
            "image": {"size": 28, "classes": ("all", "other")},
            "privacy": PROPOSAL.privacy.model_dump() | {"min_patients": 5},
        }
    )
    for arguments in (
        ("import", home.folder, "--classes", "all,other", "--size", 28, "--json", tmp_path / "home.json"),
        ("import", home.folder, "--classes", "CANARIES", "--size", 28),
        ("doctor", home.folder),
        ("import", home.folder, "--classes", "all,other", "--size", 28),
    ):
        said += "".join(run(*arguments)[1:])
    assert "usable: 1" in said
    site = open_site(home)
    replies = [
        answer(site, request) for request in (warmup_request(proposal=proposal), train_request(proposal=proposal))
    ]
    assert all(reply.refusal is None for reply in replies)
    said += repr(replies)
    files = [path for path in home.folder.rglob("*") if path.is_file()]
    assert len(files) > 10
    written = {path.name: path.read_bytes() for path in files} | {"json": (tmp_path / "home.json").read_bytes()}
    for name, content in written.items():
        opened = vault_key(home).open(content, b"manifest") if name == "manifest" else b""
        for word in forbidden:
            assert word.encode() not in content + opened, (name, word)
    for word in forbidden:
        assert word not in said
        assert not any(word in path.name for path in files)
