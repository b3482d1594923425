"""What coordinator and site say of themselves before a run, and what the site answers to the run that is proposed.

A protocol version stands for everything that both sides must do alike: the wire, what a proposal means, the plan that
follows from it. So sites of another protocol take no part; another release of the package with the same protocol does,
and is shown. Out of scope: how a site comes to its verdict (client/hello), who is let in (server/handshake).
"""

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from enum import StrEnum
from typing import final, get_args

from common.config import MAX_COHORT_PATIENTS, Algorithm, ModelName, Proposal
from common.enrolment import SITE_NAME
from common.errors import WireError
from common.messages import PACKAGE_VERSION, PROTOCOL_VERSION, VERSION_FORM, Scalar

CAPABILITIES = " ".join((*get_args(Algorithm), *get_args(ModelName)))
"""Algorithms and models of this release: constants of the code, the same at every site that installed it."""

MAX_ALLOWED = 100_001
"""Rounds of the longest run that can be proposed, with round 0."""


class Verdict(StrEnum):
    """How a site stands to a proposed run; the closed list. Why stands in its own log."""

    OK = "ok"
    OVER_BUDGET = "over-budget"
    """The budget is enough for `rounds_allowed` of the rounds."""
    POLICY = "policy"
    NO_DATA = "no-data"
    """Nothing is imported for these classes, this size and these channels."""
    BAD_REQUEST = "bad-request"
    """This release cannot read the proposal, or nothing can be planned from it."""


FORMS: Mapping[str, str] = {
    "site": SITE_NAME,
    "package": VERSION_FORM,
    "proposal_sha256": "|[0-9a-f]{64}",
    "capabilities": "[a-z0-9-]{1,32}( [a-z0-9-]{1,32}){0,7}",
    "verdict": "|".join(Verdict),
}
"""The form of each text that a greeting holds."""


@final
@dataclass(frozen=True)
class Greeting:
    """What a site answers to a hello: nothing in it is computed from patients.

    Attributes:
        site: Its name, as its policy lets it declare.
        declared_patients: The rounded number of its policy.
        protocol: The protocol version that it speaks.
        package: The release of fedmedgan that is installed there.
        proposal_sha256: Digest of the proposal as this release reads it; empty if it cannot.
        capabilities: Algorithms and models of the release.
        verdict: How the site stands to the run.
        rounds_allowed: How many of the run's rounds, round 0 of the warm-up among them, can be paid for one after the
            other from the first on.
    """

    site: str
    declared_patients: int
    protocol: int
    package: str
    proposal_sha256: str
    capabilities: str
    verdict: Verdict
    rounds_allowed: int

    def as_fields(self) -> dict[str, Scalar]:
        """Return the greeting as the fields of a reply."""
        return asdict(self) | {"verdict": self.verdict.value}


def hello_settings() -> dict[str, Scalar]:
    """Return what a coordinator says of itself in a hello, beside the protocol of the message."""
    return {"package": PACKAGE_VERSION}


def parse_hello(settings: Mapping[str, object]) -> str:
    """Read the coordinator's release from the settings of a hello.

    Raises:
        WireError: It is missing, or anything else is there.
    """
    package = settings.get("package")
    if len(settings) != 1 or not isinstance(package, str) or not re.fullmatch(VERSION_FORM, package):
        raise WireError("Expected the coordinator's package version as the one setting of a hello.")
    return package


def parse_greeting(given: Mapping[str, object]) -> Greeting:
    """Read a site's greeting strictly; nothing of it is believed but as what the site says.

    Raises:
        WireError: A field is missing, extra, of another type or form, or out of bounds.
    """
    names = {item.name for item in fields(Greeting)}
    if set(given) != names:
        raise WireError(f"Expected the fields {', '.join(sorted(names))} and no others.")
    texts = {
        name: value for name in FORMS if isinstance(value := given[name], str) and re.fullmatch(FORMS[name], value)
    }
    bounds = {
        "declared_patients": (1, MAX_COHORT_PATIENTS),
        "protocol": (PROTOCOL_VERSION, PROTOCOL_VERSION),
        "rounds_allowed": (0, MAX_ALLOWED),
    }
    numbers = {
        name: value
        for name, (least, most) in bounds.items()
        if isinstance(value := given[name], int) and not isinstance(value, bool) and least <= value <= most
    }
    if len(texts) + len(numbers) != len(names):
        raise WireError("Expected a greeting whose fields have their types, forms and bounds.")
    return Greeting(**(texts | {"verdict": Verdict(texts["verdict"])}), **numbers)  # pyright: ignore[reportArgumentType]


def planned_rounds(proposal: Proposal) -> int:
    """Return how many rounds a run has, round 0 of the warm-up among them."""
    return proposal.federation.rounds + (proposal.warmup.share > 0)


def pays_for_warm_up(proposal: Proposal, said: Greeting) -> bool:
    """Tell whether a site's budget carries the warm-up whole: of some of its releases nobody would have the images.

    A site that cannot may still pay for rounds of training, which cost less; its greeting counts none of them.
    """
    return said.verdict is not Verdict.OVER_BUDGET or said.rounds_allowed >= proposal.warmup_releases
