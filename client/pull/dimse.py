"""An archive by DIMSE: C-ECHO, C-FIND, C-GET and C-MOVE.

Source: PS3.4 C.4.1 (C-FIND), C.4.2 (C-MOVE), C.4.3 (C-GET), C.6.2 (Study Root); PS3.7 D.3.3.4 (role selection).
"""

import tempfile
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from typing import Final, final

from pydicom.dataset import Dataset
from pynetdicom import StoragePresentationContexts, build_context
from pynetdicom.association import Association
from pynetdicom.presentation import PresentationContext

from client.pull.archive import MAX_ANSWERS, Instance, Reason, Refused, Series, is_uid, read_series, wanted_studies
from client.pull.asked import Row
from client.pull.association import FIND, GET, MOVE, VERIFICATION, associate, end, make_tls, named
from client.pull.delivery import Delivery
from client.pull.inbox import Inbox
from client.pull.sources import DimseSource
from client.pull.storage import SUCCESS, SYNTAXES, Receiver, StorageScp, silence
from common.errors import PacsError

MAX_CLASSES: Final = 7
"""SOP classes of one association: with each syntax in a context of its own they fill the 128 that are allowed."""
MAX_UIDS: Final = 100
"""Instances named in one request."""
_PENDING: Final = (0xFF00, 0xFF01)
_UNKNOWN_DESTINATION: Final = 0xA801


