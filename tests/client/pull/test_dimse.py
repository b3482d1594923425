"""DIMSE against a real Orthanc: echo, wrong names and ports, and a PACS that goes away."""

from collections.abc import Iterator
from datetime import UTC, datetime, time, timedelta
from pathlib import Path

import pytest
from pydantic import TypeAdapter
from pydicom.dataset import Dataset
from pynetdicom.association import Association

from client.pull import run
from client.pull.asked import Row
from client.pull.dimse import DimseArchive
from client.pull.inbox import Inbox
from client.pull.pace import Pace
from client.pull.run import Pull
from client.pull.sources import DimseSource, Source
from client.pull.state import State
from client.pull.web import WebArchive
from common.errors import ConfigError, ExitCode, PacsError
from tests.real_pacs import NEEDS_ORTHANC, Orthanc, instance_uids, make_files

pytestmark = [
    NEEDS_ORTHANC,
    pytest.mark.slow,
    # pynetdicom leaves the socket of a refused connection to the garbage collector
    pytest.mark.filterwarnings("ignore:Exception ignored in. <socket.socket:pytest.PytestUnraisableExceptionWarning"),
]

KEY = bytes(32)


@pytest.fixture(autouse=True)
def _no_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "RETRIES_S", (0.0, 0.0))


def source_of(values: dict[str, object]) -> DimseSource:
    found = TypeAdapter[Source](Source).validate_python(values)
    assert isinstance(found, DimseSource)
    return found


@pytest.fixture
def opened(tmp_path: Path) -> Iterator[object]:
    made: list[DimseArchive] = []

    def open_(values: dict[str, object]) -> tuple[Pull, list[str], Inbox]:
        source = source_of(values)
        inbox, said = Inbox(tmp_path / "inbox", KEY, source), []
        made.append(DimseArchive(source, inbox))
        state = State(tmp_path / "state" / "pacs.json")
        return Pull(made[-1], inbox, state, Pace(), said.append, wait=lambda _: None), said, inbox

    yield open_
    for archive in made:
        archive.close()


def echo(values: dict[str, object], tmp_path: Path) -> str:
    source = source_of(values)
    archive = DimseArchive(source, Inbox(tmp_path / "inbox", KEY, source))
    try:
        return archive.echo()
    finally:
        archive.close()


def test_echo(orthanc: Orthanc, tmp_path: Path) -> None:
    assert echo(orthanc.dimse(), tmp_path).startswith("C-ECHO answered by ORTHANC")
    assert f"we can listen on 127.0.0.1, port {orthanc.ours}" in echo(orthanc.move(), tmp_path)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"our_aet": "STRANGER"}, "Register"),
        ({"aet": "OTHER"}, "does not call itself OTHER"),
        ({"port": 1}, "out of reach: Connection refused"),
        ({"host": "pacs.invalid"}, "does not resolve"),
    ],
)
def test_echo_says_what_to_mend(changes: dict[str, object], said: str, orthanc: Orthanc, tmp_path: Path) -> None:
    with pytest.raises(PacsError, match=said) as caught:
        echo({**orthanc.dimse(), **changes}, tmp_path)
    assert caught.value.exit_code == ExitCode.PACS


def test_echo_sees_a_port_that_is_taken_and_an_address_that_is_not_ours(orthanc: Orthanc, tmp_path: Path) -> None:
    for changes in ({"listen_port": orthanc.dicom}, {"listen": "192.0.2.1"}):
        with pytest.raises(ConfigError, match="Could not listen"):
            echo({**orthanc.move(), **changes}, tmp_path)


def test_pacs_that_cannot_reach_us_is_told_with_what_to_register(orthanc: Orthanc, opened, tmp_path: Path) -> None:
    pull, said, _ = opened({**orthanc.move(), "our_aet": "WANDERER"})  # registered with a port where nobody listens
    pull.fetch(pull.resolve([Row(2, accession="CANARY-ACC-2")]))
    pull.tell_failures()
    assert pull.tally.exit_code(fetched=True) == ExitCode.PACS
    assert f"register our AE title WANDERER, host and port 127.0.0.1, port {orthanc.ours}" in said[-1]


def test_destination_that_the_pacs_does_not_know(orthanc: Orthanc, opened) -> None:
    pull, said, _ = opened({**orthanc.move(), "our_aet": "STRANGER"})
    pull.fetch(pull.resolve([Row(2, accession="CANARY-ACC-2")]))
    pull.tell_failures()
    assert "register our AE title STRANGER, host and port" in said[-1]
    assert pull.tally.missing == 2


