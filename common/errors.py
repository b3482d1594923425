"""Every error that somebody catches, and every exit code of the three commands.

The exception tree:

    FedmedganError            what a person can mend; the message says what, value, bound, what to do
    ├── ConfigError           a key, a flag or a value of the configuration
    ├── IntakeError           the images: nothing usable, no patients, no labels
    ├── TooFewPatients        the images of fewer patients than the site's policy asks for
    ├── UnreadableSource      the folder of the images is gone or cannot be read
    ├── PolicyRefusal         the site says no: policy, budget, replay (travels as a code, never as text)
    ├── WireError             a message or file that does not decode strictly
    ├── ResumeError           a run folder or a site home that does not fit what is asked
    ├── StorageError          a file that could not be written or read
    ├── FederationError       no site can take part
    ├── EnrolmentError        a key, certificate, enrolment or invitation that is not to be trusted
    ├── PassphraseError       the passphrase of the identity key is missing or another one
    ├── PacsError             the hospital's image archive is out of reach, refuses us, or did not send all
    └── MissingExtra          an optional dependency is not installed

Messages never hold a patient id, a path below the data root or tensor content.
"""

from enum import IntEnum, StrEnum
from typing import ClassVar, final


class ExitCode(IntEnum):
    """Exit codes of `fedmedgan-simulate`, `fedmedgan-site` and `fedmedgan-coordinator`."""

    OK = 0
    INTERNAL = 1
    USAGE = 2
    CONFIG = 3
    DATA = 4
    PRIVACY = 5
    RESUME = 6
    STORAGE = 7
    FEDERATION = 8
    MISSING_EXTRA = 9
    WIRE = 10
    ENROLMENT = 11
    PASSPHRASE = 12
    PACS = 13
    TOO_FEW_PATIENTS = 14
    UNREADABLE = 15
    INTERRUPTED = 130


class RefusalCode(StrEnum):
    """What a site tells the coordinator when it does not do what was asked: a code, never a text."""

    OVER_BUDGET = "over-budget"
    POLICY = "policy"
    REPLAYED = "replayed"
    EXPIRED = "expired"
    BAD_REQUEST = "bad-request"
    NO_DATA = "no-data"
    UNREACHABLE = "unreachable"
    INTERNAL = "internal-error"


class FedmedganError(Exception):
    """Base of every error that a person can mend."""

    exit_code: ClassVar[ExitCode] = ExitCode.INTERNAL


@final
class ConfigError(FedmedganError):
    """A key, flag or value of the configuration is wrong."""

    exit_code = ExitCode.CONFIG


@final
class IntakeError(FedmedganError):
    """The images cannot be used as they are."""

    exit_code = ExitCode.DATA


@final
class TooFewPatients(FedmedganError):
    """There are images, of fewer patients than the policy asks for."""

    exit_code = ExitCode.TOO_FEW_PATIENTS


@final
class UnreadableSource(FedmedganError):
    """The folder or file of the images is not there or cannot be read."""

    exit_code = ExitCode.UNREADABLE


@final
class PolicyRefusal(FedmedganError):
    """The site refuses a request; `code` may travel, the text stays in the site's log."""

    exit_code = ExitCode.PRIVACY

    def __init__(self, code: RefusalCode, reason: str) -> None:
        """Refuse with a code for the coordinator and a reason for the site's own log."""
        super().__init__(reason)
        self.code = code


@final
class WireError(FedmedganError):
    """A message or a file does not decode strictly."""

    exit_code = ExitCode.WIRE


@final
class ResumeError(FedmedganError):
    """A run folder or a site home does not fit what is asked of it."""

    exit_code = ExitCode.RESUME


@final
class StorageError(FedmedganError):
    """A file that matters could not be written or read."""

    exit_code = ExitCode.STORAGE


@final
class FederationError(FedmedganError):
    """No site can take part in what is asked."""

    exit_code = ExitCode.FEDERATION


@final
class EnrolmentError(FedmedganError):
    """An enrolment, an invitation or a certificate is expired, replayed, changed, or meant for somebody else."""

    exit_code = ExitCode.ENROLMENT


@final
class PassphraseError(FedmedganError):
    """The passphrase of a site's identity key is missing, another one, or too short for a new one."""

    exit_code = ExitCode.PASSPHRASE


@final
class PacsError(FedmedganError):
    """The hospital's image archive (PACS) is out of reach, refuses what we ask, or did not send all of it."""

    exit_code = ExitCode.PACS


@final
class MissingExtra(FedmedganError):
    """An optional dependency is not installed; the message is the pip line."""

    exit_code = ExitCode.MISSING_EXTRA
