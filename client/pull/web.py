"""An archive by DICOMweb: QIDO-RS to find, WADO-RS to fetch.

URLs are made from our own root and from UIDs alone: what the archive names as a URL is not followed, nor are redirects.
Source: PS3.18 10.6 (QIDO-RS), 10.4 (WADO-RS), 8.3.4 (paging), F.2 (DICOM JSON).
"""

import json
import ssl
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Final, final

import httpx

from client.pull.archive import MAX_ANSWERS, Instance, Reason, Refused, Series, is_uid, read_series, wanted_studies
from client.pull.asked import Row
from client.pull.delivery import Delivery
from client.pull.multipart import boundary_of, save_part
from client.pull.sources import WebSource, load_secret
from common.errors import ConfigError, PacsError, StorageError

MAX_JSON: Final = 32 << 20
"""Bytes of one page of answers."""
PAGE: Final = 500
ROOM_EVERY: Final = 8 << 20
DICOM: Final = 'multipart/related; type="application/dicom"; transfer-syntax=*'
_TAGS: Final = {
    "StudyInstanceUID": "0020000D",
    "StudyDate": "00080020",
    "AccessionNumber": "00080050",
    "PatientID": "00100020",
    "IssuerOfPatientID": "00100021",
    "SeriesInstanceUID": "0020000E",
    "Modality": "00080060",
    "NumberOfSeriesRelatedInstances": "00201209",
    "SOPInstanceUID": "00080018",
    "SOPClassUID": "00080016",
}
_GONE: Final = (404, 406, 410)
_BUSY: Final = (429, 502, 503, 504)


