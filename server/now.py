"""What a run does at this moment, in words: for who watches it, and in `now.txt` of its folder for who asks later.

Out of scope: what is drawn around the words (server/display), what is shown of a run afterwards (server/status).
"""

import contextlib
import math
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from pathlib import Path

from common.config import Config
from common.errors import StorageError
from common.files import write_atomic
from common.wording import duration
from server.handshake import Handshake
from server.records import Failed, Progress, RoundRecord, Waiting

SITES_NAMED = 4
"""Of more sites that gave nothing the codes are counted."""
NOTE_S = 1.0
"""The note is written anew so often at most."""

Event = Progress | Waiting | Handshake | Failed | RoundRecord


@contextmanager
def open_note(config: Config, path: Path) -> Generator[Callable[[Event], None]]:
    """Keep a file that says what a run does; it goes with the round, and with the run.

    Args:
        config: The run's configuration.
        path: The file, `now.txt` of the run's folder.

    Yields:
        A function that takes each event. A disk that does not take the note costs the note, not the run.
    """
    written_s = -math.inf

    def note(event: Event) -> None:
        nonlocal written_s
        if isinstance(event, RoundRecord):
            _remove(path)
        elif not isinstance(event, Handshake) and not (
            isinstance(event, Progress) and time.monotonic() - written_s < NOTE_S
        ):
            with contextlib.suppress(StorageError):
                write_atomic(path, now_line(config, event).encode() + b"\n")
            written_s = time.monotonic()

    try:
        yield note
    finally:
        _remove(path)


def _remove(path: Path) -> None:
    with contextlib.suppress(OSError):
        path.unlink(missing_ok=True)


def now_line(config: Config, now: Progress | Waiting | Failed) -> str:
    """Write where the round under way stands, for whom the run waits, or what was in vain."""
    if isinstance(now, Waiting):
        return waiting_line(now)
    if isinstance(now, Failed):
        return failed_line(now)
    label = warmup_label(config, now.round) or f"round {now.round}"
    if now.what != "fit":
        return f"{label}: {now.done} of {now.of} {now.what} answered"
    return fit_line(label, now)


def fit_line(label: str, now: Progress) -> str:
    """Write how far a fit is, and how long the rest will take."""
    left_s = now.seconds / now.done * (now.of - now.done) if now.done else 0.0
    eta = f", ETA {duration(left_s)}" if left_s else ""
    return f"{label}: fitting the generator, step {now.done} of {now.of}{eta}"


def waiting_line(waiting: Waiting) -> str:
    """Write for whom a run waits."""
    names = f" for {', '.join(waiting.missing)}" if waiting.missing else ""
    sites = "1 site" if waiting.expected == 1 else f"{waiting.expected} sites"
    here = f"{waiting.here} of {sites} connected, at least {waiting.needed} needed"
    then = ", then without" if waiting.here >= waiting.needed else ""
    return f"waiting{names}: {here}, for {duration(waiting.left_s)} at most{then}"


def failed_line(failed: Failed) -> str:
    """Write which attempt at a round was in vain, and whose answer was missing."""
    record = failed.record
    codes = f" ({who(record)})" if record.refused else ""
    heard = f"{len(record.sites)} in {len(record.refused)} out{codes}, at least {failed.needed} needed"
    again = "it is tried again" if failed.attempt < failed.of else "the run ends"
    return f"round {record.round} failed, attempt {failed.attempt} of {failed.of}: sites {heard}; {again}"


def warmup_label(config: Config, number: int) -> str:
    """Name a round of the warm-up, the first release by 1; nothing for a round of training."""
    if number > config.refinements:
        return ""
    return f"warm-up {number + 1}" if config.refinements else "warm-up"


def who(record: RoundRecord) -> str:
    """Name the sites that gave nothing, with their codes; where they are many, count the codes."""
    if len(record.refused) > SITES_NAMED:
        return codes_of(record)
    return ", ".join(f"{name}: {code}" for name, code in sorted(record.refused.items()))


def codes_of(record: RoundRecord, without: Sequence[str] = ()) -> str:
    """Count the codes of the sites that gave nothing."""
    codes = [code for name, code in record.refused.items() if name not in without]
    return ", ".join(f"{codes.count(code)} {code}" if codes.count(code) > 1 else code for code in sorted(set(codes)))
