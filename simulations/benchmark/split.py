"""Divide the wall time of a round among its parts, from what the processes' stopwatches wrote.

    training        any agent trains; takes a moment alone, whatever else goes on
    agent           an agent does the rest: policy, ledger, journal, images, the socket
    serialisation   messages are made, read, hashed, signed, checked, at either end
    transport       a request of Flower's that brings or takes a part of a message is under way
    aggregation     the coordinator combines and steps
    storing         the coordinator writes checkpoint, record and sheet
    polling         none of these: somebody sleeps until the next question

A moment in which several threads work on parts other than training is divided equally among them, so that the parts
add up to the round.
"""

import itertools
import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import final

PARTS: tuple[str, ...] = ("training", "agent", "serialisation", "transport", "aggregation", "storing", "polling")

_WORK = {part: part for part in PARTS[:-1]} | {"checkpoint": "storing"}
_WAITS = {"agent wait": "agent", "message": "serialisation"}
"""What counts only while nothing of the above goes on: the relay's wait for its agent is a socket's time then."""


@final
@dataclass(frozen=True)
class Span:
    """What one thread did from when to when.

    Attributes:
        part: As the stopwatch names it.
        thread: Process and thread.
        since: Seconds, of the machine's clock.
        until: Likewise.
    """

    part: str
    thread: tuple[int, int]
    since: float
    until: float

    @property
    def seconds(self) -> float:
        """How long it took."""
        return self.until - self.since


def read_spans(folder: Path) -> list[Span]:
    """Read what all stopwatches wrote, sorted by their beginnings. A last line that is torn is left out."""
    spans: list[Span] = []
    for path in folder.glob("*.jsonl"):
        for line in path.read_text(encoding="utf-8").split("\n")[:-1]:
            part, thread, since, until = json.loads(line)
            spans.append(Span(part, (int(path.stem), thread), since, until))
    return sorted(spans, key=lambda span: span.since)


def rounds(spans: Sequence[Span]) -> list[tuple[float, float]]:
    """Return from when to when each round went: from one checkpoint to the next, the warm-up's being the first."""
    ends = sorted(span.until for span in spans if span.part == "whole checkpoint")
    return list(itertools.pairwise(ends))


def greeting(spans: Sequence[Span]) -> tuple[float, float]:
    """Return from when to when the coordinator asked the sites who they are: its first question of a run."""
    first = min((span for span in spans if span.part == "asked"), key=lambda span: span.since)
    return first.since, first.until


def split(spans: Iterable[Span], since: float, until: float) -> dict[str, float]:
    """Divide a stretch of time among `PARTS`.

    Args:
        spans: Of all processes; those outside the stretch do not matter.
        since: Its beginning, seconds.
        until: Its end.

    Guarantees:
        - adds_up: The parts are not negative, and their sum is the stretch.
        - training_first: A moment in which a site trains is training alone.
    """
    changes: list[tuple[float, int, str]] = []
    for span in spans:
        begin, end = max(span.since, since), min(span.until, until)
        if begin < end and (span.part in _WORK or span.part in _WAITS):
            changes += [(begin, 1, span.part), (end, -1, span.part)]
    seconds, active, now = dict.fromkeys(PARTS, 0.0), Counter[str](), since
    for at, change, part in sorted(changes):
        for name, share in _shares(active).items():
            seconds[name] += share * (at - now)
        active[part] += change
        now = at
    seconds["polling"] += until - now
    return seconds


def messages(spans: Sequence[Span], since: float, until: float) -> list[float]:
    """Return what each message of a stretch took at its relay, from its arrival to its answer, the agent's time aside.

    Args:
        spans: Of all processes.
        since: The beginning of the stretch, seconds.
        until: Its end.
    """
    waits = [span for span in spans if span.part == "whole agent wait" and since <= span.since < until]
    took: list[float] = []
    for relayed in spans:
        inside = [wait for wait in waits if wait.thread == relayed.thread and relayed.since <= wait.since]
        inside = [wait for wait in inside if wait.until <= relayed.until]
        if relayed.part == "whole relayed" and inside:
            took.append(relayed.seconds - sum(wait.seconds for wait in inside))
    return took


def _shares(active: Counter[str]) -> dict[str, float]:
    """Return to which parts a moment goes, and how much of it."""
    if active["training"]:
        return {"training": 1.0}
    for names in (_WORK, _WAITS):
        working = Counter[str]()
        for part, threads in active.items():
            if part in names and threads:
                working[names[part]] += threads
        if working:
            return {part: threads / working.total() for part, threads in working.items()}
    return {"polling": 1.0}
