"""Lists of what is asked for."""

from datetime import date
from pathlib import Path

import pytest

from client.pull.archive import Reason, Refused, wanted_studies
from client.pull.asked import Row, read_list
from common.errors import IntakeError


def rows(folder: Path, text: str) -> tuple[Row, ...]:
    path = folder / "list.csv"
    path.write_text(text)
    return read_list(path)


def test_accessions_and_patients(tmp_path: Path) -> None:
    assert rows(tmp_path, "Accession\nA1\n\nA2\nA1\n") == (Row(2, accession="A1"), Row(4, accession="A2"))
    text = "patient,issuer,modality,from,to\nP 1, H ,ct,2024-01-31,20240201\nP2,,,,\n"
    first = Row(2, "", "P 1", "H", "CT", date(2024, 1, 31), date(2024, 2, 1))
    assert rows(tmp_path, text) == (first, Row(3, patient="P2"))
    assert first.dates == "20240131-20240201"
    assert Row(2, begin=date(2024, 1, 31)).dates == "20240131-"
    assert "P 1" not in repr(first)


@pytest.mark.parametrize("value", ["*", "A?1", "A\\B", "", "A" * 17, "A\x01", "Ä"])
def test_asks_for_no_more(value: str, tmp_path: Path) -> None:
    with pytest.raises(IntakeError, match="line 3"):
        rows(tmp_path, f"accession,modality\nA1,\n{value},CT\n")


def test_asks_for_no_more_than_one_patient_by_an_issuer_alone(tmp_path: Path) -> None:
    with pytest.raises(IntakeError, match="line 2"):
        rows(tmp_path, "patient,issuer\n,HOSPITAL\n")


@pytest.mark.parametrize(
    "text",
    [
        "", "accession\n", "A1\nA2\n", "accession,patient\nA1,P1\n", "accession,issuer\nA1,H\n",
        "accession,accession\n1,2\n", "modality\nCT\n", "accession\nCANARY,1\n", 'accession\n"CANARY\n',
        "accession,modality\nCANARY,C T\n", "accession,from\nCANARY,2024-13-01\n", "accession,from\nCANARY,yesterday\n",
        "accession,from,to\nCANARY,2024-02-01,2024-01-01\n",
    ],
)  # fmt: skip
def test_no_content_in_messages(text: str, tmp_path: Path) -> None:
    with pytest.raises(IntakeError) as caught:
        rows(tmp_path, text)
    assert "CANARY" not in str(caught.value)
    assert caught.value.__cause__ is None


ANSWER = {"StudyInstanceUID": "1.2", "AccessionNumber": "A1", "PatientID": "P1", "StudyDate": "20240115"}


def test_only_what_was_asked() -> None:
    other = {**ANSWER, "StudyInstanceUID": "1.3", "AccessionNumber": "A2", "PatientID": "P2", "StudyDate": "20250115"}
    answers = [ANSWER, other, ANSWER, {**ANSWER, "StudyInstanceUID": "1.2/../3"}]
    assert wanted_studies(Row(2, accession="A1"), answers) == ["1.2"]
    assert wanted_studies(Row(2, patient="P1", begin=date(2024, 1, 15), end=date(2024, 1, 15)), answers) == ["1.2"]
    for row in (Row(2, accession="A9"), Row(2, patient="P1", begin=date(2024, 2, 1))):
        with pytest.raises(Refused) as caught:
            wanted_studies(row, answers)
        assert caught.value.reason is Reason.OTHERS
    with pytest.raises(Refused) as caught:
        wanted_studies(Row(2, accession="A1"), [])
    assert caught.value.reason is Reason.NOT_FOUND


def test_only_what_was_asked_of_the_issuer() -> None:
    row = Row(2, patient="P1", issuer="H")
    told = {**ANSWER, "IssuerOfPatientID": "H"}
    assert wanted_studies(row, [told, {**told, "StudyInstanceUID": "1.3", "IssuerOfPatientID": "X"}]) == ["1.2"]
    with pytest.raises(Refused) as caught:
        wanted_studies(row, [told, ANSWER])
    assert caught.value.reason is Reason.NO_ISSUER
