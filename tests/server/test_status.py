"""What `status` says of sites and runs, from what the link and the run folders hold."""

import io
import json
import os
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from rich.console import Console

from common.config_text import build_config, to_toml
from common.files import write_atomic
from common.lock import alone
from server import status
from server.consortium import Consortium
from server.control import KILLED, UNHEARD, NodeStatus, RunStatus
from server.declared import keep_declared
from server.handshake import all_refuse
from server.records import Failed, RoundRecord, SiteRelease, read_records, write_records
from server.run_folder import RunFolder
from server.status import SHOWN_RUNS, RunStanding, SiteStanding, stand, without_process
from server.status_text import failure, how_it_ended, tables

STARTED = "2026-11-27T07:00:00+00:00"
BEGUN_S = 1_795_762_800.0  # the same
NODES = [NodeStatus("st-anne", 1, True, "now"), NodeStatus("st-mary", 2, False, "2026-11-27T06:30:00.123456+00:00")]
RELEASE = SiteRelease(100, 1.5, 0.1, 1, 5.6, 10.0, "ab")
NEW = NodeStatus("st-new", 3, False, "")


def run_of(folder: Path, status: str = "running", outcome: str = "", details: str = "") -> RunStatus:
    return RunStatus(3697077156631750793, status, outcome, details, folder, STARTED)


def make_folder(path: Path, rounds: int, of: int = 6, sites: tuple[str, ...] = ("st-anne", "st-mary")) -> RunFolder:
    """Make a run folder after some rounds; st-mary is late in every second."""
    path.mkdir(parents=True, exist_ok=True)
    folder = RunFolder(path, "")
    config = build_config({}, {"federation.rounds": of, "image.classes": ("a",)})
    write_atomic(path / "config.toml", to_toml(config).encode())
    write_atomic(path / "run.json", b"{}")
    records = []
    for number in range(rounds):
        late = {"st-mary": "timeout"} if number % 2 and "st-mary" in sites else {}
        spent = {name: SiteRelease(100, 1.5, 0.1, 1, 2.0625 + number, 10.0, "ab", 4.0) for name in sites}
        there = {name: release for name, release in spent.items() if name not in late}
        records.append(
            RoundRecord(number, there, late, None, None, 0.1, 30.0, len(there) * 2_000_000, 6_000_000, 2, 80)
        )
    write_records(folder.metrics, records)
    return folder


@pytest.fixture
def home(tmp_path: Path) -> Path:
    (tmp_path / "run-0001").mkdir()
    return tmp_path


def test_sites_show_rounds_joined_what_they_spent_and_their_last_answer(home: Path) -> None:
    folder = make_folder(home / "run-0001", 4)
    sites, _ = stand([*NODES, NEW], [run_of(folder.path)], BEGUN_S)
    assert sites == [
        SiteStanding("st-anne", 1, True, "now", 4, 4, 5.0625, 10.0, "in"),
        SiteStanding("st-mary", 2, False, NODES[1].last_seen, 2, 4, 4.0625, 10.0, "timeout"),
        SiteStanding("st-new", 3, False, "", 0, 4, None, None, ""),
    ]


def test_what_a_site_spent_is_known_from_an_earlier_run(home: Path) -> None:
    make_folder(home / "run-0001", 4)
    for name in ("run-0002", "run-0003"):
        (home / name).mkdir()
    make_folder(home / "run-0002", 1, sites=("st-anne",))
    runs = [run_of(home / name) for name in ("run-0003", "run-0002", "run-0001")]  # the newest has no round yet
    sites, _ = stand(NODES, runs, BEGUN_S)
    assert [(site.rounds_joined, site.rounds, site.epsilon_spent) for site in sites] == [(1, 1, 2.0625), (0, 1, 4.0625)]


def test_what_was_spent_in_a_failed_round_is_shown(home: Path) -> None:
    """A run that ended in its first round has no record: the site was charged all the same."""
    folder = make_folder(home / "run-0001", 0)
    assert stand(NODES, [run_of(folder.path)], BEGUN_S)[0][0].epsilon_spent is None
    keep_declared(folder.declared)(
        Failed(RoundRecord(0, {"st-anne": RELEASE}, {"st-mary": "over-budget"}, None, None, 0.0, 1.0, 0), 2, 1, 3)
    )
    sites, _ = stand(NODES, [run_of(folder.path, "finished", "failed")], BEGUN_S)
    assert [(site.epsilon_spent, site.epsilon_allowed) for site in sites] == [(5.6, 10.0), (None, None)]