@final
class WebArchive:
    """A DICOMweb service within one pull."""

    def __init__(self, source: WebSource) -> None:
        """Take the source and read its secret; nothing is connected yet."""
        self._source = source
        secret = load_secret(source.secret_file).get_secret_value() if source.secret_file is not None else ""
        self._client = httpx.Client(
            auth=httpx.BasicAuth(source.user, secret) if source.user is not None else None,
            headers={"Accept-Encoding": "identity"}  # a packed answer may be of any size once unpacked
            | ({"Authorization": f"Bearer {secret}"} if source.token_file is not None else {}),
            verify=_trust(source),
            timeout=httpx.Timeout(source.timeout_s, connect=min(source.timeout_s, 20.0)),
            trust_env=False,  # no proxy and no .netrc of this user's
            follow_redirects=False,  # secrets and identifiers go to this service alone
        )

    def echo(self) -> str:
        """Ask for one study, which every QIDO-RS service answers.

        Raises:
            PacsError: It does not answer, or refuses us.
        """
        try:
            self._page("studies", {"limit": "1"})
        except Refused as error:
            raise PacsError(f"{self._source.url} answers, but not as QIDO-RS: {error.detail}. Mend url.") from None
        return f"QIDO-RS answered by {self._source.url}"

    def find_studies(self, row: Row) -> list[str]:
        """Return the studies that a line asks for, by QIDO-RS."""
        asked = {"AccessionNumber": row.accession, "PatientID": row.patient, "IssuerOfPatientID": row.issuer}
        query = {key: value for key, value in (*asked.items(), ("StudyDate", row.dates)) if value}
        answers = self._find("studies", query, ("StudyInstanceUID", *asked, "StudyDate"))
        return wanted_studies(row, list(answers))

    def find_series(self, row: Row, study_uid: str) -> list[Series]:
        """Return the series of a study, by QIDO-RS."""
        keys = ("SeriesInstanceUID", "Modality", "NumberOfSeriesRelatedInstances")
        return read_series(row, study_uid, self._find(f"studies/{study_uid}/series", {}, keys))

    def find_instances(self, series: Series) -> list[Instance]:
        """Return the instances of a series, by QIDO-RS."""
        path = f"studies/{series.study_uid}/series/{series.uid}/instances"
        answers = self._find(path, {}, ("SOPInstanceUID", "SOPClassUID"))
        return [Instance(one["SOPInstanceUID"], one["SOPClassUID"]) for one in answers if is_uid(one["SOPInstanceUID"])]

    def fetch(self, series: Series, missing: Sequence[Instance], delivery: Delivery) -> None:
        """Retrieve instances by WADO-RS, each by itself, as they are stored.

        Raises:
            Refused: The service does not send one, or the connection broke off; what came before is kept.
            PacsError: It is out of reach or refuses us.
        """
        failed: Refused | None = None
        for instance in missing:
            try:
                self._fetch(
                    f"studies/{series.study_uid}/series/{series.uid}/instances/{instance.uid}", instance, delivery
                )
            except Refused as error:
                if error.reason is Reason.CUT:
                    raise
                failed = error
            if delivery.stopped is not None:
                raise delivery.stopped
        if failed is not None:
            raise failed

    def close(self) -> None:
        """End all connections."""
        self._client.close()

    def _find(self, path: str, query: Mapping[str, str], keys: Sequence[str]) -> Iterator[dict[str, str]]:
        seen: set[str] = set()
        while len(seen) < MAX_ANSWERS:
            paged = {**query, "includefield": ",".join(keys), "limit": str(PAGE), "offset": str(len(seen))}
            page, more = self._page(path, paged)
            answers = [_texts(one, keys) for one in page]
            fresh = {"\\".join(answer.values()): answer for answer in answers}
            yield from (answer for name, answer in fresh.items() if name not in seen)
            before = len(seen)
            seen |= fresh.keys()
            if len(seen) == before or not more:  # a service that knows no offset sends the same page again
                return
        raise Refused(Reason.QUERY, f"it has more than {MAX_ANSWERS} answers")

    def _page(self, path: str, query: Mapping[str, str]) -> tuple[list[Any], bool]:
        """Return a page of answers, and whether there may be more."""
        body = bytearray()
        with self._asked(path, "application/dicom+json", query) as answer:
            for chunk in answer.iter_bytes():
                body += chunk
                if len(body) > MAX_JSON:
                    raise Refused(Reason.QUERY, f"a page of its answers is longer than {MAX_JSON} bytes")
        try:
            page = json.loads(body) if body else []
        except (ValueError, RecursionError):
            raise Refused(Reason.QUERY, "its answer is not JSON") from None
        if not isinstance(page, list):
            raise Refused(Reason.QUERY, "its answer is not a list")
        return page, len(page) >= PAGE or "299" in answer.headers.get("warning", "")

    def _fetch(self, path: str, instance: Instance, delivery: Delivery) -> None:
        part, looked = delivery.inbox.new_part(), 0

        def bounded(written: int) -> None:
            nonlocal looked
            if written > self._source.max_file_bytes:
                delivery.drop(instance.uid)
                raise _TooLarge
            if written - looked > ROOM_EVERY:
                looked = written
                delivery.inbox.require_room(written)

        try:
            with self._asked(path, DICOM) as answer, part.open("wb") as file:
                boundary = boundary_of(answer.headers)
                save_part(answer.iter_bytes(), boundary, file, bounded)
            delivery.take(part, instance.uid)
        except _TooLarge:
            return
        except OSError as error:
            raise StorageError(f"Could not write to the inbox: {error.strerror}. Free space, then run again.") from None
        finally:
            part.unlink(missing_ok=True)

    @contextmanager
    def _asked(self, path: str, accept: str, query: Mapping[str, str] | None = None) -> Generator[httpx.Response]:
        """Yield an answer. What httpx raises is told without the URL of the request, which holds identifiers."""
        url, named = f"{self._source.url.rstrip('/')}/{path}", self._source.url
        try:
            with self._client.stream("GET", url, params=query, headers={"Accept": accept}) as answer:
                self._check(answer)
                yield answer
        except (httpx.ConnectError, httpx.ConnectTimeout, httpx.UnsupportedProtocol) as error:
            reason = str(error) if "CERTIFICATE" in str(error).upper() else type(error).__name__
            raise PacsError(f"{named} is out of reach: {reason}. Mend url or ca, or ask the network.") from None
        except (httpx.HTTPError, httpx.StreamError, httpx.InvalidURL) as error:
            raise Refused(Reason.CUT, type(error).__name__) from None

    def _check(self, answer: httpx.Response) -> None:
        code = answer.status_code
        if code in (200, 204, 206):
            if answer.headers.get("content-encoding", "identity") != "identity":
                raise Refused(Reason.QUERY, "its answer is packed (Content-Encoding), which was not asked for")
            return
        if code in (401, 403):
            raise PacsError(f"{self._source.url} refuses us (HTTP {code}). Mend user and password_file, or token_file.")
        if code in _BUSY:
            raise Refused(Reason.CUT, f"HTTP {code}")
        if code in _GONE or code >= 500:
            raise Refused(Reason.NOT_SENT, f"HTTP {code}")
        raise Refused(Reason.QUERY, f"HTTP {code}")


class _TooLarge(Exception):
    """An instance is longer than a file may be."""


def _texts(answer: Any, keys: Sequence[str]) -> dict[str, str]:
    return {key: _text(answer, _TAGS[key]) for key in keys}


def _text(answer: Any, tag: str) -> str:
    """Return the first value of an attribute of DICOM JSON; empty for whatever is not one."""
    element = answer.get(tag) if isinstance(answer, dict) else None
    values = element.get("Value") if isinstance(element, dict) else None
    first = values[0] if isinstance(values, list) and values else None
    return str(first).strip() if isinstance(first, str | int) else ""


def _trust(source: WebSource) -> ssl.SSLContext:
    try:
        return ssl.create_default_context(cafile=source.ca)
    except OSError as error:
        raise ConfigError(f"ca of pacs.toml does not load: {error.strerror or error}.") from None
