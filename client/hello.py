"""The site's side of the handshake: who it is, what is installed, and how far its budget carries the proposed run.

Everything in the answer follows from the release, `policy.toml`, the ledger and whether an import of the run's classes
stands in the home; no image and no patient is looked at, and nothing is charged or written. What it adds to what every
coordinator learns anyway: a refusal says policy, no-data or over-budget today, each reply says what is spent and
allowed, and rounds follow from those two and the proposal. A coordinator gets these answers without a charge, so it
can ask for many proposals: it then knows the bounds of the policy, which class lists are imported, and the prices of
earlier runs, all of which people chose. Out of scope: what is charged (client/agent), the coordinator's side
(server/handshake).
"""

import logging
from collections.abc import Sequence

from client import policy
from client.budget import Forecast, forecast
from client.home import Home, require_images
from client.ledger import Entry
from client.logs import printable
from client.policy import Policy
from common.config import Proposal
from common.config_text import parse_proposal
from common.errors import ConfigError, IntakeError, PolicyRefusal, RefusalCode, WireError
from common.greeting import CAPABILITIES, Greeting, Verdict, parse_hello, planned_rounds
from common.messages import PACKAGE_VERSION, PROTOCOL_VERSION, Request
from common.privacy import epsilon
from common.secure_sum import Cohort, parse_cohort

LOG = logging.getLogger("fedmedgan.agent")


def say_hello(home: Home, rules: Policy, charged: Sequence[Entry], request: Request) -> Greeting:
    """Answer a hello.

    Args:
        home: The site's; only asked whether an import exists.
        rules: Its policy.
        charged: The lines of its ledger.
        request: Whatever arrived; a proposal that does not read is no error but a verdict, so that versions are told.

    Raises:
        PolicyRefusal: The site may not say who it is.
        WireError: The request carries anything but a proposal and the coordinator's release.

    Guarantees:
        - costs_nothing: Ledger, journal and stored replies are as before.
        - nothing_of_patients: The same policy, ledger and list of imports give the same answer, whatever the images.
        - own_run_is_not_paid_twice: Releases that the run was charged already count as paid.
    """
    policy.check_hello(rules)
    coordinator = parse_hello(request.settings)
    if request.arrays or request.round:
        raise WireError("Expected a hello of round 0 without arrays.")
    digest, planned, allowed, why = "", 0, 0, ""
    try:
        proposal = parse_proposal(request.proposal)
        digest, planned = proposal.digest(), planned_rounds(proposal)
        found = _forecast(home, rules, charged, proposal, request.run_id)
        allowed = found.in_order
        verdict = Verdict.OK if allowed == planned else Verdict.OVER_BUDGET
        if allowed < planned:
            why = _too_dear(rules, charged, found)
    except PolicyRefusal as error:
        verdict, why = Verdict.POLICY, str(error)
    except IntakeError as error:
        verdict, why = Verdict.NO_DATA, str(error)
    except (ConfigError, WireError) as error:
        verdict, why = Verdict.BAD_REQUEST, str(error)
    LOG.info(
        "hello of run %s from a coordinator with fedmedgan %s (here %s): %s, %d of %d rounds; %s",
        *(printable(request.run_id), printable(coordinator), PACKAGE_VERSION, verdict, allowed, planned),
        printable(why) or "nothing to mend",
    )
    return Greeting(
        rules.site,
        rules.declared_patients,
        PROTOCOL_VERSION,
        PACKAGE_VERSION,
        digest,
        CAPABILITIES,
        verdict,
        allowed,
    )


def _forecast(home: Home, rules: Policy, charged: Sequence[Entry], proposal: Proposal, run_id: str) -> Forecast:
    """Forecast the run, by the checks of a real request in their order; the last is the price."""
    if not proposal.image.classes:
        raise ConfigError("Expected image.classes to name at least one class.")
    policy.check_proposal(rules, proposal)
    found = forecast(rules, charged, proposal, _least_cohort(rules, proposal), run_id)
    if found.refusal is not None:
        raise PolicyRefusal(RefusalCode.POLICY, found.refusal)
    require_images(home, proposal.image.classes, proposal.image.size, proposal.image.channels)
    return found


def _too_dear(rules: Policy, charged: Sequence[Entry], found: Forecast) -> str:
    """Write for the site's own log what does not fit."""
    agreed, spent = found.plan, epsilon([entry.charge for entry in charged], rules.delta)
    cost = f"epsilon {agreed.epsilon:.2f}"
    if found.warmup is False:
        alone = epsilon([agreed.charge_of_warmup()] * found.warmup_releases, rules.delta)
        cost = f"epsilon {alone:.2f} for its warm-up alone"
    return (
        f"the run costs {cost}, and {spent:.2f} of max_epsilon = {rules.max_epsilon:g} of policy.toml is spent. Ask "
        "the coordinator for a cheaper run, or let the privacy officer raise max_epsilon"
    )


def _least_cohort(rules: Policy, proposal: Proposal) -> Cohort | None:
    """Return, for secure-sum, the smallest cohort there can be: the real one is known when all sites were greeted.

    The whole run costs the proposal's epsilon with any cohort. How many rounds a smaller rest pays for is then a guess,
    a few rounds too high or too low: where it is too high, the site refuses in the middle of the run, and the others
    may have paid for a round that too few answered (`privacy.json` counts it).
    Where noise is to be shared, two are supposed to share it, so that a policy that forbids it says so now.
    """
    if proposal.train.algorithm == "local":
        return None
    colluding, least = proposal.privacy.colluding_sites, proposal.privacy.min_patients
    sites = max(proposal.federation.min_sites, 1 if colluding == "all" else colluding + 2)
    together = Cohort(sites, rules.declared_patients + (sites - 1) * least)
    return parse_cohort(together.settings(), rules.declared_patients, least)
