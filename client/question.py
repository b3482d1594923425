"""What every private request must be before it is worth a look at policy or budget. Out of scope: both of these."""

import re

from common.config import Proposal
from common.config_text import parse_proposal
from common.errors import ConfigError, WireError
from common.messages import Kind, Request
from common.secure_sum import COHORT_SETTINGS

MAX_D_STEPS = 5000
_RUN_ID = re.compile(r"[a-z0-9-]{1,64}")


def check_question(request: Request) -> Proposal:
    """Check what every private request must be, whatever it asks, and return the run that it belongs to.

    Raises:
        ConfigError, WireError: It is not.
    """
    proposal = parse_proposal(request.proposal)
    if not _RUN_ID.fullmatch(request.run_id):
        raise WireError("Expected a run id of 1 to 64 lower-case letters, digits and hyphens.")
    if not proposal.image.classes:
        raise ConfigError("Expected image.classes to name at least one class.")
    wanted_kind = Kind.TRAIN if proposal.train.algorithm == "local" else Kind.GRADIENT
    if request.kind not in (Kind.WARMUP, wanted_kind):
        raise WireError(f"Expected no {request.kind} with train.algorithm={proposal.train.algorithm}.")
    first, last = proposal.refinements + 1, proposal.federation.rounds
    if request.kind is Kind.WARMUP:
        if proposal.warmup.share == 0:
            raise WireError("Expected a warm-up only in a proposal with warmup.share > 0.")
        first, last = 0, proposal.refinements
    if not first <= request.round <= last:
        raise WireError(f"Expected {request.kind} in a round of [{first}, {last}], got {request.round}.")
    _check_settings(request, proposal)
    return proposal


def _check_settings(request: Request, proposal: Proposal) -> None:
    """Check the names of the settings; what a look and a cohort must be is checked where they are read."""
    wanted = {Kind.TRAIN: ["d_steps_per_g_step"], Kind.WARMUP: ["look"]}.get(request.kind, [])
    wanted += COHORT_SETTINGS if proposal.train.algorithm == "secure-sum" else ()
    if sorted(request.settings) != sorted(wanted):
        raise WireError(f"Expected the settings {', '.join(wanted)} and no others.")
    value = request.settings.get("d_steps_per_g_step", 1)
    if type(value) is not int or not 1 <= value <= MAX_D_STEPS:
        raise WireError(f"Expected d_steps_per_g_step as a whole number in [1, {MAX_D_STEPS}].")
