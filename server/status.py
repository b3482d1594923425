"""Where the federation stands: what the link says of nodes and runs, and what the run folders say of the rounds.

What a site spent is what it declared with its newest release, in whatever run and in a failed round too. Out of scope:
asking the link (server/control), the words (server/status_text).
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path
from typing import final

from common.config import Config
from common.config_text import build_config
from common.errors import FedmedganError
from common.lock import is_held
from server.consortium import Consortium
from server.control import FINISHED, KILLED, UNHEARD, NodeStatus, RunStatus
from server.declared import Declared, read_declared
from server.pace import seconds_left
from server.records import RoundRecord, read_records
from server.run_folder import RunFolder, is_complete, read_now, site_run_id, stored_tree

COMPLETED, INTERRUPTED, UNFINISHED = "completed", "interrupted", "unfinished"
SHOWN_RUNS = 10


@final
@dataclass(frozen=True)
class SiteStanding:
    """A site, as the link and the rounds know it.

    Attributes:
        name: Its name.
        node_id: Its node's number.
        online: Whether it is connected; None while the link does not answer.
        last_seen: "now", ISO 8601, empty if it never connected, or None while the link does not answer.
        rounds_joined: In how many rounds of the newest run that has any it gave a release.
        rounds: How many rounds that run has made.
        epsilon_spent: As it declared with its newest release; None if it never gave one.
        epsilon_allowed: The same, by its policy.
        last: What it did in the newest round: "in", a code, or empty where it was not asked.
        revoked: Whether it was shut out; the link knows nothing of it any more.
    """

    name: str
    node_id: int
    online: bool | None
    last_seen: str | None
    rounds_joined: int
    rounds: int
    epsilon_spent: float | None
    epsilon_allowed: float | None
    last: str
    revoked: bool = False


@final
@dataclass(frozen=True)
class RunStanding:
    """A run, as the link and its folder know it.

    Attributes:
        run: Its name here: that of its folder.
        run_id: Its name in the ledgers and journals of the sites; empty before it has begun.
        link_run: The link's number of it, in the logs of link, executor and relays.
        state: pending, starting, running, completed, failed, stopped, or interrupted: its process is gone.
        now: What it does at this moment, in words; empty where nothing tells.
        details: Why it failed.
        folder: Its run folder.
        started: When it was submitted first, ISO 8601.
        round: Its newest whole round; None before the first.
        rounds: Its last; None where the folder does not say.
        seconds_left: What the rest will take by the pace of the newest rounds; None where nothing tells it.
        download_bytes: What the newest round sent to a site.
        upload_bytes: What a site sent back.
        given_up: The rounds that were given up, since their answers were lost.
    """

    run: str
    run_id: str
    link_run: int
    state: str
    now: str
    details: str
    folder: Path
    started: str
    round: int | None
    rounds: int | None
    seconds_left: float | None
    download_bytes: int
    upload_bytes: int
    given_up: tuple[int, ...] = ()


def stand(
    nodes: Sequence[NodeStatus],
    runs: Sequence[RunStatus],
    now: float,
    dead: Iterable[int] = (),
    revoked: Iterable[str] = (),
) -> tuple[list[SiteStanding], list[RunStanding]]:
    """Put together what link and folders say.

    Args:
        nodes: From `control.list_nodes`.
        runs: From `control.list_runs`, the newest first.
        now: Seconds since 1970; what the round under way took already counts as done.
        dead: From `without_process`.
        revoked: The sites that were shut out.

    Returns:
        All sites, and the newest runs: one for each folder, however often it was resumed.
    """
    gone = frozenset(dead)
    by_folder = _by_folder(runs)
    records = {folder: _records(folder) for folder in by_folder}
    newest = next((found for found in records.values() if found), [])
    declared = _declared(by_folder, records)
    sites = [_site(node, newest, declared) for node in nodes]
    gone_out = sorted(set(revoked) - {node.name for node in nodes})
    sites += [replace(_site(NodeStatus(name, 0, False, ""), newest, declared), revoked=True) for name in gone_out]
    shown = islice(by_folder.items(), SHOWN_RUNS)
    return sites, [_run(submitted, records[folder], now, gone) for folder, submitted in shown]


def without_process(consortium: Consortium, runs: Sequence[RunStatus]) -> set[int]:
    """Return the link's numbers of the runs that it believes to be under way, but whose process is gone."""
    locks = {run.run_id: consortium.run_lock(run.run_id) for run in runs if run.status != FINISHED}
    return {number for number, lock in locks.items() if lock.exists() and not is_held(lock)}


