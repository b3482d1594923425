"""What a person sees while a run goes on: a live table on a terminal, one plain line a round anywhere else.

Out of scope: what is recorded (server/records) and the report after the run (server/report).
"""

from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import final

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from common.config import Config
from common.wording import duration
from server.handshake import Handshake, lines
from server.now import SITES_NAMED, Event, codes_of, now_line, warmup_label, who
from server.pace import amount, round_up, seconds_left
from server.records import Failed, Progress, RoundRecord, Waiting, is_landmark

SHOWN_ROUNDS = 15
FIT_LINE_S = 15.0
"""A fit that takes longer gets a line this often."""
ALL_LINES = 200
"""A run of more rounds gets a line for some of them only."""
SITE_COLUMNS = SITES_NAMED
"""With more sites than this their epsilons share one column, from the smallest to the largest."""
SITE_CHARACTERS = 9
"""Longer names are cut from the left, so that four columns fit in 80 characters."""

GIVEN_UP = "it was answered before, to another question; its charge is spent, its answers are lost"

Show = Callable[[Event], None]


@final
@dataclass
class Seen:
    """What was shown up to now: the newest rounds, and what all of them say of the sites."""

    records: list[RoundRecord] = field(default_factory=list[RoundRecord])
    limits: dict[str, float] = field(default_factory=dict[str, float])
    most_sites: int = 0
    now: Progress | Waiting | Failed | None = None
    fit_told_s: float = 0.0


@contextmanager
def open_display(config: Config, console: Console | None = None) -> Generator[Show]:
    """Open the display of a run and yield the function that shows what happens.

    Args:
        config: The run's configuration.
        console: Where to write; standard output when None.

    Yields:
        A function that takes each event. On a terminal it redraws a table; elsewhere it writes and flushes one line
        for each finished round, in a long run for some of them and for each in which other sites refuse than before,
        and of progress inside one only how far the fit of a warm-up is. A handshake is written above the table, and
        before the lines.
    """
    console = console or Console()
    seen = Seen()
    if not console.is_terminal:
        yield lambda event: _print(console, config, seen, event)
        return
    with Live(_drawing(config, seen), console=console, refresh_per_second=8) as live:

        def show(event: Event) -> None:
            if isinstance(event, Handshake):
                console.print(Text("\n".join(lines(config, event))))
            else:
                if isinstance(event, RoundRecord) and event.unseen:
                    console.print(Text(unseen(event), "yellow"))
                live.update(_drawing(config, _add(seen, event)))

        yield show


def plain_line(config: Config, records: Sequence[RoundRecord]) -> str:
    """Write the newest of some records as one line.

    Args:
        config: The run's configuration.
        records: At least one; those before the newest tell the pace.
    """
    record = records[-1]
    codes = f" ({who(record)})" if record.refused else ""
    if record.lost:
        return f"round {record.round}/{config.federation.rounds}  given up{codes}: {GIVEN_UP}"
    parts = [
        f"round {record.round}/{config.federation.rounds}",
        warmup_label(config, record.round) if config.warmup.share > 0 else "",
        f"sites {len(record.sites)} in {len(record.refused)} out{codes}",
        f"epsilon {_spent(record)} of {_allowed(record)}" if record.sites else "",
        f"fakes told {record.fake_accuracy:.2f}" if record.fake_accuracy is not None else "",
        f"{record.seconds:.1f} s",
        unseen(record),
        traffic(record),
        f"ETA {eta}" if (eta := _eta(config, records)) else "",
    ]
    return "  ".join(part for part in parts if part)


def unseen(record: RoundRecord) -> str:
    """Write which classes a warm-up cannot show; nothing where it shows them all."""
    return f"NOT LEARNED, drowned in the noise: {', '.join(record.unseen)}" if record.unseen else ""


def traffic(record: RoundRecord) -> str:
    """Write what a round sent to a site and what one sent back; nothing where no site was asked."""
    down, up = record.bytes_a_site
    return f"{amount(down)} down {amount(up)} up a site" if record.asked else ""


def _add(seen: Seen, event: Progress | Waiting | Failed | RoundRecord) -> Seen:
    if not isinstance(event, RoundRecord):
        seen.now = event
    else:
        seen.records = [*seen.records[1 - SHOWN_ROUNDS :], event]
        seen.limits |= {name: site.epsilon_allowed for name, site in event.sites.items()}
        seen.most_sites = max(seen.most_sites, len(event.sites) + len(event.refused))
        seen.now = None
    return seen


