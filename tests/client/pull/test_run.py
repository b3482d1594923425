"""The pull's loop, with an archive that fails as it is told to."""

import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest

from client.pull.archive import ADVICE, Instance, Reason, Refused, Series
from client.pull.asked import Row
from client.pull.delivery import Delivery
from client.pull.inbox import Inbox
from client.pull.pace import Pace
from client.pull.run import MAX_VAIN, Pull
from client.pull.sources import Bounds
from client.pull.state import Count, State
from common.errors import ConfigError, ExitCode, PacsError
from tests.client.pull.test_inbox import part_of


class Fake:
    """An archive with two instances in each of the series that a line's accession spells: `AB` has series A and B."""

    def __init__(self, inbox: Inbox, *, states: bool = True) -> None:
        self.inbox, self.states = inbox, states
        self.fails: list[BaseException] = []
        self.lacks: set[str] = set()
        self.fetched: list[str] = []
        self.held: tuple[int, ...] = (1, 2)
        self.names: list[tuple[int, ...]] = []
        """What it names of the series that it is asked about next, instead of what it holds."""
        self.nameless: list[Series] = []
        self.refuses: list[PacsError] = []
        self.breaks: list[PacsError] = []
        """What it fails with instead of naming instances."""
        self.asked = 0
        """How often for instances."""

    def echo(self) -> str:
        return "here"

    def find_studies(self, row: Row) -> list[str]:
        if row.accession == "0":
            raise Refused(Reason.NOT_FOUND)
        return ["1.2"]

    def find_series(self, row: Row, study_uid: str) -> list[Series]:
        if self.refuses:
            raise self.refuses.pop(0)
        count = len(self.held) if self.states else None
        return [Series(row, study_uid, f"1.3.{ord(name)}", "CR", count) for name in row.accession] + self.nameless

    def find_instances(self, series: Series) -> list[Instance]:
        self.asked += 1
        if self.breaks:
            raise self.breaks.pop(0)
        held = self.names.pop(0) if self.names else self.held
        return [Instance(f"{series.uid}.{number}") for number in held]

    def fetch(self, series: Series, missing: Sequence[Instance], delivery: Delivery) -> None:
        self.fetched.append(f"{chr(int(series.uid.split('.')[2]))}{len(missing)}")
        for instance in missing:
            if instance.uid not in self.lacks:
                delivery.take(part_of(self.inbox, "1.2", series.uid, instance.uid), instance.uid)
            if delivery.stopped is not None:
                raise delivery.stopped
            if self.fails:
                raise self.fails.pop(0)

    def close(self) -> None:
        pass


def pull_of(folder: Path, *, states: bool = True, **bounds: int) -> tuple[Pull, Fake, list[str]]:
    inbox, said = Inbox(folder / "inbox", bytes(32), Bounds(free_bytes=0, **bounds)), []
    fake = Fake(inbox, states=states)
    return Pull(fake, inbox, State(folder / "state.json"), Pace(), said.append, wait=lambda _: None), fake, said


ROWS = (Row(2, accession="AB"), Row(3, accession="0"), Row(4, accession="BC"))


def test_one_line_stops_nothing(tmp_path: Path) -> None:
    pull, _, said = pull_of(tmp_path)
    found = pull.resolve(ROWS)
    assert (pull.tally.series, pull.tally.expected) == (3, 6)  # B once
    assert pull.tally.exit_code(fetched=False) == ExitCode.DATA
    pull.describe(ROWS, found)
    assert said == [
        "line 2: 2 series, 4 instances, 0 of them here",
        "line 3: 0 series, 0 instances, 0 of them here",
        "line 4: 1 series, 2 instances, 0 of them here",
    ]
    pull.fetch(found)
    pull.tell_failures()
    assert said[3:] == [f"not-found: {ADVICE[Reason.NOT_FOUND]} (line 3)"]
    assert pull.tally.exit_code(fetched=True) == ExitCode.DATA


@pytest.mark.parametrize("states", [True, False])
def test_resumes(states: bool, tmp_path: Path) -> None:
    pull, fake, said = pull_of(tmp_path, states=states)
    fake.fails = [PacsError("away")] * 3
    fake.lacks = {"1.3.66.1", "1.3.66.2"}
    with pytest.raises(PacsError):
        pull.fetch(pull.resolve([Row(2, accession="BA")]))
    assert fake.fetched == ["B2"] * 3
    assert said == ["away Trying again in 5 s.", "away Trying again in 30 s."]
    for expected in (["B2", "A2"], []):
        again, fake, _ = pull_of(tmp_path, states=states)
        again.fetch(again.resolve([Row(2, accession="BA")]))
        assert fake.fetched == expected
        assert again.tally.missing == 0
    assert again.tally.were_here == 4