def test_destination_unknown_as_the_standard_says_it(orthanc: Orthanc, opened, monkeypatch: pytest.MonkeyPatch) -> None:
    """Orthanc says 0xC000 where PS3.4 table C.4-2 has 0xA801."""
    status = Dataset()
    status.Status = 0xA801
    monkeypatch.setattr(Association, "send_c_move", lambda *_: iter([(status, None)]))
    pull, said, _ = opened(orthanc.move())
    pull.fetch(pull.resolve([Row(2, accession="CANARY-ACC-2")]))
    pull.tell_failures()
    assert said[-1].startswith("unknown-destination: the PACS does not know where to send; register our AE title FED")


@pytest.mark.parametrize("method", ["dimse", "move"])
def test_too_large_an_instance_costs_itself_alone(method: str, orthanc: Orthanc, opened) -> None:
    pull, said, inbox = opened({**getattr(orthanc, method)(), "max_file_bytes": 20_000})  # CT has 39 kB, MR 9 kB
    pull.fetch(pull.resolve([Row(2, accession="CANARY-ACC-1")]))
    pull.tell_failures()
    assert all(inbox.holds(uid) for uid in instance_uids("CANARY-ACC-1", "MR"))
    assert not any(inbox.holds(uid) for uid in instance_uids("CANARY-ACC-1", "CT"))
    assert said[-1] == "too-large: larger than max_file_bytes of pacs.toml (line 2, 6 instances)"
    assert [path.name for path in inbox.incoming.iterdir()] == [inbox.identity]


def test_whole_series_are_not_asked_for_again(orthanc: Orthanc, opened, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [Row(2, accession="CANARY-ACC-1")]
    pull, _, _ = opened(orthanc.dimse())
    pull.fetch(pull.resolve(rows))
    again, _, _ = opened(orthanc.dimse())
    monkeypatch.setattr(DimseArchive, "fetch", lambda *_: pytest.fail("asked again"))
    monkeypatch.setattr(DimseArchive, "find_instances", lambda *_: pytest.fail("asked again"))
    again.fetch(again.resolve(rows))
    assert (again.tally.were_here, again.tally.received, again.tally.missing) == (9, 0, 0)


def test_pacs_goes_away_in_the_middle_and_comes_back(opened, tmp_path: Path) -> None:
    pacs = Orthanc(tmp_path / "pacs")
    pacs.start()
    try:
        pacs.put(make_files(tmp_path))
        rows = [Row(2, accession="CANARY-ACC-2"), Row(3, accession="CANARY-ACC-3")]
        pull, _, inbox = opened(pacs.dimse(per_minute=6000))
        kept = inbox.keep

        def keep(part: Path, uid: str) -> None:
            kept(part, uid)
            if inbox.files == 7:
                pacs.stop()

        inbox.keep = keep
        with pytest.raises(PacsError, match="out of reach"):
            pull.fetch(pull.resolve(rows))
        assert 7 <= pull.tally.received < 26
        pacs.start()
        again, _, _ = opened(pacs.dimse())
        again.fetch(again.resolve(rows))
        assert (again.tally.were_here + again.tally.received, again.tally.missing) == (26, 0)
        assert again.tally.were_here >= 7
    finally:
        pacs.stop()


def test_hours_are_kept(orthanc: Orthanc, tmp_path: Path) -> None:
    """With a clock by argument: nothing is fetched before the window opens."""
    source = source_of(orthanc.dimse())
    inbox, said = Inbox(tmp_path / "inbox", KEY, source), []
    clock = [datetime(2024, 3, 1, 19, 58, tzinfo=UTC)]
    seen: list[int] = []

    def sleep(seconds: float) -> None:
        seen.append(inbox.files)
        clock[0] += timedelta(seconds=seconds)

    pace = Pace((time(20), time(6)), None, now=lambda: clock[0], sleep=sleep)
    archive = DimseArchive(source, inbox)
    try:
        pull = Pull(archive, inbox, State(tmp_path / "state.json"), pace, said.append)
        pull.fetch(pull.resolve([Row(2, accession="CANARY-ACC-2")]))
    finally:
        archive.close()
    assert said[0] == "outside the hours of this source: waiting until 20:00"
    assert seen == [0, 0]
    assert inbox.files == 2


def test_web_refuses_a_wrong_password(orthanc: Orthanc, tmp_path: Path) -> None:
    values = orthanc.web(tmp_path)
    (tmp_path / "password").write_text("canary-wrong\n")
    archive = WebArchive(TypeAdapter[Source](Source).validate_python(values))
    with pytest.raises(PacsError, match=r"refuses us \(HTTP 401\)") as caught:
        archive.echo()
    assert "canary" not in str(caught.value)
    archive.close()
