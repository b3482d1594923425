import io
import struct
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from client.intake import IntakeRules, Reason, Refused, archives, scan
from client.intake.archives import Archive
from common.errors import IntakeError
from tests.client.intake.pictures import read

WriteDicom = Callable[..., Path]
RULES = IntakeRules(max_file_mb=1)


def zipped(path: Path, members: dict[str, bytes], method: int = zipfile.ZIP_DEFLATED) -> Path:
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return path


def test_members_are_named_and_every_one_is_accounted_for(tmp_path: Path, write_dicom: WriteDicom) -> None:
    good = write_dicom(tmp_path / "good").read_bytes()
    folder = tmp_path / "source"
    folder.mkdir()
    inner = zipped(tmp_path / "inner.zip", {"a": good}).read_bytes()
    members = {"deep/b": good, "../../c": good, "notes.txt": b"no image", "inner.zip": inner, "empty/": b""}
    path = zipped(folder / "a.ZIP", members)
    (folder / "labels.csv").write_text("file,label\na.ZIP/deep/b,sick\na.ZIP/../../c,well\n")
    found = scan(folder)
    assert [(record.path, record.member, record.frame) for record in found.records] == [
        (path, "deep/b", None),
        (path, "../../c", None),
    ]
    assert [record.label for record in found.records] == ["sick", "well"]
    assert {(refusal.member, refusal.reason) for refusal in found.refusals} == {
        ("notes.txt", Reason.NOT_DICOM),
        ("inner.zip", Reason.ARCHIVE),
    }
    dataset, _ = read(found, ["sick", "well"], 28)
    assert len(dataset.images) == 2
    assert not list(tmp_path.rglob("c"))  # nothing is unpacked, there or elsewhere


def test_an_archive_alone_is_a_source(tmp_path: Path, write_dicom: WriteDicom) -> None:
    path = zipped(tmp_path / "a.zip", {"one": write_dicom(tmp_path / "one").read_bytes()})
    assert [record.member for record in scan(path, "none").records] == ["one"]


@pytest.mark.parametrize("fault", ["empty", "text", "cut", "no end"])
def test_damaged_archives_are_refused(tmp_path: Path, write_dicom: WriteDicom, fault: str) -> None:
    whole = zipped(tmp_path / "a.zip", {"one": write_dicom(tmp_path / "one").read_bytes()}).read_bytes()
    content = {"empty": b"", "text": b"PK, but text", "cut": whole[100:], "no end": whole[:-30]}[fault]
    (tmp_path / "a.zip").write_bytes(content)
    with pytest.raises(IntakeError, match="archive damaged"):
        scan(tmp_path / "a.zip", "none")


def test_expansion_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = zipped(tmp_path / "bomb.zip", {"zeros": bytes(2**22)})
    with Archive(path) as archive:
        assert archive.members() == [("zeros", True)]
    monkeypatch.setattr(archives, "FREE_BYTES", 2**20)
    with pytest.raises(Refused, match="expands"):
        Archive(path)
    monkeypatch.setattr(archives, "MAX_DIRECTORY_BYTES", 10)
    with pytest.raises(Refused, match="expands"):
        Archive(path)


def test_a_directory_beyond_the_limit_in_zip64_is_seen(tmp_path: Path) -> None:
    """zipfile follows the locator of a zip64 directory wherever there is one, so the limit has to."""
    path = zipped(tmp_path / "a.zip", {"one": b"1"})
    whole = path.read_bytes()
    end = whole.index(b"PK\x05\x06")
    record = struct.pack("<4sQ2H2L4Q", b"PK\x06\x06", 44, 45, 45, 0, 0, 1, 1, 2**40, 0)
    path.write_bytes(whole[:end] + record + struct.pack("<4sLQL", b"PK\x06\x07", 0, end, 1) + whole[end:])
    with pytest.raises(Refused, match="expands"):
        Archive(path)