def test_resumes_within_a_series(tmp_path: Path) -> None:
    pull, fake, said = pull_of(tmp_path)
    fake.fails = [Refused(Reason.CUT)]
    pull.fetch(pull.resolve([Row(2, accession="A")]))
    assert fake.fetched == ["A2", "A1"]
    assert said == ["the connection broke off; trying again in 5 s"]
    assert (pull.tally.received, pull.tally.missing) == (2, 0)


def test_one_series_stops_nothing(tmp_path: Path) -> None:
    pull, fake, said = pull_of(tmp_path)
    fake.fails = [Refused(Reason.DESTINATION, "register us")]
    fake.lacks = {"1.3.65.1", "1.3.66.2"}
    pull.fetch(pull.resolve([Row(2, accession="ABC")]))
    pull.tell_failures()
    pull.tell_counts()
    assert fake.fetched == ["A2", "B2", "C2"]
    assert said[0] == f"not-sent: {ADVICE[Reason.NOT_SENT]} (line 2, 1 instance)"
    assert said[1] == f"unknown-destination: {ADVICE[Reason.DESTINATION]}; register us (line 2, 2 instances)"
    assert said[2].startswith("expected 6 instances of 3 series; 0 were here, 3 received")
    assert pull.tally.exit_code(fetched=True) == ExitCode.PACS


def test_bound_ends_the_pull_and_the_next_one_goes_on(tmp_path: Path) -> None:
    pull, _, _ = pull_of(tmp_path, max_files=3)
    with pytest.raises(ConfigError, match="max_files=3"):
        pull.fetch(pull.resolve([Row(2, accession="ABC")]))
    assert pull.tally.received == 3
    again, fake, _ = pull_of(tmp_path, max_files=3)
    again.fetch(again.resolve([Row(2, accession="ABC")]))
    assert fake.fetched == ["B1", "C2"]


def test_a_series_is_not_asked_for_beyond_the_bounds(tmp_path: Path) -> None:
    pull, fake, _ = pull_of(tmp_path, max_files=2)
    with pytest.raises(ConfigError, match="max_files=2"):
        pull.fetch(pull.resolve([Row(2, accession="ABC")]))
    assert fake.fetched == ["A2"]


def test_counts_what_is_here(tmp_path: Path) -> None:
    first, *_ = pull_of(tmp_path)
    first.fetch(first.resolve([Row(2, accession="AB")]))
    again, fake, said = pull_of(tmp_path)
    fake.fails = [KeyboardInterrupt()]
    with pytest.raises(KeyboardInterrupt):
        again.fetch(again.resolve([Row(2, accession="CAB")]))
    again.tell_counts()
    assert said[-1].startswith("expected 6 instances of 3 series; 4 were here, 1 received")
    assert said[-1].endswith("1 missing")


def test_progress_says_how_much_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("client.pull.run.SAY_EVERY_S", 0.0)
    pull, _, said = pull_of(tmp_path)
    pull.fetch(pull.resolve([Row(2, accession="A")]))
    assert said[0].startswith("1 of 2 instances, ")
    assert said[0].endswith(" s left")


def test_every_reason_has_advice() -> None:
    assert set(ADVICE) == set(Reason)


A = (Row(2, accession="A"),)


def test_instances_that_the_archive_does_not_name_are_missing(tmp_path: Path) -> None:
    pull, fake, said = pull_of(tmp_path)
    fake.names = [(1,), (1,)]
    pull.fetch(pull.resolve(A))
    pull.tell_failures()
    pull.tell_counts()
    assert said[0] == "not-listed; asking again in 5 s"
    assert said[1] == f"not-listed: {ADVICE[Reason.NOT_LISTED]} (line 2, 1 instance)"
    assert said[2].startswith("expected 2 instances of 1 series; 0 were here, 1 received")
    assert said[2].endswith("1 missing")
    assert pull.tally.exit_code(fetched=True) == ExitCode.PACS
    again, fake, _ = pull_of(tmp_path)
    again.fetch(again.resolve(A))
    assert fake.fetched == ["A1"]
    assert (again.tally.missing, again.tally.exit_code(fetched=True)) == (0, ExitCode.OK)


def test_instances_that_one_of_two_answers_names_are_fetched(tmp_path: Path) -> None:
    pull, fake, _ = pull_of(tmp_path)
    fake.names = [(1,), (2,)]
    pull.fetch(pull.resolve(A))
    assert (pull.tally.received, pull.tally.missing) == (2, 0)
    assert pull.tally.exit_code(fetched=True) == ExitCode.OK