@final
class DimseArchive:
    """A PACS within one pull."""

    def __init__(self, source: DimseSource, inbox: Inbox) -> None:
        """Take the source; nothing is connected yet. Parts of files are written below the inbox."""
        silence()
        tempfile.tempdir = str(inbox.incoming)  # where pynetdicom writes what arrives; this process does nothing else
        self._source = source
        self._tls = make_tls(source, server=False)
        self._receiver = Receiver(source.max_file_bytes, source.timeout_s)
        self._scp: StorageScp | None = None
        self._open: Association | None = None

    def echo(self) -> str:
        """Send a C-ECHO; with C-MOVE, see too that we could listen.

        Raises:
            PacsError: It does not answer, or refuses us.
            ConfigError: We cannot listen.
        """
        with self._connected([build_context(VERIFICATION)]) as association:
            status = association.send_c_echo().get("Status")
        if status != SUCCESS:
            raise PacsError(
                f"{named(self._source)} takes the connection and refuses the C-ECHO. Register our AE title "
                f"{self._source.our_aet} with this machine's address at the PACS, or mend our_aet in pacs.toml."
            )
        said = f"C-ECHO answered by {named(self._source)}, which knows us as {self._source.our_aet}"
        if self._source.method == "move":
            StorageScp(self._source, self._receiver, make_tls(self._source, server=True)).close()
            said += f"; we can listen on {self._here}. Whether the PACS can send there shows with the first pull"
        return said

    def find_studies(self, row: Row) -> list[str]:
        """Return the studies that a line asks for, by C-FIND at study level."""
        query = Dataset()
        query.QueryRetrieveLevel = "STUDY"
        query.StudyInstanceUID = ""
        query.StudyDate = row.dates
        query.AccessionNumber, query.PatientID, query.IssuerOfPatientID = row.accession, row.patient, row.issuer
        keys = ("StudyInstanceUID", "StudyDate", "AccessionNumber", "PatientID", "IssuerOfPatientID")
        return wanted_studies(row, list(self._find(query, keys)))

    def find_series(self, row: Row, study_uid: str) -> list[Series]:
        """Return the series of a study, by C-FIND at series level."""
        query = Dataset()
        query.QueryRetrieveLevel = "SERIES"
        query.StudyInstanceUID, query.SeriesInstanceUID, query.Modality = study_uid, "", ""
        query.NumberOfSeriesRelatedInstances = None
        keys = ("SeriesInstanceUID", "Modality", "NumberOfSeriesRelatedInstances")
        return read_series(row, study_uid, self._find(query, keys))

    def find_instances(self, series: Series) -> list[Instance]:
        """Return the instances of a series, by C-FIND at image level."""
        query = Dataset()
        query.QueryRetrieveLevel = "IMAGE"
        query.StudyInstanceUID, query.SeriesInstanceUID = series.study_uid, series.uid
        query.SOPInstanceUID = query.SOPClassUID = ""
        answers = self._find(query, ("SOPInstanceUID", "SOPClassUID"))
        classes = {one["SOPInstanceUID"]: one["SOPClassUID"] for one in answers if is_uid(one["SOPInstanceUID"])}
        return [Instance(uid, kind if is_uid(kind) else "") for uid, kind in classes.items()]

    def fetch(self, series: Series, missing: Sequence[Instance], delivery: Delivery) -> None:
        """Retrieve instances by C-GET or C-MOVE: the whole series in one request, else those that are missing.

        Raises:
            Refused: The PACS does not send them, or the connection broke off; what came before is kept.
            PacsError: It is out of reach or refuses us.
        """
        retrieve = self._move if self._source.method == "move" else self._get
        wanted, whole = list(missing), series.stated == len(missing)
        self._receiver.delivery = delivery
        try:
            while wanted:
                dropped = len(delivery.too_large)
                try:
                    retrieve(series, wanted, whole, delivery)
                except Refused:
                    if len(delivery.too_large) == dropped:  # else it was we who ended the connection
                        raise
                if delivery.stopped is not None:
                    raise delivery.stopped
                if len(delivery.too_large) == dropped:
                    return
                wanted, whole = [one for one in missing if one.uid in delivery.wanted], False
        finally:
            self._receiver.delivery = None

    def close(self) -> None:
        """End all connections and stop listening."""
        if self._open is not None:
            end(self._open)
            self._open = None
        if self._scp is not None:
            self._scp.close()
            self._scp = None
        tempfile.tempdir = None

    @contextmanager
    def _connected(self, contexts: list[PresentationContext], roles: Sequence[str] = ()) -> Generator[Association]:
        """Yield an association; one that is left by an error is aborted, since the PACS may still be sending."""
        association, done = associate(self._source, self._receiver, self._tls, contexts, roles), False
        try:
            yield association
            done = True
        finally:
            end(association) if done else association.abort()

    @property
    def _here(self) -> str:
        return f"{self._source.listen}, port {self._source.listen_port}"

    def _find(self, query: Dataset, keys: Sequence[str]) -> Iterator[dict[str, str]]:
        if self._open is None or not self._open.is_established:
            self._open = associate(self._source, self._receiver, self._tls, [build_context(FIND)])
        for number, (status, answer) in enumerate(self._open.send_c_find(query, FIND)):
            code = status.get("Status")
            if code == SUCCESS:
                return
            if code in _PENDING and answer is not None and number < MAX_ANSWERS:
                yield {key: _text(answer, key) for key in keys}
                continue
            self._open.abort()
            if code is not None:
                raise Refused(Reason.QUERY, f"C-FIND ended with status 0x{code:04X}")
            break
        raise Refused(Reason.CUT)  # no status says that these are all

    def _get(self, series: Series, missing: Sequence[Instance], whole: bool, delivery: Delivery) -> None:
        classes = sorted({instance.sop_class for instance in missing})
        if "" in classes:
            groups: list[list[str]] = [[]]
        else:
            groups = [classes[at : at + MAX_CLASSES] for at in range(0, len(classes), MAX_CLASSES)]
        for group in groups:
            named = [instance.uid for instance in missing if not group or instance.sop_class in group]
            kinds = group or [str(context.abstract_syntax) for context in StoragePresentationContexts[:120]]
            contexts = [build_context(GET), *_storage_contexts(kinds, together=not group)]
            with self._connected(contexts, roles=kinds) as association:
                for request in _requests(series, named, whole and len(groups) == 1):
                    self._watch(association.send_c_get(request, GET), association, delivery)

    def _move(self, series: Series, missing: Sequence[Instance], whole: bool, delivery: Delivery) -> None:
        if self._scp is None:
            self._scp = StorageScp(self._source, self._receiver, make_tls(self._source, server=True))
        with self._connected([build_context(MOVE)]) as association:
            for request in _requests(series, [instance.uid for instance in missing], whole):
                self._watch(association.send_c_move(request, self._source.our_aet, MOVE), association, delivery)
        if len(delivery.missing) == len(missing) and not delivery.refused and not delivery.too_large:
            raise Refused(Reason.NOT_SENT, f"nothing came: {self._register}")

    @property
    def _register(self) -> str:
        return (
            f"register our AE title {self._source.our_aet}, host and port {self._here} at the PACS, and let it in here"
        )

    def _watch(
        self, answers: Iterator[tuple[Dataset, Dataset | None]], association: Association, delivery: Delivery
    ) -> None:
        for status, _ in answers:
            code = status.get("Status")
            if delivery.stopped is not None:
                association.abort()
                return
            if code is None:
                raise Refused(Reason.CUT)
            if code == _UNKNOWN_DESTINATION:
                raise Refused(Reason.DESTINATION, self._register)


def _requests(series: Series, named: Sequence[str], whole: bool) -> Iterator[Dataset]:
    for at in range(0, 1 if whole else len(named), MAX_UIDS):
        request = Dataset()
        request.StudyInstanceUID, request.SeriesInstanceUID = series.study_uid, series.uid
        request.QueryRetrieveLevel = "SERIES" if whole else "IMAGE"
        if not whole:
            request.SOPInstanceUID = list(named[at : at + MAX_UIDS])
        yield request


def _storage_contexts(kinds: Sequence[str], *, together: bool) -> list[PresentationContext]:
    """Return what we take by C-GET: each syntax by itself where there is room, so that nothing is transcoded."""
    if together:
        return [build_context(kind, list(SYNTAXES)) for kind in kinds]
    return [build_context(kind, syntax) for kind in kinds for syntax in SYNTAXES]


def _text(answer: Dataset, key: str) -> str:
    """Return an attribute as it came: nothing else of the answer is decoded."""
    value = answer.get_item(key).value if key in answer else None
    if isinstance(value, bytes):
        return value.decode("ascii", "replace").strip(" \0")
    return "" if value is None else str(value).strip()