def end_of(path: Path, monkeypatch: pytest.MonkeyPatch, *, zip64: bool) -> tuple[bytes, int]:
    """Return an archive of one member without a comment, in zip64 if asked, and where its last record begins."""
    with monkeypatch.context() as patch:
        patch.setattr(zipfile, "ZIP_FILECOUNT_LIMIT", 0 if zip64 else 1)
        whole = zipped(path, {"one": b"1"}).read_bytes()
    assert (b"PK\x06\x07" in whole) is zip64
    return whole, len(whole) - 22


@pytest.mark.parametrize("zip64", [True, False])
@pytest.mark.parametrize("after", [b"", b"a comment"])
def test_honest_ends_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: bytes, *, zip64: bool) -> None:
    whole, end = end_of(tmp_path / "a.zip", monkeypatch, zip64=zip64)
    (tmp_path / "a.zip").write_bytes(whole[: end + 20] + struct.pack("<H", len(after)) + after)
    with Archive(tmp_path / "a.zip") as archive:
        assert archive.read("one", RULES) == b"1"


@pytest.mark.parametrize("fault", ["locator", "no record", "disks", "cut record"])
def test_the_end_that_is_checked_is_the_one_that_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    """Ends of which zipfile reads another record than a reader of the locator, or of the last signature, would."""
    whole, end = end_of(tmp_path / "a.zip", monkeypatch, zip64=fault != "disks")
    small = b"PK\x06\x06" + bytes(52)
    elsewhere = whole[: end - 20] + struct.pack("<4sLQL", b"PK\x06\x07", 0, end + 22, 1) + whole[end : end + 20]
    (tmp_path / "a.zip").write_bytes(
        {
            "locator": elsewhere + struct.pack("<H", len(small)) + small,
            "no record": whole[: end - 76] + bytes(4) + whole[end - 72 :],
            "disks": whole[: end + 4] + b"PK\x05\x06" + whole[end + 8 :],
            "cut record": whole + b"PK\x05\x06",
        }[fault]
    )
    with pytest.raises(Refused, match="damaged"):
        Archive(tmp_path / "a.zip")


@pytest.mark.parametrize("method", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_members_that_inflate_without_bound_are_refused(tmp_path: Path, write_dicom: WriteDicom, method: int) -> None:
    """zipfile inflates bzip2 and LZMA as far as they go, whatever is asked for."""
    path = zipped(tmp_path / "a.zip", {"good": write_dicom(tmp_path / "good").read_bytes()})
    with zipfile.ZipFile(path, "a", method) as archive:
        archive.writestr("packed", bytes(2**25))
    lying = bytearray(path.read_bytes())
    place = lying.rindex(b"PK\x01\x02")
    lying[place + 24 : place + 28] = struct.pack("<L", 1000)
    path.write_bytes(lying)
    tracemalloc.start()
    try:
        found = scan(path, "none")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert [record.member for record in found.records] == ["good"]
    assert [(refusal.member, refusal.reason) for refusal in found.refusals] == [("packed", Reason.COMPRESSION)]
    assert peak < 2**24


def test_members_are_bounded(tmp_path: Path) -> None:
    """By the site's limit, and by what the archive says of the member; a lie ends in a refusal."""
    path = zipped(tmp_path / "a.zip", {"large": bytes(2**20 + 1), "liar": bytes(2**19)})
    with Archive(path) as archive, pytest.raises(Refused, match="larger"):
        archive.read("large", RULES)
    lying = bytearray(path.read_bytes())
    place = lying.rindex(b"PK\x01\x02")
    lying[place + 24 : place + 28] = struct.pack("<L", 10)
    path.write_bytes(lying)
    with Archive(path) as archive, pytest.raises(Refused, match="archive"):
        archive.read("liar", RULES)
    with Archive(path) as archive, pytest.raises(Refused, match="archive"):
        archive.read("nothing", RULES)


@pytest.mark.parametrize("start", archives._NESTED)
def test_nesting_is_refused(tmp_path: Path, start: bytes) -> None:
    path = zipped(tmp_path / "a.zip", {"one": start + bytes(200)})
    with Archive(path) as archive, pytest.raises(Refused, match="archive"):
        archive.read("one", RULES)


def test_encrypted_and_repeated_members_are_refused(tmp_path: Path, write_dicom: WriteDicom) -> None:
    good = write_dicom(tmp_path / "good").read_bytes()
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        archive.writestr("twice", good)
        with pytest.warns(UserWarning, match="Duplicate"):
            archive.writestr("twice", good)
        archive.writestr("secret", good)
    data = bytearray(content.getvalue())
    data[data.rindex(b"PK\x01\x02") + 8] |= 1
    (tmp_path / "a.zip").write_bytes(data)
    found = scan(tmp_path / "a.zip", "none")
    assert [record.member for record in found.records] == ["twice"]
    assert [refusal.member for refusal in found.refusals] == ["twice", "secret"]
    assert found.refused == {Reason.ARCHIVE: 2}


def test_an_archive_is_read_once_for_many_members(tmp_path: Path, write_dicom: WriteDicom) -> None:
    for number in range(5):
        write_dicom(tmp_path / str(number), np.full((8, 8), number, np.uint16), PatientID=str(number))
    path = zipped(tmp_path / "a.zip", {str(n): (tmp_path / str(n)).read_bytes() for n in range(5)})
    dataset, _ = read(scan(path, "none"), ["all"], 28)
    assert dataset.number_of_patients == 5


def crowded(path: Path, members: int) -> Path:
    """Return an archive with a directory of so many members, of which the end says that there are none."""
    head = struct.pack("<4s5H3L2H", b"PK\3\4", 20, 0, 0, 0, 33, 0, 0, 0, 1, 0) + b"a"
    entry = struct.pack("<4s6H3L5H2L", b"PK\1\2", 20, 20, 0, 0, 0, 33, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0) + b"a"
    end = struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 0, 0, len(entry) * members, len(head), 0)
    path.write_bytes(head + entry * members + end)
    return path


