"""The ServerApp: the round loop. Ours, because Flower's waits for ever, dies of one bad reply and cannot resume.

Read `federate` top to bottom; everything else here connects it to Flower, to a terminal and to the run folder.
"""

import os
import signal
import threading
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, final

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from common.config import Config
from common.config_text import build_config, read_config
from common.errors import ConfigError, FederationError, StorageError
from common.flower_run import HERE, run_path
from common.lock import alone
from common.sheets import save_sheet
from server import checkpoint, display
from server.consortium import load_consortium
from server.deadline import round_deadline_s
from server.declared import keep_declared
from server.exchange import Link, open_link
from server.handshake import Met, advice
from server.lost import check_lost, give_up
from server.now import Event, open_note
from server.quorum import ending, settle
from server.records import (
    Failed,
    Progress,
    RoundRecord,
    append_record,
    is_landmark,
    read_records,
    write_records,
)
from server.registered import Registered, read_registered
from server.results import SIMULATED_SECRETS, SITES_SECRETS, write_results
from server.roster import gather
from server.rounds import Outcome, averaged_pair, train
from server.run_folder import STORAGE_MATTER, RunFolder, open_run
from server.secure_sum import train_together
from server.start import begin
from server.warmup_round import warm_up

ATTEMPTS_A_ROUND = 3
RETRY_AFTER_S = 2.0


@final
@dataclass(frozen=True)
class Job:
    """A run that is about to start.

    Attributes:
        config: Its configuration.
        folder: Its folder.
        stop: The wish to stop after the round under way.
        until: The round after which to stop, so that the state there can be looked at; None for the last.
        registered: Reads anew whom to believe as which node; None within one machine.
    """

    config: Config
    folder: RunFolder
    stop: threading.Event = field(default_factory=threading.Event)
    until: int | None = None
    registered: Callable[[], Registered] | None = None


def federate(grid: Grid, job: Job) -> Iterator[Event]:
    """Run the federation from where its folder stands, and yield what happens.

    Args:
        grid: Flower's grid: in this process, on Ray, or over the network.
        job: Configuration, folder and the flag that asks for a stop after the round.

    Yields:
        What new sites say, progress inside a round, and a record after each round, once it is real.

    Raises:
        FederationError: Too few sites connected, or none was heard in three attempts at a round; or too many rounds in
            a row were given up.
        PolicyRefusal: Too many sites refuse the run for good before anything was learned.
        StorageError: A key cannot be read; or a checkpoint could not be written, and the one before stands.
    """
    config, folder = job.config, job.folder
    state = checkpoint.load_latest(folder.checkpoints)
    records = _records_of(folder, state)
    resumed = len(records)
    link, met = open_link(grid, job.registered), Met(folder, config, compact=job.registered is None)
    (link, roster), attempts = (yield from gather(link, config, folder.run_id, None)), 0
    last = config.federation.rounds if job.until is None else job.until
    while state is None or (state.round < last and not job.stop.is_set()):
        check_lost(records[resumed:])
        number = 0 if state is None else state.round + 1
        link, roster = yield from gather(link, config, folder.run_id, roster, begins=True)  # 1 who
        quorum = yield from settle(link, met, roster, state, records)
        if quorum.over is not None:
            yield quorum.over
            return
        roster, link = quorum.roster, _with_deadline(quorum.link, config, records, attempts)
        members = roster.members
        before = begin(folder, config, members) if state is None else state
        if state is None or number <= config.refinements:
            events = warm_up(link, config, members, before, folder)  # 2 a lens out, sums in, fitted
        else:
            one_round = train if config.train.algorithm == "local" else train_together
            events = one_round(link, config, members, state)  # 2 weights out, updates in, combined, stepped
        for event in chain([Progress(number, 0, len(members), "sites")], events):
            if isinstance(event, Progress):
                yield event
                continue
            after, record = _outcome(config, folder, state, event)
            if after is None:  # 3 too few sites: nothing changed, no site is charged twice for the same round
                if (over := ending(config, state, replace(quorum, link=link), record)) is not None:
                    yield over
                    return
                attempts += 1
                yield Failed(record, quorum.least, attempts, ATTEMPTS_A_ROUND)
                if attempts == ATTEMPTS_A_ROUND:
                    raise FederationError(_too_few(config, quorum.least, record, met.left_out))
                job.stop.wait(RETRY_AFTER_S * attempts)
                continue
            state, attempts = after, 0
            records.append(record)
            _keep(config, folder, state, record)  # 4 only now is the round real
            yield record


def run(grid: Grid, job: Job) -> None:
    """Run the federation on a terminal or in a log, and write its results.

    Raises:
        FederationError: As `federate`.
        StorageError: A file could not be written, or another process is at work on the run's folder.
    """
    # Whoever resumes a run that is still at work would spoil its folder.
    with nullcontext() if job.registered is None else alone(job.folder.lock, "run"):
        for line in checkpoint.stepped_over(job.folder.checkpoints):
            print(line, flush=True)
        with display.open_display(job.config) as show, _open_note(job) as note:
            declare = _declared_of(job)
            for event in federate(grid, job):
                show(event)
                note(event)
                declare(event)
        state = checkpoint.load_latest(job.folder.checkpoints)
        if state is not None and (not job.stop.is_set() or state.round >= job.config.federation.rounds):
            secrets = SIMULATED_SECRETS if job.registered is None else SITES_SECRETS
            with unbroken():
                write_results(job.config, job.folder, state, read_records(job.folder.metrics), secrets)


