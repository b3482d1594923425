"""Where the federation stands: what the link says of nodes and runs, and what the run folders say of the rounds.

What a site spent is what it declared with its newest release, in whatever run. Out of scope: asking the link
(server/control).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import final

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from common.config import Config
from common.config_text import build_config
from common.errors import FedmedganError
from server.control import FINISHED, NodeStatus, RunStatus
from server.pace import duration, megabytes, round_up, seconds_left
from server.records import RoundRecord, read_records
from server.run_folder import RunFolder, is_complete, stored_tree

COMPLETED = "completed"
SHOWN_RUNS = 10


@final
@dataclass(frozen=True)
class SiteStanding:
    """A site, as the link and the rounds know it.

    Attributes:
        name: Its name.
        node_id: Its node's number.
        online: Whether it is connected.
        last_seen: "now", ISO 8601, or empty if it never connected.
        rounds_joined: In how many rounds of the newest run that has any it gave a release.
        rounds: How many rounds that run has made.
        epsilon_spent: As it declared with its newest release; None if it never gave one.
        epsilon_allowed: The same, by its policy.
        last: What it did in the newest round: "in", a code, or empty where it was not asked.
    """

    name: str
    node_id: int
    online: bool
    last_seen: str
    rounds_joined: int
    rounds: int
    epsilon_spent: float | None
    epsilon_allowed: float | None
    last: str


@final
@dataclass(frozen=True)
class RunStanding:
    """A run, as the link and its folder know it.

    Attributes:
        run_id: The link's number of it.
        state: pending, starting, running, completed, failed or stopped.
        details: Why it failed.
        folder: Its run folder.
        started: When it was submitted, ISO 8601.
        round: Its newest whole round; None before the first.
        rounds: Its last; None where the folder does not say.
        seconds_left: What the rest will take by the pace of the newest rounds; None where nothing tells it.
        download_bytes: What the newest round sent to a site.
        upload_bytes: What a site sent back.
    """

    run_id: int
    state: str
    details: str
    folder: Path
    started: str
    round: int | None
    rounds: int | None
    seconds_left: float | None
    download_bytes: int
    upload_bytes: int


def stand(
    nodes: Sequence[NodeStatus], runs: Sequence[RunStatus], now: float
) -> tuple[list[SiteStanding], list[RunStanding]]:
    """Put together what link and folders say.

    Args:
        nodes: From `control.list_nodes`.
        runs: From `control.list_runs`, the newest first.
        now: Seconds since 1970; what the round under way took already counts as done.

    Returns:
        All sites, and the newest runs.
    """
    folders = list(dict.fromkeys(run.folder for run in runs))[:SHOWN_RUNS]
    records = {folder: _records(folder) for folder in folders}
    newest = next((found for found in records.values() if found), [])
    sites = [_site(node, newest, list(records.values())) for node in nodes]
    return sites, [_run(run, records[run.folder], now) for run in runs[:SHOWN_RUNS] if run.folder in records]


def tables(
    sites: Sequence[SiteStanding], runs: Sequence[RunStanding], now: float, title: str
) -> Iterator[RenderableType]:
    """Write sites, runs, and a line for each run under way, so that 80 columns hold them."""
    yield Text(title, "bold")
    of_sites = _table("site", "connected", "last seen", "rounds", "epsilon spent", "last round")
    for site in sites:
        online = Text("yes", "green") if site.online else Text("no", "red")
        of_sites.add_row(
            Text(site.name),
            online,
            _ago(site.last_seen, now),
            f"{site.rounds_joined}/{site.rounds}" if site.rounds else "-",
            "-" if site.epsilon_spent is None else f"{round_up(site.epsilon_spent)} of {site.epsilon_allowed:g}",
            Text(site.last or "-"),
        )
    yield of_sites
    yield Text("")
    of_runs = _table("folder", "state", "round", "ETA", "begun", "run")
    for run in runs:
        made = "-" if run.rounds is None else f"{'-' if run.round is None else run.round}/{run.rounds}"
        eta = "-" if run.seconds_left is None else duration(run.seconds_left)
        of_runs.add_row(Text(run.folder.name), run.state, made, eta, _ago(run.started, now), str(run.run_id))
    yield of_runs
    for run in runs:
        if run.download_bytes or run.upload_bytes:
            traffic = f"{megabytes(run.download_bytes)} down, {megabytes(run.upload_bytes)} up"
            yield Text(f"{run.folder.name}: each site and round {traffic}")


def _table(*columns: str) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim", show_edge=False)
    for column in columns:
        table.add_column(column, overflow="fold")
    return table


def how_it_ended(run: RunStatus, home: Path) -> str:
    """Say how a run ended that did not complete, and what to do."""
    records, total = _records(run.folder), _rounds(run.folder)
    made = f"after round {records[-1].round} of {total}" if records else "before its first round"
    again = f"To go on: fedmedgan-coordinator resume {home} {run.folder}"
    if run.outcome == "stopped":
        return f"Run {run.run_id} was stopped {made}. {again}"
    why = run.details.removeprefix("ServerApp failed with exception: ") or "the link does not say why"
    return f"Run {run.run_id} failed {made}: {why.rstrip('.')}. Log: {home / 'logs' / 'executor.log'}. {again}"


def _site(node: NodeStatus, newest: Sequence[RoundRecord], runs: Sequence[Sequence[RoundRecord]]) -> SiteStanding:
    declared = next((one.sites[node.name] for run in runs for one in reversed(run) if node.name in one.sites), None)
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


def _run(run: RunStatus, records: Sequence[RoundRecord], now: float) -> RunStanding:
    config = _config(run.folder)
    rounds = None if config is None else config.federation.rounds
    left_s = None
    if config is not None and run.status != FINISHED:
        whole_s = seconds_left(records, config.refinements, config.federation.rounds)
        since_s = max(0.0, now - _written(run.folder))
        left_s = max(1.0, whole_s - min(since_s, records[-1].seconds)) if whole_s else None
    down, up = records[-1].bytes_a_site if records else (0, 0)
    state = COMPLETED if run.status == FINISHED and is_complete(run.folder) else run.outcome or run.status
    number = records[-1].round if records else None
    return RunStanding(run.run_id, state, run.details, run.folder, run.started, number, rounds, left_s, down, up)


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


def _rounds(folder: Path) -> int | str:
    config = _config(folder)
    return "?" if config is None else config.federation.rounds


def _written(folder: Path) -> float:
    try:
        return RunFolder(folder, "").metrics.stat().st_mtime
    except OSError:
        return 0.0


def _ago(moment: str, now: float) -> str:
    """Write how long ago a moment was."""
    if moment in ("", "now"):
        return moment or "never"
    try:
        then = datetime.fromisoformat(moment)
    except ValueError:
        return moment
    since_s = max(0.0, now - (then if then.tzinfo else then.replace(tzinfo=UTC)).timestamp())
    for unit, length_s in (("days", 86400), ("h", 3600), ("min", 60)):
        if since_s >= 2 * length_s:
            return f"{since_s / length_s:.0f} {unit} ago"
    return f"{since_s:.0f} s ago"
