"""Words of messages that several parts need. Out of scope: what is said."""

import re
from collections.abc import Sequence

from pydantic_core import ErrorDetails

_TYPES = {"extra_forbidden": "unknown key", "missing": "missing"}
_OF_PYDANTIC = r"^(Value error, |Input (?=should)|String (?=should))"
"""Words of pydantic's own, before what a person can use."""


def counted(count: int, one: str, several: str = "") -> str:
    """Return a count with its noun.

    >>> counted(1, "pair"), counted(2, "pair")
    ('1 pair', '2 pairs')
    """
    return f"{count} {one if count == 1 else several or one + 's'}"


def duration(seconds: float) -> str:
    """Write a time for a person.

    >>> duration(5.2), duration(62), duration(5180)
    ('5 s', '1 min 2 s', '1 h 26 min')
    """
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def wrong_values(errors: Sequence[ErrorDetails]) -> str:
    """Return where values of a file are wrong and why, of the first five; without what stands there.

    Args:
        errors: Of pydantic.
    """
    return "; ".join(_wrong_value(item) for item in errors[:5])


def _wrong_value(item: ErrorDetails) -> str:
    where = "".join(f"{part}." for part in item["loc"]).removesuffix(".")
    said = _TYPES.get(item["type"]) or re.sub(_OF_PYDANTIC, "", item["msg"])
    return f"{where}: {said}" if where else said