def test_an_empty_answer_is_never_whole(tmp_path: Path) -> None:
    pull, fake, _ = pull_of(tmp_path, states=False)
    fake.names = [(), ()]
    pull.fetch(pull.resolve(A))
    assert [failure.reason for failure in pull.tally.failures] == [Reason.NOT_LISTED]
    assert pull.tally.exit_code(fetched=True) == ExitCode.PACS
    again, *_ = pull_of(tmp_path, states=False)
    again.fetch(again.resolve(A))
    assert (again.tally.received, again.tally.missing) == (2, 0)
    state = State(tmp_path / "old.json")
    state.put("series", Count(expected=0, received=0))
    assert not state.is_whole("series", 0)


@pytest.mark.parametrize("way", ["another", "moved away", "made anew"])
def test_what_stands_in_one_inbox_is_not_taken_for_here_in_another(way: str, tmp_path: Path) -> None:
    first, *_ = pull_of(tmp_path)
    first.fetch(first.resolve(A))
    match way:
        case "moved away":
            (tmp_path / "inbox").rename(tmp_path / "full")
        case "made anew":
            shutil.rmtree(tmp_path / "inbox")
        case _:
            (tmp_path / "other").mkdir()
            shutil.copy(tmp_path / "state.json", tmp_path / "other")
    again, fake, said = pull_of(tmp_path / "other" if way == "another" else tmp_path)
    found = again.resolve(A)
    again.describe(A, found)
    again.fetch(found)
    assert said == ["line 2: 1 series, 2 instances, 0 of them here"]
    assert fake.fetched == ["A2"]
    assert (again.tally.were_here, again.tally.received, again.tally.missing) == (0, 2, 0)


def test_an_inbox_that_is_named_again_is_known_again(tmp_path: Path) -> None:
    """A wrong folder in pacs.toml for one night does not bring what was imported and deleted before."""
    first, *_ = pull_of(tmp_path)
    first.fetch(first.resolve(A))
    (tmp_path / "inbox").rename(tmp_path / "right")
    wrong, *_ = pull_of(tmp_path)
    wrong.fetch(wrong.resolve(A))
    shutil.rmtree(tmp_path / "inbox")
    (tmp_path / "right").rename(tmp_path / "inbox")
    again, fake, _ = pull_of(tmp_path)
    again.fetch(again.resolve(A))
    assert fake.fetched == []
    assert again.tally.were_here == 2


@pytest.mark.parametrize("folders", [True, False])
def test_files_that_are_deleted_after_an_import_do_not_come_again(folders: bool, tmp_path: Path) -> None:
    first, *_ = pull_of(tmp_path)
    first.fetch(first.resolve(A))
    for path in (tmp_path / "inbox").glob("*"):  # as the shell's `*`, which leaves .incoming
        if folders and not path.name.startswith("."):
            shutil.rmtree(path)
    for path in (tmp_path / "inbox").rglob("*"):
        if path.is_file():
            path.unlink()
    again, fake, _ = pull_of(tmp_path)
    again.fetch(again.resolve(A))
    assert fake.fetched == []
    assert (again.tally.were_here, again.tally.missing) == (2, 0)


def test_a_state_that_names_no_inbox_says_nothing_of_this_one(tmp_path: Path) -> None:
    """As those that were written before inboxes were told apart: what stands here is seen by its files."""
    pull, fake, _ = pull_of(tmp_path)
    fake.inbox.keep(part_of(fake.inbox, "1.2", "1.3.65", "1.3.65.1"), "1.3.65.1")
    state = State(tmp_path / "state.json")
    state.put(fake.inbox.hashed("series", "1.3.65"), Count(expected=2, received=2))
    state.save()
    pull, fake, _ = pull_of(tmp_path)
    pull.fetch(pull.resolve(A))
    assert fake.fetched == ["A1"]


@pytest.mark.parametrize("states", [True, False])
def test_counted_anew(states: bool, tmp_path: Path) -> None:
    first, *_ = pull_of(tmp_path, states=states)
    first.fetch(first.resolve(A))
    again, fake, _ = pull_of(tmp_path, states=states)
    fake.held = (1, 2, 3)
    again.fetch(again.resolve(A))
    assert fake.fetched == ["A1"]
    assert (again.tally.were_here, again.tally.received, again.tally.missing) == (2, 1, 0)


def test_a_query_that_fails_is_asked_again_and_then_counted(tmp_path: Path) -> None:
    pull, fake, _ = pull_of(tmp_path)
    fake.refuses = [Refused(Reason.QUERY)]
    pull.fetch(pull.resolve(A))
    assert (pull.tally.received, pull.tally.failures) == (2, [])
    pull, fake, said = pull_of(tmp_path)
    fake.refuses = [Refused(Reason.NOT_LISTED, "no series")] * 20
    assert pull.resolve([Row(line, accession="A") for line in range(2, 8)]) == []
    assert [failure.row.line for failure in pull.tally.failures] == [2, 3, 4, 5, 6, 7]
    assert len(said) == MAX_VAIN  # not five seconds for each line of a long list
    assert pull.tally.exit_code(fetched=False) == ExitCode.PACS


