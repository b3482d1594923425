"""Who is the same patient, and what is warned of."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from client.intake.cautions import cautions
from client.intake.deidentify import BlankRule, BlankRules
from client.intake.patients import PatientTable, normalised, read_patient_table
from client.intake.records import Record, Scan
from client.intake.refusals import Reason
from client.intake.selection import Practice, choose
from client.intake.twins import Twins
from common.errors import IntakeError


def record(number: int, patient: str, issuer: str = "", **header: str) -> Record:
    return Record(Path(f"{number}"), None, (issuer, patient), "all", None, header=header)


def said(records: list[Record], table: PatientTable | None = None, blank: BlankRules | None = None) -> str:
    practice = Practice(Path(), patients=table or PatientTable(), blank=blank or BlankRules())
    return " ".join(one.said for one in cautions(records, choose(Scan(tuple(records), {}), practice, None), practice))


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("P1", " p1 "),
        ("P  1", "p 1"),
        ("\uff211", "a1"),
        ("Müller", "MU\u0308LLER"),
        ("Z\u200bz", "zz"),
        ("\ufeffP1", "p1"),
        ("P1 \u200b", "p1"),
        ("u\u200b\u0308", "\u00fc"),
        *((f"P{unseen}1", "p1") for unseen in "\u034f\u115f\u1160\u17b4\u180b\u180f\u2065\u3164\ufe0f\uffa0\ufff0"),
        *((f"P{unseen}1", "p1") for unseen in "\u00ad\u061c\u180e\u2060\ufe00\U0001bca0\U0001d173\U000e0001\U000e01ef"),
        ("\U000e0fff\ufe0f ", ""),
    ],
)
def test_spelling_does_not_split(one: str, other: str) -> None:
    assert normalised(("Ward", one)) == normalised((" WARD", other))


def test_different_ids_stay_apart() -> None:
    assert len({normalised(("", name)) for name in ("1", "01", "1 0", "10", "-1")}) == 5
    assert normalised(("a", "1")) != normalised(("b", "1"))
    assert len({normalised(("", f"P{letter}1")) for letter in "\u0301\u1100\u1161\ufe20\ufffd\u2044"}) == 6


def test_the_table_merges(tmp_path: Path) -> None:
    path = tmp_path / "patients.csv"
    path.write_text("issuer,patient,to,to_issuer\nW,p1,P2,W\n,x,y,H\n")
    table = read_patient_table(path)
    assert table.of(("w", "P1 ")) == ("w", "p2") == table.of(("W", "p2"))
    assert table.of(("", "X")) == ("h", "y")
    assert table.of(("", "p1")) == ("", "p1")
    ranks = table.ranks([("W", "p2"), ("W", "p1"), ("A", "z")])
    assert ranks == {("A", "z"): 0, ("W", "p1"): 1, ("W", "p2"): 1}
    assert "1 line of the table of patients: nobody of that id is there (line 3)." in said(
        [record(1, "p1", "W")], table
    )
    assert "nobody of that id" not in said([record(1, "p1", "W"), record(2, "x", "Q")], table)


def test_any_issuer(tmp_path: Path) -> None:
    path = tmp_path / "patients.csv"
    path.write_text("patient,to\n\np1,P2\nx,y\n")
    table = read_patient_table(path)
    assert table.of(("HOSP", "P1")) == table.of(("", "p1")) == table.of(("hosp", "p2")) == table.of(("", "P2"))
    assert table.of(("HOSP", "p3")) == ("hosp", "p3")
    assert "nobody of that id is there (line 4)." in said([record(1, "p1", "HOSP"), record(2, "y", "H")], table)
    path.write_text("patient,to,to_issuer\np1,P2,Z\n")
    assert read_patient_table(path).of(("HOSP", "p1")) == ("z", "p2") == read_patient_table(path).of(("z", "p2"))


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("W,p1,a,\n,p1,b,", "Line 2 .*ambiguous"),
        (",a,b,\n,b,c,", "Line 2 .* by line 3 is another"),
        (",a,b,\nW,b,c,", "Line 3 .*ambiguous"),
        ("W,a,b,\nW,b,c,", "Line 2 .* by line 3 is another"),
        ("W,a,b,\n,b,c,", "Line 2 .* by line 3 is another"),
        (",x,y,\n,b,c,\n,a,b,", "Line 4 .* by line 3 is another"),
        (",a,b,\n,A,c,", "Line 3 .*another thing than line 2"),
        (",a,b,\n,,c,", "Line 3 .*no id"),
    ],
)
def test_one_meaning(tmp_path: Path, lines: str, message: str) -> None:
    (tmp_path / "patients.csv").write_text(f"issuer,patient,to,to_issuer\n{lines}\n")
    with pytest.raises(IntakeError, match=message):
        read_patient_table(tmp_path / "patients.csv")


def test_one_number_of_an_examination_hides_no_warning() -> None:
    """One id is an accession number by chance; that nobody has a second examination is told all the same."""
    uids = [{"StudyInstanceUID": f"1.{number}", "AccessionNumber": "p0"} for number in range(30)]
    text = said([record(number, f"p{number}", **uids[number]) for number in range(30)], PatientTable())
    assert "1 of 30 ids is the number of an examination" in text
    assert "None of 30 ids has a second examination" in text


def test_nothing_false_of_a_part() -> None:
    """A birth date of another file is not known, so that what is said is said of these files alone."""
    records = [record(number, f"A{number}", AccessionNumber=f"A{number}", StudyInstanceUID="1") for number in range(30)]
    table, both = PatientTable({("", "z"): ("", "y")}, {}, {"z": 2}), [*records, record(31, "A1", PatientSex="F")]
    both.append(record(32, "A1", PatientSex="M"))
    practice = Practice(Path(), patients=table)
    found = [one.said for one in cautions(both, choose(Scan(tuple(both), {}), practice, None), practice, partial=True)]
    assert len(found) == 1
    assert found[0].startswith("Of the files that were opened now: 1 id has more than one sex")


@pytest.mark.parametrize(
    "text", ["patient\nx\n", "patient,to\nx,\n", "patient,to\nx,y\nX,z\n", "patient,to\na,b\nb,c\n"]
)
def test_a_wrong_table(tmp_path: Path, text: str) -> None:
    (tmp_path / "patients.csv").write_text(text)
    with pytest.raises(IntakeError) as caught:
        read_patient_table(tmp_path / "patients.csv")
    assert "x" not in str(caught.value).replace("expected", "")


def test_accession_like() -> None:
    many = [record(number, f"A{number}", AccessionNumber=f"A{number}") for number in range(10)]
    assert "10 of 10 ids are the number of an examination" in said(many)
    mixed = [record(number, f"A{number}", AccessionNumber=f"A{number // 30}") for number in range(30)]
    assert "1 of 30 ids is the number of an examination" in said([*mixed, record(99, "A1", StudyInstanceUID="1.99")])
    assert "examination" not in said([record(number, f"A{number}", AccessionNumber="B") for number in range(10)])
    once = [record(number, f"A{number}", StudyInstanceUID=f"1.{number}") for number in range(30)]
    assert "None of 30 ids has a second examination" in said(once)
    assert "second examination" not in said([*once, record(99, "A1", StudyInstanceUID="1.99")])


def test_several_birth_dates_or_sexes() -> None:
    both = [record(1, "p", PatientBirthDate="19500101", PatientSex="F"), record(2, "P", PatientBirthDate="19600101")]
    text = said([*both, record(3, "p", PatientSex="M")])
    assert "1 id has more than one birth date" in text
    assert "1 id has more than one sex" in text
    assert "1950" not in text
    assert "more than one" not in said([both[0], record(2, "q", PatientBirthDate="19600101", PatientSex="M")])


def test_thousands_under_one_id() -> None:
    assert "1 id has over 2000 images" in said([record(number, "anon") for number in range(2001)])
    assert "All images have one id" in said([record(number, "anon") for number in range(30)])
    assert "one id" not in said([record(number, f"p{number % 2}") for number in range(2000)])


def test_same_instance_twice() -> None:
    twice = [record(1, "p", SOPInstanceUID="1.2"), record(2, "q", SOPInstanceUID="1.2"), record(3, "q")]
    assert "1 image is there a second time" in said(twice)
    assert "second time" not in said(twice[1:])


def test_same_instance_under_two_patients() -> None:
    """Whether or not it is used: what is not used shows as well that two ids are one person."""
    twice = [record(1, "p", SOPInstanceUID="1.2"), record(2, "q", SOPInstanceUID="1.2"), record(3, "q")]
    assert "1 image is there under two patients: one person with two ids?" in said(twice)
    assert "under two" not in said(twice, PatientTable({("", "q"): ("", "p")}))
    assert "under two" not in said([twice[0], replace(twice[1], patient=("", " P "))])
    assert "under two" not in said([twice[0], replace(twice[1], frame=1)])
    unlabelled = [replace(one, label=None) for one in twice]
    assert "2 images are there under two patients" in said([*unlabelled, record(4, "r", SOPInstanceUID="1.2")])
    rows = [replace(record(5, name), line=line) for line, name in enumerate(("p", "p", "q"), 1)]  # of one file
    assert "1 image is there under two patients" in said(rows)
    assert "under two" not in said(rows[:2])


def test_mangled_ids_merge_nobody() -> None:
    """Of an index or an array too: an export that replaced letters made one id of several."""
    choice = choose(Scan((record(1, "M\ufffd1"), record(2, "m1")), {}), Practice(Path()), None)
    assert [one.patient for one in choice.records] == [("", "m1")]
    assert [one.reason for one in choice.refusals] == [Reason.PATIENT_UNREADABLE]
    unseen = choose(Scan((record(1, "\u200b"), record(2, "\ufeff")), {}), Practice(Path()), None)
    assert [one.reason for one in unseen.refusals] == [Reason.PATIENT_UNREADABLE] * 2


def test_several_issuers() -> None:
    assert "1 id comes with more than one issuer" in said([record(1, "p", "A"), record(2, "p")])
    assert "issuer," not in said([record(1, "p", "A"), record(2, "q")])


def picture(seed: int) -> np.ndarray:
    """A smooth picture of one kind: the same body, other details."""
    rng, across = np.random.default_rng(seed), np.linspace(-1, 1, 64)
    body = 160 * np.exp(-(across[:, None] ** 2 + across[None, :] ** 2) * 2)
    for x, y in rng.uniform(-0.8, 0.8, (12, 2)):
        body += 40 * np.exp(-((across[:, None] - x) ** 2 + (across[None, :] - y) ** 2) * 30)
    return np.clip(body, 0, 255).astype(np.uint8)[None]


def test_twins_are_found(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for change in ("same", "darker", "noise", "jpeg"):
        twins, one = Twins(), picture(0)
        other = one.copy()
        if change == "darker":
            other = (one * 0.95).astype(np.uint8)
        elif change == "noise":
            other = np.clip(one.astype(int) + rng.integers(-1, 2, one.shape), 0, 255).astype(np.uint8)
        elif change == "jpeg":
            Image.fromarray(one[0]).save(tmp_path / "a.jpg", quality=90)
            other = np.asarray(Image.open(tmp_path / "a.jpg"))[None]
        twins.add(one, 0, 10)
        twins.add(other, 1, 11)
        twins.add(one, 0, 12)  # of one patient: no matter
        assert (10, 11) in twins.pairs(), change
        assert (10, 12) not in twins.pairs()


def test_others_are_not() -> None:
    twins = Twins()
    for number in range(300):
        twins.add(picture(number), number, number)
    twins.add(np.zeros((1, 64, 64), np.uint8), 998, 998)
    twins.add(np.zeros((1, 64, 64), np.uint8), 999, 999)
    assert twins.pairs() == []


def test_rows_as_people() -> None:
    rows = [Record(Path("a.npz"), number, ("", str(number)), "a", None) for number in range(3)]
    assert "Each image counts as a person" in said(rows)
    assert "counts as a person" not in said([replace(rows[0], patient=("", "p7"))])


def test_black_by_rule() -> None:
    rule = BlankRule(rows=40, regions=[[0, 0, 65535, 20], [0, 20, 65535, 20]])
    small = record(1, "p", Rows="40", Columns="30")
    whole, part = BlankRules(blank=[rule]), BlankRules(blank=[rule.model_copy(update={"regions": [[0, 0, 29, 65535]]})])
    assert "1 image: the regions of blank_rules cover them whole" in said([small], blank=whole)
    assert "cover" not in said([small], blank=part)


def test_a_patient_of_many_images_is_looked_up_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """For each spelling, to order patients and to group images: not for each image."""
    asked: list[tuple[str, str]] = []
    real = PatientTable.of
    monkeypatch.setattr(PatientTable, "of", lambda self, stated: (asked.append(stated), real(self, stated))[1])
    records = [record(number, "pP"[number % 2], SOPInstanceUID=f"1.{number}") for number in range(50)]
    records.append(record(50, "q", SOPInstanceUID="1.0"))
    choice = choose(Scan(tuple(records), {}), Practice(Path()), None)
    assert (len(choice.records), choice.shared) == (50, ((records[0], records[50]),))
    assert sorted(asked) == sorted([("", "p"), ("", "P"), ("", "q")] * 2)
