"""`fedmedgan-site pull`: fetch studies from a PACS into the inbox. A process of its own: no torch, no Flower."""

import logging
import signal
import warnings
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from client.logs import log_to
from client.pull.archive import Archive
from client.pull.asked import read_list
from client.pull.inbox import Inbox, load_key
from client.pull.pace import Pace
from client.pull.run import Pull
from client.pull.sources import Source, WebSource, find_source, read_sources
from client.pull.state import State
from common.command import run_command
from common.errors import ConfigError, ExitCode, FedmedganError, MissingExtra
from common.lock import alone
from common.wording import counted

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode="markdown")
LOG = logging.getLogger("fedmedgan.pull")


@app.callback()
def fedmedgan_site() -> None:
    """Let `pull` be a word of the command line, as it is of `fedmedgan-site`."""


@app.command()
def pull(
    home: Annotated[Path, typer.Argument(help="The folder with pacs.toml: the site's home, or one of its own.")],
    source: Annotated[str, typer.Option("--from", help="The name of a source in pacs.toml.")],
    asked: Annotated[
        Path | None, typer.Option("--list", help="CSV with the column accession or patient; see docs/pull.md.")
    ] = None,
    echo: Annotated[bool, typer.Option("--echo", help="Only ask whether the PACS answers us.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only count what the PACS has of the list.")] = False,
    show_ids: Annotated[
        bool, typer.Option("--show-ids", help="Show accession numbers and patient ids on this terminal.")
    ] = False,
) -> None:
    """Fetch the studies of a list from a PACS into the inbox folder; run again to go on after an interruption.

    Exits 0 where all is here; 3 a setting, or a bound of pacs.toml reached; 4 the list, or lines of it that the PACS
    has nothing for; 7 files or disk; 9 the PACS libraries are missing; 13 the PACS is out of reach, refuses us, or did
    not send all.
    """
    if (asked is None) != echo or (echo and dry_run):
        raise ConfigError("Expected --list FILE.csv, with --dry-run if wanted, or --echo alone.")
    home = home.absolute()
    sources = read_sources(home)
    chosen = find_source(sources, source)
    log_to(home / "logs" / "pull.log")
    _be_quiet()
    try:
        with alone(home / "pull" / "pull.lock", "pull"):
            inbox = Inbox(Path(sources.inbox or home / "inbox"), load_key(home / "keys" / "inbox.key"), chosen)
            inbox.sweep()
            state = home / "pull" / f"{source}.json"
            code = _run(chosen, inbox, state, asked, dry_run=dry_run, show_ids=show_ids)
    except FedmedganError as error:
        LOG.error("%s", error)
        raise
    if code:
        raise typer.Exit(code)


def _run(source: Source, inbox: Inbox, state: Path, asked: Path | None, *, dry_run: bool, show_ids: bool) -> int:
    rows = read_list(asked) if asked is not None else ()
    archive = _open(source, inbox)
    say = _say_aloud if show_ids else _say
    try:
        if asked is None:
            _say(archive.echo())
            return ExitCode.OK
        pace = Pace(source.window, source.per_minute)
        work = Pull(archive, inbox, State(state), pace, say, show_ids=show_ids)
        found = work.resolve(rows)
        _say(
            f"{counted(len(rows), 'line')} of the list: {work.tally.series} series, "
            f"{counted(work.tally.expected, 'instance')}"
        )
        if dry_run:
            work.describe(rows, found)
            work.tell_failures()
            return work.tally.exit_code(fetched=False)
        try:
            work.fetch(found)
        finally:
            work.tell_failures()
            work.tell_counts()
        return work.tally.exit_code(fetched=True)
    finally:
        archive.close()


def _open(source: Source, inbox: Inbox) -> Archive:
    if isinstance(source, WebSource):
        from client.pull.web import WebArchive

        return WebArchive(source)
    try:
        import pynetdicom  # noqa: F401  # pyright: ignore[reportUnusedImport]
    except ImportError as error:
        raise MissingExtra("DIMSE needs pynetdicom: pip install 'fedmedgan[pacs]', or use DICOMweb") from error
    from client.pull.dimse import DimseArchive

    return DimseArchive(source, inbox)


def _say(text: str) -> None:
    LOG.info("%s", text)
    print(text, flush=True)


def _say_aloud(text: str) -> None:
    """Say what holds identifiers: to the terminal, since --show-ids asks for it, and never to the log."""
    print(text, flush=True)


def _be_quiet() -> None:
    """Keep libraries from quoting what arrives, and make SIGTERM end like Ctrl-C: with the state written."""
    warnings.simplefilter("ignore")
    for name in ("httpx", "httpcore", "pydicom"):
        logger = logging.getLogger(name)
        logger.propagate = False
        logger.setLevel(logging.CRITICAL + 1)
    signal.signal(signal.SIGTERM, signal.default_int_handler)


def main(arguments: list[str] | None = None) -> NoReturn:
    """Run the command line."""
    run_command(app, arguments, interrupted="stopped; run the same command again to go on", name="fedmedgan-site")