def test_no_line_in_silence(tmp_path: Path) -> None:
    """The study is there, and has no series of the modality that the line asks for."""
    pull, _, said = pull_of(tmp_path)
    found = pull.resolve([Row(2, accession="A", modality="MR"), Row(3, accession="B", modality="CR")])
    assert len(found) == 1
    pull.tell_failures()
    assert said == [f"not-found: {ADVICE[Reason.NOT_FOUND]} (line 2)"]
    assert pull.tally.exit_code(fetched=True) == ExitCode.PACS  # nothing is fetched yet
    pull.fetch(found)
    assert pull.tally.exit_code(fetched=True) == ExitCode.DATA


@pytest.mark.parametrize(("modality", "code"), [("", ExitCode.PACS), ("PR", ExitCode.PACS), ("CR", ExitCode.OK)])
def test_a_series_without_a_uid_is_counted_where_it_is_asked_for(modality: str, code: ExitCode, tmp_path: Path) -> None:
    pull, fake, said = pull_of(tmp_path)
    row = Row(2, accession="AB", modality=modality)
    fake.nameless = [Series(row, "1.2", "", "PR", None)] * 2
    pull.fetch(pull.resolve([row]))
    pull.tell_failures()
    assert fake.fetched == ([] if modality == "PR" else ["A2", "B2"])
    told = f"not-listed: {ADVICE[Reason.NOT_LISTED]}; it names a series without a UID (line 2)"
    assert said == ([told] if code else [])
    assert pull.tally.exit_code(fetched=True) == code


def waits_of(pull: Pull, monkeypatch: pytest.MonkeyPatch) -> list[float]:
    waits: list[float] = []
    monkeypatch.setattr(pull, "_wait", waits.append)
    return waits


@pytest.mark.parametrize("states", [True, False])
def test_a_connection_that_breaks_off_is_tried_again_twice_wherever_it_does(
    states: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One event, one sentence; as docs/pull.md says."""
    pull, fake, said = pull_of(tmp_path, states=states)
    waits = waits_of(pull, monkeypatch)
    fake.refuses, fake.breaks = [Refused(Reason.CUT)] * 2, [Refused(Reason.CUT)] * 3
    pull.fetch(pull.resolve([Row(2, accession="AB")]))
    assert waits == [5.0, 30.0] * 2
    assert said == [f"the connection broke off; trying again in {wait:.0f} s" for wait in waits]
    assert fake.asked == (4 if states else 3 + 1 + 1)
    assert [failure.reason for failure in pull.tally.failures] == [Reason.CUT]


def test_one_broken_series_changes_nothing_for_the_others(tmp_path: Path) -> None:
    pull, fake, _ = pull_of(tmp_path)
    fake.breaks = [Refused(Reason.CUT)] * 3
    fake.names = [(1,), (1, 2)]
    pull.fetch(pull.resolve([Row(2, accession="AB")]))
    assert fake.asked == 3 + 2
    assert (pull.tally.received, pull.tally.missing) == (2, 2)


def test_answers_in_vain_count_in_a_row(tmp_path: Path) -> None:
    """A whole one between them shows that the archive does not always answer so."""
    pull, fake, _ = pull_of(tmp_path)
    accession = "ABCDEFGHIJKL"
    found = pull.resolve([Row(2, accession=accession)])
    fake.names = [(1,), (1,), (1, 2)] * 6
    pull.fetch(found)
    assert fake.asked == 3 * len(accession) // 2
    again, other, _ = pull_of(tmp_path / "again")
    other.names = [(3,)] * 99
    again.fetch(again.resolve([Row(2, accession=accession)]))
    assert other.asked == len(accession) + MAX_VAIN


def test_an_archive_that_always_breaks_off_is_soon_asked_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pull, fake, _ = pull_of(tmp_path)
    waits = waits_of(pull, monkeypatch)
    fake.refuses = [Refused(Reason.CUT)] * 99
    assert pull.resolve([Row(line, accession="A") for line in range(2, 12)]) == []
    assert len(waits) == 2 * MAX_VAIN  # not half a minute for each line of a long list


def test_an_outage_is_waited_for_and_an_archive_that_never_answered_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pull, fake, said = pull_of(tmp_path)
    fake.refuses = [PacsError("away")]
    assert len(pull.resolve(A)) == 1
    assert said == ["away Trying again in 5 s."]
    never, fake, said = pull_of(tmp_path)

    def away(row: Row) -> list[str]:
        raise PacsError("away")

    monkeypatch.setattr(fake, "find_studies", away)
    with pytest.raises(PacsError, match="away"):  # its settings may be wrong: that is said at once
        never.resolve(A)
    assert said == []