def runs_of_files(consortium: Consortium) -> list[RunStatus]:
    """Return the runs whose folders stand in a home, the newest first, for who asks while the link does not answer."""
    folders = sorted(path.parent for path in consortium.runs.glob("*/config.toml"))
    return [
        RunStatus(number, FINISHED, UNFINISHED, "", folder, _made(folder / "config.toml"))
        for number, folder in reversed(list(enumerate(folders)))
    ]


def _made(path: Path) -> str:
    return datetime.fromtimestamp(path.stat().st_mtime, UTC).isoformat()


def under_way(runs: Sequence[RunStatus], dead: Iterable[int]) -> list[RunStatus]:
    """Return the runs that have begun, or will, and whose process is not gone."""
    gone = frozenset(dead)
    return [run for run in runs if run.status != FINISHED and run.run_id not in gone]


def _by_folder(runs: Sequence[RunStatus]) -> dict[Path, list[RunStatus]]:
    """Return the submissions of each run, the newest first."""
    submitted: dict[Path, list[RunStatus]] = {}
    for run in runs:
        submitted.setdefault(run.folder, []).append(run)
    return submitted


def _declared(
    by_folder: Mapping[Path, Sequence[RunStatus]], records: Mapping[Path, Sequence[RoundRecord]]
) -> dict[str, Declared]:
    """Return what each site declared last, in the order of time over all runs."""
    newest: dict[str, Declared] = {}
    for folder, submitted in by_folder.items():
        of_run = _of_records(records[folder], _seconds(submitted[-1].started))
        for name, one in (of_run | read_declared(RunFolder(folder, "").declared)).items():
            if name not in newest or one.at > newest[name].at:
                newest[name] = one
    return newest


def _of_records(records: Sequence[RoundRecord], at: float) -> dict[str, Declared]:
    """Return what was declared in the rounds of a run, for a folder of a release that kept nothing else.

    It counts as of the run's submission: records hold no time, and their file is written anew by each resume.
    """
    return {name: Declared(record.round, site, at) for record in records for name, site in record.sites.items()}


def _seconds(moment: str) -> float:
    try:
        return datetime.fromisoformat(moment).timestamp()
    except ValueError:
        return 0.0


def _site(node: NodeStatus, newest: Sequence[RoundRecord], spent: Mapping[str, Declared]) -> SiteStanding:
    declared = spent.get(node.name)
    last = newest[-1] if newest else None
    return SiteStanding(
        name=node.name,
        node_id=node.node_id,
        online=node.online,
        last_seen=node.last_seen,
        rounds_joined=sum(node.name in record.sites for record in newest),
        rounds=len(newest),
        epsilon_spent=None if declared is None else declared.epsilon_spent,
        epsilon_allowed=None if declared is None else declared.epsilon_allowed,
        last="" if last is None else "in" if node.name in last.sites else last.refused.get(node.name, ""),
    )


def _run(
    submitted: Sequence[RunStatus], records: Sequence[RoundRecord], now: float, dead: frozenset[int]
) -> RunStanding:
    alive = (run for run in submitted if run.status != FINISHED and run.run_id not in dead)
    run = next(alive, submitted[0])  # a second attempt at a run that is at work ends at once
    under_way = run.status != FINISHED and run.run_id not in dead
    config = _config(run.folder)
    left_s = None
    if config is not None and under_way:
        whole_s = seconds_left(records, config.refinements, config.federation.rounds)
        since_s = max(0.0, now - _written(run.folder))
        left_s = max(1.0, whole_s - min(since_s, records[-1].seconds)) if whole_s else None
    down, up = records[-1].bytes_a_site if records else (0, 0)
    return RunStanding(
        run=run.name,
        run_id=site_run_id(run.folder),
        link_run=run.run_id,
        state=_state(run, dead),
        now=read_now(run.folder) if under_way else "",
        details=run.details,
        folder=run.folder,
        started=submitted[-1].started,
        round=records[-1].round if records else None,
        rounds=None if config is None else config.federation.rounds,
        seconds_left=left_s,
        download_bytes=down,
        upload_bytes=up,
        given_up=tuple(record.round for record in records if record.lost),
    )


def _state(run: RunStatus, dead: frozenset[int]) -> str:
    if run.status == FINISHED and is_complete(run.folder):
        return COMPLETED
    return INTERRUPTED if run.run_id in dead or run.details in (KILLED, UNHEARD) else run.outcome or run.status


def _records(folder: Path) -> list[RoundRecord]:
    try:
        return read_records(RunFolder(folder, "").metrics)
    except (FedmedganError, OSError):  # a folder that was moved or mended by hand must not hide all others
        return []


def _config(folder: Path) -> Config | None:
    try:
        return build_config(stored_tree(folder))
    except (FedmedganError, OSError):
        return None


def _written(folder: Path) -> float:
    try:
        return RunFolder(folder, "").metrics.stat().st_mtime
    except OSError:
        return 0.0
