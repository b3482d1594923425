"""What a pull has done and what it could not, and the exit code that says so."""

from dataclasses import dataclass, field
from typing import Final, final

from client.pull.archive import Reason
from client.pull.asked import Row
from common.errors import ExitCode

_OF_THE_LIST: Final = frozenset((Reason.NOT_FOUND, Reason.OTHERS, Reason.NO_ISSUER))


@final
@dataclass(frozen=True)
class Failure:
    """What was asked for and is not here.

    Attributes:
        row: The line of the list.
        reason: Why.
        missing: How many instances; 0 where it is not known, or what was thrown away was not asked for.
        detail: What can be done beyond the reason's advice.
    """

    row: Row
    reason: Reason
    missing: int = 0
    detail: str = ""


@final
@dataclass
class Tally:
    """What a pull has done so far; instances."""

    expected: int = 0
    were_here: int = 0
    received: int = 0
    series: int = 0
    failures: list[Failure] = field(default_factory=list)

    @property
    def missing(self) -> int:
        """Return how many instances are expected and not here."""
        return self.expected - self.were_here - self.received

    def exit_code(self, *, fetched: bool) -> ExitCode:
        """Return 13 where instances are missing or anything failed but the list, 4 where that alone is wrong, else 0.

        Args:
            fetched: False where nothing was to be fetched.
        """
        reasons = {failure.reason for failure in self.failures}
        harmless = _OF_THE_LIST | {Reason.NOT_ASKED}  # thrown away, and all that was asked for may be here
        if reasons - harmless or (fetched and self.missing):
            return ExitCode.PACS
        return ExitCode.DATA if reasons & _OF_THE_LIST else ExitCode.OK
