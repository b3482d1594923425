"""Words of messages that several parts need. Out of scope: what is said."""

from collections.abc import Sequence

from pydantic_core import ErrorDetails


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
    said = [
        f"{'.'.join(map(str, item['loc'])) or 'the whole'}: "
        + ("unknown key" if item["type"] == "extra_forbidden" else item["msg"].removeprefix("Value error, "))
        for item in errors[:5]
    ]
    return "; ".join(said)