def test_what_a_site_spent_follows_time_and_not_the_order_of_runs(home: Path) -> None:
    """A run of a release that kept no times counts as of its first submission: each resume writes its records anew."""
    older, newer = make_folder(home / "run-0001", 1).path, make_folder(home / "run-0002", 3).path
    for path, at_s in ((older, BEGUN_S + 5), (newer, BEGUN_S)):
        os.utime(path / "metrics.jsonl", (at_s, at_s))
    first = replace(run_of(older), run_id=1, started="2026-11-27T06:00:00+00:00")
    resumed = replace(run_of(older), run_id=3, started="2026-11-27T07:30:00+00:00")
    runs = [resumed, run_of(newer), first]
    assert {site.epsilon_spent for site in stand(NODES, runs, BEGUN_S)[0]} == {4.0625}
    write_atomic(older / "declared.json", json.dumps({"st-anne": _declared(4.5, BEGUN_S + 9)}).encode())
    for told in (runs, runs[1:]):  # resumed last or submitted last
        sites, _ = stand(NODES, told, BEGUN_S)
        assert [site.epsilon_spent for site in sites] == [4.5, 4.0625]


def test_each_file_is_read_once(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = [run_of(make_folder(home / f"run-{number:04d}", 2).path) for number in range(SHOWN_RUNS + 2)]
    read: list[Path] = []

    def reading(path: Path) -> list[RoundRecord]:
        read.append(path)
        return read_records(path)

    monkeypatch.setattr(status, "read_records", reading)
    stand(NODES, [*runs, *runs], BEGUN_S)
    assert sorted(read) == [run.folder / "metrics.jsonl" for run in runs]


def _declared(spent: float, at: float) -> dict[str, object]:
    return {"round": 7, "release": asdict(replace(RELEASE, epsilon_spent=spent)), "at": at}


def test_a_run_shows_its_round_and_the_time_left(home: Path) -> None:
    folder = make_folder(home / "run-0001", 4)
    now = folder.metrics.stat().st_mtime + 10
    _, (run,) = stand(NODES, [run_of(folder.path)], now)
    assert run.seconds_left is not None
    assert (run.round, run.rounds, round(run.seconds_left), run.state) == (3, 6, 3 * 30 - 10, "running")
    assert (run.download_bytes, run.upload_bytes) == (3_000_000, 2_000_000)
    _, (late,) = stand(NODES, [run_of(folder.path)], now + 1000)  # the round takes longer than any before
    assert late.seconds_left == 2 * 30
    _, (over,) = stand(NODES, [run_of(folder.path, "finished", "failed", "why")], now)
    assert (over.seconds_left, over.state) == (None, "failed")


def test_a_run_without_rounds_or_folder_is_shown(home: Path) -> None:
    runs = [run_of(home / "run-0001"), run_of(home / "gone", "finished", "failed")]
    write_atomic(home / "run-0001" / "metrics.jsonl", b"not a record\n")
    sites, (first, second) = stand(NODES, runs, BEGUN_S)
    assert (first.round, first.rounds, second.state) == (None, None, "failed")
    assert sites[0].rounds == 0


def test_a_stop_that_came_after_the_results_shows_a_complete_run(home: Path) -> None:
    folder = make_folder(home / "run-0001", 7)
    stopped = run_of(folder.path, "finished", "stopped")
    assert stand(NODES, [stopped], BEGUN_S)[1][0].state == "stopped"
    write_atomic(folder.path / "report.html", b"")
    assert stand(NODES, [stopped], BEGUN_S)[1][0].state == "completed"


@pytest.mark.parametrize("width", [80, 120])
def test_tables_fit(home: Path, width: int) -> None:
    folder = make_folder(home / "run-0001", 4, of=2000)
    now = folder.metrics.stat().st_mtime + 10
    sites, runs = stand([*NODES, NEW], [run_of(folder.path)], now)
    stream = io.StringIO()
    console = Console(file=stream, width=width)
    for part in tables(sites, runs, now, Path("/srv/hub")):
        console.print(part)
    lines = [line.split("  ") for line in stream.getvalue().splitlines()]
    rows = [[cell.strip() for cell in cells if cell.strip()] for cells in lines]
    assert ["st-anne", "yes", "now", "4/4", "5.07 of 10", "in"] in rows
    assert ["st-new", "no", "never", "0/4", "-", "-"] in rows
    assert [row[:4] for row in rows if row[:1] == ["run-0001"]] == [["run-0001", "running", "3/2000", "16 h 38 min"]]
    assert "3697077156631750793" not in stream.getvalue()  # one name
    assert "run-0001: each site and round 3.00 MB down, 2.00 MB up" in stream.getvalue()
    print(stream.getvalue())


def standing(run: RunStatus, dead: tuple[int, ...] = ()) -> RunStanding:
    return stand([], [run], BEGUN_S, dead)[1][0]


def test_how_a_run_ended_is_said_with_what_to_do(home: Path) -> None:
    folder = make_folder(home / "runs" / "run-0001", 4).path
    again = f"To go on: fedmedgan-coordinator resume {home} run-0001"
    stopped = how_it_ended(standing(run_of(folder, "finished", "stopped")), home)
    assert stopped == f"run-0001 was stopped after round 3 of 6. {again}"
    why = "ServerApp failed with exception: Too few sites."
    failed = how_it_ended(standing(run_of(folder, "finished", "failed", why)), home)
    assert failed == f"run-0001 failed after round 3 of 6: Too few sites. Log: {home}/logs/executor.log. {again}"
    gone = how_it_ended(standing(run_of(home / "gone", "finished", "stopped")), home)
    assert gone.startswith("gone was stopped before its first round.")
    assert gone.endswith(f"resume {home} {home}/gone")


def test_a_run_that_all_refuse_is_not_to_be_resumed_as_it_is(home: Path) -> None:
    folder = make_folder(home / "runs" / "run-0001", 0).path
    details = f"ServerApp failed with exception: {all_refuse({'a': 'over-budget', 'b': 'no-data'})}"
    said = how_it_ended(standing(run_of(folder, "finished", "failed", details)), home)
    assert "To go on" not in said
    assert "over-budget: the site's budget does not pay for it" in said
    assert "no-data: it has imported nothing" in said
    assert "policy:" not in said
    assert "\n" not in said


def test_a_resumed_run_is_one_row_with_its_newest_state(home: Path) -> None:
    folder = make_folder(home / "run-0001", 4).path
    write_atomic(folder / "run.json", b'{"version": 1, "run_id": "c89152efa8927228"}')
    ended = replace(run_of(folder, "finished", "stopped"), run_id=1, started="2026-11-27T06:00:00+00:00")
    (run,) = stand(NODES, [run_of(folder), ended], BEGUN_S)[1]
    assert (run.run, run.run_id, run.link_run, run.state) == (
        "run-0001",
        "c89152efa8927228",
        3697077156631750793,
        "running",
    )
    assert run.started == ended.started
    second = replace(run_of(folder, "finished", "failed", "Another run is at work"), run_id=2)
    assert stand(NODES, [second, run_of(folder), ended], BEGUN_S)[1][0].state == "running"


def test_a_run_whose_process_is_gone_is_interrupted(home: Path) -> None:
    consortium, run = Consortium(home), run_of(make_folder(home / "runs" / "run-0001", 4).path)
    assert without_process(consortium, [run]) == set()  # nobody has taken it yet
    with alone(consortium.run_lock(run.run_id), "run"):
        assert without_process(consortium, [run]) == set()
    assert without_process(consortium, [run]) == {run.run_id}
    assert without_process(consortium, [replace(run, status="finished")]) == set()
    assert standing(run).state == "running"
    write_atomic(RunFolder(run.folder, "").now, b"round 4: 0 of 2 sites answered\n")
    assert standing(run).now == "round 4: 0 of 2 sites answered"
    found = standing(run, (run.run_id,))
    assert (found.state, found.now, found.seconds_left) == ("interrupted", "", None)
    assert how_it_ended(found, home).endswith(f"To go on: fedmedgan-coordinator resume {home} run-0001")
    for details, known in ((KILLED, "its process was killed."), (UNHEARD, "heard nothing of its process")):
        found = standing(run_of(run.folder, "finished", "failed", details))
        assert found.state == "interrupted"
        assert known in how_it_ended(found, home)
        assert ("killed" in how_it_ended(found, home)) == (details == KILLED)


def test_rounds_given_up_are_told(home: Path) -> None:
    folder = make_folder(home / "run-0001", 4)
    records = read_records(folder.metrics)
    write_records(folder.metrics, [*records[:2], replace(records[2], sites={}, lost=True), records[3]])
    sites, (run,) = stand(NODES, [run_of(folder.path)], BEGUN_S)
    assert run.given_up == (2,)
    written = io.StringIO()
    Console(file=written, width=200).print(*tables(sites, [run], BEGUN_S, home))
    assert "run-0001: given up, as their answers were lost: rounds 2; their charges stay spent" in written.getvalue()


@pytest.mark.parametrize(
    ("details", "code"), [("storage: No checkpoint is whole", 7), ("Round 3 heard 0 sites", 8), ("", 8)]
)
def test_a_run_that_failed_for_its_files_is_a_storage_matter(home: Path, details: str, code: int) -> None:
    folder = make_folder(home / "run-0001", 4)
    said = f"ServerApp failed with exception: {details}" if details else ""
    _, (run,) = stand([], [run_of(folder.path, "finished", "failed", said)], BEGUN_S)
    error = failure(run, home)
    assert (error.exit_code, str(error)) == (code, how_it_ended(run, home))


def test_a_revoked_site_is_kept(home: Path) -> None:
    folder = make_folder(home / "run-0001", 4)
    sites, runs = stand(NODES[:1], [run_of(folder.path)], BEGUN_S, revoked=["st-mary"])
    assert [(site.name, site.revoked, site.epsilon_spent) for site in sites] == [
        ("st-anne", False, 5.0625),
        ("st-mary", True, 4.0625),
    ]
    written = io.StringIO()
    Console(file=written, width=200).print(*tables(sites, runs, BEGUN_S, home))
    (line,) = [line for line in written.getvalue().splitlines() if line.startswith("st-mary")]
    assert line.split()[1] == "revoked"
