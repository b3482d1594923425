"""What `status` prints of sites and runs, and how a run ended, in words and with what to do.

Out of scope: what is known of them (server/status).
"""

import shlex
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from common.errors import FederationError, FedmedganError, StorageError
from common.wording import duration
from server.control import KILLED, UNHEARD
from server.handshake import is_refused
from server.pace import amount, round_up
from server.run_folder import STORAGE_MATTER
from server.status import INTERRUPTED, RunStanding, SiteStanding

STOPPED, FAILED = "stopped", "failed"
UNKNOWN = "unknown"
"""What only the link knows, while it does not answer."""
_CONNECTED = {True: Text("yes", "green"), False: Text("no", "red"), None: Text(UNKNOWN)}
_UNHEARD = "the link heard nothing of its process for a minute; executor.log and link.log say more"


def tables(
    sites: Sequence[SiteStanding], runs: Sequence[RunStanding], now: float, home: Path
) -> Iterator[RenderableType]:
    """Write sites, runs, and a line for each run that has something to say, so that 80 columns hold the tables."""
    yield Text(str(home), "bold")
    yield (
        _of_sites(sites, now) if sites else Text(f"no site is enrolled: {_command('enrol', home)} NAME.enrolment.json")
    )
    yield Text("")
    yield _of_runs(runs, now) if runs else Text(f"no run yet: {_command('run', home)} CONFIG")
    for place, run in enumerate(runs):
        if run.now:
            yield Text(f"{run.run}: {run.now}")
        if run.download_bytes or run.upload_bytes:
            traffic = f"{amount(run.download_bytes)} down, {amount(run.upload_bytes)} up"
            yield Text(f"{run.run}: each site and round {traffic}")
        if run.given_up:
            rounds = ", ".join(map(str, run.given_up))
            yield Text(f"{run.run}: given up, as their answers were lost: rounds {rounds}; their charges stay spent")
        if run.state == INTERRUPTED or (place == 0 and run.state in (STOPPED, FAILED)):
            yield Text(how_it_ended(run, home))


def failure(run: RunStanding, home: Path) -> FedmedganError:
    """Return the error of a run that did not complete: a storage matter, or one of the federation."""
    storage = run.state == FAILED and _why(run).startswith(STORAGE_MATTER)
    return (StorageError if storage else FederationError)(how_it_ended(run, home))


def _why(run: RunStanding) -> str:
    return run.details.removeprefix("ServerApp failed with exception: ")


def how_it_ended(run: RunStanding, home: Path) -> str:
    """Say how a run ended that did not complete, and what to do."""
    made = "before its first round" if run.round is None else f"after round {run.round} of {run.rounds}"
    named = run.run if run.folder.parent == home / "runs" else str(run.folder)
    again = f"To go on: {_command('resume', home)} {shlex.quote(named)}"
    if run.state == STOPPED:
        return f"{run.run} was stopped {made}. {again}"
    if run.state == INTERRUPTED:
        return f"{run.run} was interrupted {made}: {_UNHEARD if run.details == UNHEARD else KILLED}. {again}"
    why = _why(run) or "the link does not say why"
    log = f"Log: {home / 'logs' / 'executor.log'}."
    return f"{run.run} failed {made}: {why.rstrip('.')}. {log}{'' if is_refused(why) else f' {again}'}"


def _of_sites(sites: Sequence[SiteStanding], now: float) -> Table:
    table = _table("site", "connected", "last seen", "rounds", "epsilon spent", "last round")
    for site in sites:
        table.add_row(
            Text(site.name),
            Text("revoked") if site.revoked else _CONNECTED[site.online],
            "-" if site.revoked else UNKNOWN if site.last_seen is None else _ago(site.last_seen, now),
            f"{site.rounds_joined}/{site.rounds}" if site.rounds else "-",
            "-" if site.epsilon_spent is None else f"{round_up(site.epsilon_spent)} of {site.epsilon_allowed:g}",
            Text(site.last or "-"),
        )
    return table


def _of_runs(runs: Sequence[RunStanding], now: float) -> Table:
    table = _table("run", "state", "round", "ETA", "begun")
    for run in runs:
        made = "-" if run.rounds is None else f"{'-' if run.round is None else run.round}/{run.rounds}"
        eta = "-" if run.seconds_left is None else duration(run.seconds_left)
        table.add_row(Text(run.run), run.state, made, eta, _ago(run.started, now))
    return table


def _table(*columns: str) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim", show_edge=False)
    for column in columns:
        table.add_column(column, overflow="fold")
    return table


def _command(name: str, home: Path) -> str:
    return f"fedmedgan-coordinator {name} {shlex.quote(str(home))}"


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
