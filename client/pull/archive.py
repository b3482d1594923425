"""What a pull asks of an archive, whatever its protocol. Out of scope: the protocols (dimse.py, web.py)."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Protocol, final

from client.pull.asked import Row
from client.pull.delivery import Delivery

_UID = re.compile(r"[0-9]+(\.[0-9]+)*")
MAX_UID = 64
MAX_ANSWERS = 100_000
"""Answers to one query."""


class Reason(StrEnum):
    """Why something that was asked for is not here."""

    NOT_FOUND = "not-found"
    OTHERS = "other-studies"
    NO_ISSUER = "no-issuer"
    QUERY = "query-refused"
    NOT_LISTED = "not-listed"
    NOT_SENT = "not-sent"
    CUT = "connection-lost"
    DESTINATION = "unknown-destination"
    NOT_ASKED = "not-asked-for"
    NOT_DICOM = "not-dicom"
    TOO_LARGE = "too-large"


ADVICE: dict[Reason, str] = {
    Reason.NOT_FOUND: "the PACS has nothing for this line: check the list, and what our account may see",
    Reason.OTHERS: "the PACS answered with studies that were not asked for, which were left: it ignores this key",
    Reason.NO_ISSUER: "the PACS does not tell who issued its patient ids: leave issuer out if it has one issuer",
    Reason.QUERY: "the PACS does not answer this query as the standard says",
    Reason.NOT_LISTED: "the PACS names less than it has, also when asked again: look into its log; run again",
    Reason.NOT_SENT: "the PACS did not send all: look into its log; run again",
    Reason.CUT: "the connection broke off: run again",
    Reason.DESTINATION: "the PACS does not know where to send",
    Reason.NOT_ASKED: "what came is not what was asked for, and was thrown away: tell the PACS's vendor",
    Reason.NOT_DICOM: "what came is not DICOM, and was thrown away",
    Reason.TOO_LARGE: "larger than max_file_bytes of pacs.toml",
}


@final
@dataclass(frozen=True)
class Series:
    """One series at the archive. Its repr shows the line of the list only."""

    row: Row
    study_uid: str = field(repr=False)
    uid: str = field(repr=False)
    modality: str
    stated: int | None
    """How many instances the archive says it has, at least 1; None: it does not say."""


@final
@dataclass(frozen=True)
class Instance:
    """One instance at the archive; `sop_class` is empty where the archive does not tell."""

    uid: str = field(repr=False)
    sop_class: str = ""


class Refused(Exception):
    """The archive cannot give what a line or a series asks for; the pull goes on with the next."""

    def __init__(self, reason: Reason, detail: str = "") -> None:
        """Take the reason, and what the person can do beyond it."""
        super().__init__(reason)
        self.reason, self.detail = reason, detail


class Archive(Protocol):
    """An archive within one pull.

    All methods raise `PacsError` where the archive is out of reach or refuses us, and `Refused` where it cannot give
    this one thing.
    """

    def echo(self) -> str:
        """Ask whether it answers us, and return what it said."""
        ...

    def find_studies(self, row: Row) -> list[str]:
        """Return the UIDs of the studies that a line of the list asks for."""
        ...

    def find_series(self, row: Row, study_uid: str) -> list[Series]:
        """Return all series of a study, of whatever modality; one without a valid UID has an empty one."""
        ...

    def find_instances(self, series: Series) -> list[Instance]:
        """Return the instances of a series."""
        ...

    def fetch(self, series: Series, missing: Sequence[Instance], delivery: Delivery) -> None:
        """Bring instances of a series to their delivery."""
        ...

    def close(self) -> None:
        """End all connections."""
        ...


def is_uid(text: str) -> bool:
    """Return whether a text is a DICOM UID; leading zeros, which real archives have, are let through (PS3.5 9.1)."""
    return len(text) <= MAX_UID and _UID.fullmatch(text) is not None


def read_series(row: Row, study_uid: str, answers: Iterable[Mapping[str, str]]) -> list[Series]:
    """Return series as an archive's answers name them, once each; those without a UID, which is left empty, too.

    Args:
        row: The line of the list.
        study_uid: The study.
        answers: Attributes of each series by keyword, empty where the archive does not tell.

    Raises:
        Refused: None is there, which a study cannot be without.
    """
    found: dict[tuple[str, str], Series] = {}
    for answer in answers:
        count, modality = answer["NumberOfSeriesRelatedInstances"], answer["Modality"]
        uid = answer["SeriesInstanceUID"] if is_uid(answer["SeriesInstanceUID"]) else ""
        stated = int(count) if count.isdecimal() and len(count) < 8 else 0
        found.setdefault((uid, "" if uid else modality), Series(row, study_uid, uid, modality, stated or None))
    if not found:
        raise Refused(Reason.NOT_LISTED, "it names no series of a study")
    return list(found.values())


def wanted_studies(row: Row, answers: Sequence[dict[str, str]]) -> list[str]:
    """Return the UIDs of those studies that a line asks for; an archive that ignores a key answers with others.

    Args:
        row: The line.
        answers: Attributes of each study by keyword, empty where the archive does not tell.

    Raises:
        Refused: None is there, or none is what was asked for.

    Guarantees:
        - only_what_was_asked: A study with another accession number, patient id, issuer or day is never returned.
    """
    if row.issuer and any(not answer.get("IssuerOfPatientID") for answer in answers):
        raise Refused(Reason.NO_ISSUER)
    found = [answer["StudyInstanceUID"] for answer in answers if _matches(row, answer)]
    if not found:
        raise Refused(Reason.OTHERS if answers else Reason.NOT_FOUND)
    return list(dict.fromkeys(found))


def _matches(row: Row, answer: dict[str, str]) -> bool:
    keys = {"AccessionNumber": row.accession, "PatientID": row.patient, "IssuerOfPatientID": row.issuer}
    same = all(answer.get(key, "") == value for key, value in keys.items() if value)
    day = answer.get("StudyDate", "").replace(".", "").replace("-", "")
    early = row.begin is not None and day < row.begin.strftime("%Y%m%d")
    late = row.end is not None and (not day or day > row.end.strftime("%Y%m%d"))
    return same and not early and not late and is_uid(answer.get("StudyInstanceUID", ""))