def _print(console: Console, config: Config, seen: Seen, event: Event) -> None:
    if isinstance(event, Handshake):
        console.file.writelines(f"{line}\n" for line in lines(config, event))
        console.file.flush()
        return
    before = seen.records[-1].refused if seen.records else {}
    records = _add(seen, event).records
    rounds = config.federation.rounds
    if isinstance(event, RoundRecord):
        if rounds <= ALL_LINES or is_landmark(event.round, rounds) or event.refused != before or event.lost:
            _write(console, plain_line(config, records))
    elif not isinstance(event, Progress) or _fit_is_told(seen, event):
        _write(console, now_line(config, event))


def _fit_is_told(seen: Seen, progress: Progress) -> bool:
    """Tell whether the fit has a line to write: at its first step, and then every FIT_LINE_S."""
    if progress.what != "fit" or (progress.done > 1 and progress.seconds < seen.fit_told_s + FIT_LINE_S):
        return False
    seen.fit_told_s = progress.seconds
    return True


def _write(console: Console, line: str) -> None:
    console.file.write(line + "\n")  # not console.print: it wraps, and a line is a line for whoever reads the log
    console.file.flush()


def _drawing(config: Config, seen: Seen) -> Group:
    below = now_line(config, seen.now) if seen.now else _waiting(config, seen)
    eta = _eta(config, seen.records) if seen.records else ""
    last = traffic(seen.records[-1]) if seen.records else ""
    line = ", ".join(part for part in (below, f"ETA {eta}" if eta else "", last) if part)
    return Group(_header(config, seen), _table(config, seen), Text(line, "cyan"))


def _header(config: Config, seen: Seen) -> Text:
    facts = Text("fedmedgan", style="bold")
    sites = seen.most_sites or config.simulation.sites
    return facts.append(
        f"  {_count(sites, 'site')}, {_count(config.federation.rounds, 'round')}, epsilon {config.privacy.epsilon:g} "
        f"(delta {config.privacy.delta:g}) per patient, {config.performance.engine} engine",
        style="not bold",
    )


def _table(config: Config, seen: Seen) -> Table:
    shown = seen.records[-SHOWN_ROUNDS:]
    limits = seen.limits
    names = sorted(limits) if len(limits) <= SITE_COLUMNS else []
    outside = any(codes_of(record, names) for record in shown)
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    for title in ("round", "sites\nin/out"):
        table.add_column(title, justify="right", no_wrap=True)
    for name in names:
        short = name if len(name) <= SITE_CHARACTERS else "…" + name[1 - SITE_CHARACTERS :]  # the end tells sites apart
        table.add_column(Text(f"{short}\neps of {limits[name]:g}"), justify="right", no_wrap=True)
    if not names:
        table.add_column("epsilon\nspent / allowed", justify="right", no_wrap=True)
    for title in ("fakes\ntold", "seconds"):
        table.add_column(title, justify="right", no_wrap=True)
    if outside:
        table.add_column("refused")
    for record in shown:
        cells = [
            warmup_label(config, record.round) or f"{record.round}/{config.federation.rounds}",
            f"{len(record.sites)}/{len(record.refused)}",
            *([_of_site(record, name) for name in names] or [_of_all(record)]),
            "" if record.fake_accuracy is None else f"{record.fake_accuracy:.2f}",
            f"{record.seconds:.1f}",
            *([codes_of(record, names)] if outside else []),
        ]
        table.add_row(*(Text(cell) for cell in cells))
    return table


def _waiting(config: Config, seen: Seen) -> str:
    if not seen.records:
        return "waiting for the sites"
    after = seen.records[-1].round + 1
    label = warmup_label(config, after) or f"round {after}"
    return "finished" if after > config.federation.rounds else f"{label}: waiting for the sites"


def _of_site(record: RoundRecord, name: str) -> str:
    if name not in record.sites:
        return record.refused.get(name, "")
    return round_up(record.sites[name].epsilon_spent)


def _of_all(record: RoundRecord) -> str:
    return f"{_spent(record)} / {_allowed(record)}" if record.sites else ""


def _spent(record: RoundRecord) -> str:
    low, high = (round_up(pick(site.epsilon_spent for site in record.sites.values())) for pick in (min, max))
    return low if low == high else f"{low}-{high}"


def _allowed(record: RoundRecord) -> str:
    low, high = (pick(site.epsilon_allowed for site in record.sites.values()) for pick in (min, max))
    return f"{low:g}" if low == high else f"{low:g}-{high:g}"


def _eta(config: Config, records: Sequence[RoundRecord]) -> str:
    left_s = seconds_left(records, config.refinements, config.federation.rounds)
    return duration(left_s) if left_s else ""


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