def _open_note(job: Job) -> AbstractContextManager[Callable[[Event], None]]:
    """Open the note of what a run does; within one machine nobody asks for it."""
    return nullcontext(lambda _: None) if job.registered is None else open_note(job.config, job.folder.now)


def _declared_of(job: Job) -> Callable[[Event], None]:
    """Return what keeps the declarations of the sites; as with the note, not within one machine."""
    return (lambda _: None) if job.registered is None else keep_declared(job.folder.declared)


@contextmanager
def unbroken() -> Generator[None]:
    """Hold SIGINT and SIGTERM back until the block has ended: a stop after the last round must not cost the results."""
    if threading.current_thread() is not threading.main_thread():  # only there a signal can break anything
        yield
        return
    held: list[int] = []
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.signal(number, lambda number, _: held.append(number)) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler or signal.SIG_DFL)
        if held:
            signal.raise_signal(held[0])


def make_app(job: Job | None = None) -> ServerApp:
    """Make the ServerApp of a given job, or of the one that Flower's run configuration describes."""
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:  # pyright: ignore[reportUnusedFunction]
        try:
            run(grid, job or job_from(context))
        except StorageError as error:  # of a failed run the link keeps the words alone
            raise StorageError(f"{STORAGE_MATTER}{error}") from error

    return app


def job_from(context: Context) -> Job:
    """Read a job from Flower's run configuration (`[tool.flwr.app.config]` of pyproject.toml lists its keys).

    Raises:
        ConfigError: A value is missing or wrong.
        ResumeError: The folder does not fit.
    """
    values = context.run_config
    config_path, classes = values.get("config", ""), values.get("classes", "")
    if not isinstance(config_path, str) or not isinstance(classes, str):
        raise ConfigError("Expected config and classes of the run configuration as texts.")
    consortium = values.get("consortium", "")  # empty under Flower's simulation runtime
    if consortium not in ("", HERE):
        raise ConfigError(f"Expected consortium of the run configuration as {HERE!r} or empty. Leave it out.")
    home = Path(os.environ["FLWR_HOME"]).parent if consortium else None
    path = (home or Path()) / run_path(values.get("out"), context.run_id)
    changes: dict[str, Any] = {}
    if not config_path:
        changes = {"federation.rounds": values.get("rounds"), "simulation.sites": values.get("sites")}
        changes |= {"image.classes": tuple(name.strip() for name in classes.split(","))}
    config = build_config(read_config(_config_file(config_path, home, path)) if config_path else {}, changes)
    registered = partial(read_registered, load_consortium(home)) if home else None
    folder = open_run(path, config, bool(values.get("resume", False)))
    return Job(config, folder, registered=registered)


def _config_file(name: str, home: Path | None, run: Path) -> Path:
    """Return the file that `config` names: below the run folder at a coordinator, else below where Flower runs."""
    return run / name if home else Path(name)


def _records_of(folder: RunFolder, state: checkpoint.State | None) -> list[RoundRecord]:
    """Return the records of the rounds that are real; what others released goes to those that are not kept."""
    found = read_records(folder.metrics)
    records = [record for record in found if state and record.round <= state.round]
    failed = [*read_records(folder.failed), *found[len(records) :]]
    if failed:  # anew, as a crash may have left a part of a line
        write_records(folder.failed, failed)
    write_records(folder.metrics, records)
    return records


def _outcome(config: Config, folder: RunFolder, state: checkpoint.State | None, outcome: Outcome) -> Outcome:
    """Return what a round came to; of one that changes nothing keep what was released: it is paid for, and stated."""
    after, record = outcome if outcome[0] is not None else give_up(config, state, outcome[1])
    if after is None and record.sites:
        append_record(folder.failed, record)
    return after, record


def _keep(config: Config, folder: RunFolder, state: checkpoint.State, record: RoundRecord) -> None:
    append_record(folder.metrics, record)
    if is_landmark(state.round, config.federation.rounds):
        sheet = folder.samples / f"round-{state.round:04d}.png"
        save_sheet(sheet, averaged_pair(config, state).generator, config)
    checkpoint.save(folder.checkpoints, state)


def _with_deadline(link: Link, config: Config, records: Sequence[RoundRecord], attempts: int) -> Link:
    if link.trust is None:  # within one machine nothing is lost, and load must not decide who is heard
        return link
    longest_s = config.federation.round_timeout_s
    return replace(link, deadline_s=round_deadline_s(longest_s, config.refinements, records, attempts))


def _too_few(config: Config, least: int, record: RoundRecord, left_out: Mapping[str, str]) -> str:
    codes = ", ".join(f"{site}: {code}" for site, code in {**left_out, **record.refused}.items()) or "nobody answered"
    colluding = config.privacy.colluding_sites
    missing = "" if colluding == "all" else f", and at most privacy.colluding_sites={colluding} may be missing"
    return (
        f"Round {record.round} heard {len(record.sites)} sites in {ATTEMPTS_A_ROUND} attempts; at least {least} are "
        f"needed{missing} ({codes}). {advice(record.refused.values())}Mend the sites, then resume the run."
    )


app = make_app()