def test_members_are_counted_before_they_are_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """zipfile lists them whatever the end says of their number, and takes 30 s and 700 MB for a million."""
    with Archive(crowded(tmp_path / "many.zip", 20)) as archive:
        assert len(archive.members()) == 20
    crowded(tmp_path / "more.zip", 21)
    monkeypatch.setattr(archives, "MAX_MEMBERS", 20)
    with Archive(tmp_path / "many.zip") as archive:
        assert len(archive.members()) == 20
    monkeypatch.setattr(zipfile, "ZipFile", lambda *_: pytest.fail("listed"))
    with pytest.raises(IntakeError, match=Reason.TOO_MANY_MEMBERS):
        scan(tmp_path / "more.zip", "none")


@pytest.mark.parametrize("before", [b"", b"an unpacker's program"])
@pytest.mark.parametrize("after", [b"", b"a comment"])
@pytest.mark.parametrize("zip64", [True, False])
def test_the_directory_that_is_counted_is_the_one_that_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, before: bytes, after: bytes, *, zip64: bool
) -> None:
    if before and zip64:
        pytest.skip("refused, see above")
    whole, end = end_of(tmp_path / "a.zip", monkeypatch, zip64=zip64)
    (tmp_path / "a.zip").write_bytes(before + whole[: end + 20] + struct.pack("<H", len(after)) + after)
    Archive(tmp_path / "a.zip").close()
    monkeypatch.setattr(archives, "MAX_MEMBERS", 0)
    with pytest.raises(Refused, match=Reason.TOO_MANY_MEMBERS):
        Archive(tmp_path / "a.zip")


def test_a_folder_that_holds_data_is_refused(tmp_path: Path, write_dicom: WriteDicom) -> None:
    """Every member is used or counted; only a folder that is none of anything is neither."""
    good = write_dicom(tmp_path / "good").read_bytes()
    path = zipped(tmp_path / "a.zip", {"one": good, "two/": good, "three/": b""})
    found = scan(path, "none")
    assert [record.member for record in found.records] == ["one"]
    assert [(refusal.member, refusal.reason) for refusal in found.refusals] == [("two/", Reason.ARCHIVE)]
