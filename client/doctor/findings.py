"""What one check of `doctor` found. Out of scope: the checks."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import final

from common.errors import ExitCode, FedmedganError


class Status(StrEnum):
    """How a check ended."""

    PASS = "PASS"  # noqa: S105
    WARN = "WARN"
    FAIL = "FAIL"
    SKIP = "SKIP"


@final
@dataclass(frozen=True)
class Finding:
    """What one check found.

    Attributes:
        name: The check.
        status: WARN is worth a look; FAIL keeps the site from taking part; SKIP was not checked.
        said: What was seen.
        fix: What to do about it; empty for PASS.
        exit_code: The class of a failure; OK otherwise.
        missing: Nothing is wrong, but what is still to be done keeps the site from taking part now.
    """

    name: str
    status: Status
    said: str
    fix: str = ""
    exit_code: ExitCode = ExitCode.OK
    missing: bool = False

    @property
    def line(self) -> str:
        """Return the finding as one line of text."""
        return f"{self.status}  " + " ".join(f"{self.name}: {self.said} {self.fix}".split())


Check = Callable[[], Finding]


def passed(name: str, said: str) -> Finding:
    """Return that all is well."""
    return Finding(name, Status.PASS, said)


def warned(name: str, said: str, fix: str) -> Finding:
    """Return that something is worth a look."""
    return Finding(name, Status.WARN, said, fix)


def to_do(name: str, said: str, fix: str) -> Finding:
    """Return that a step is still to be done before the site can take part."""
    return Finding(name, Status.WARN, said, fix, missing=True)


def skipped(name: str, after: str) -> Finding:
    """Return that a check was not made, since it would only say again what another one found."""
    return Finding(name, Status.SKIP, f"not checked, see {after}")


def failed(name: str, said: str, fix: str, exit_code: ExitCode) -> Finding:
    """Return that the site cannot take part like this."""
    return Finding(name, Status.FAIL, said, fix, exit_code)


def once(finding: Finding, earlier: Sequence[Finding]) -> Finding:
    """Return a failure that was told before as a reference to where: one cause fails many checks."""
    if finding.status is not Status.FAIL:
        return finding
    first = next((one.name for one in earlier if (one.status, one.said) == (Status.FAIL, finding.said)), "")
    return replace(finding, said=f"see {first}.", fix="") if first else finding


def look(name: str, check: Check) -> Finding:
    """Run one check; what it raises is its finding, so that no check keeps another from being made.

    The project's own errors say what to do. A file that the operating system keeps from us is named by its reason only,
    since its path may be a patient's.
    """
    try:
        return check()
    except FedmedganError as error:
        return failed(name, str(error), "", error.exit_code)
    except OSError as error:
        fix = "Run doctor as the user who owns the home, or mend the permissions."
        return failed(name, f"a file could not be looked at: {error.strerror}.", fix, ExitCode.STORAGE)


def exit_code(findings: Sequence[Finding]) -> ExitCode:
    """Return the code of the first failure, OK where there is none."""
    return next((finding.exit_code for finding in findings if finding.status is Status.FAIL), ExitCode.OK)


def summary(findings: Sequence[Finding]) -> str:
    """Say whether the site could take part now, and what it wants for that."""
    wanted = [
        f"{finding.name} ({' '.join(finding.said.split()).rstrip('.')})"
        for finding in findings
        if finding.status is Status.FAIL or finding.missing
    ]
    return f"could not take part now: {'; '.join(wanted)}" if wanted else "could take part now"
