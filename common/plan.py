"""What a site does and pays in one run: a pure function of the proposal and the declared patients.

Everything here is computed from public values, so coordinator, site and dry run each compute the same plan.
Out of scope: what a composition costs (common/privacy), what was spent so far (client/ledger).
"""

import math
from collections.abc import Collection
from dataclasses import dataclass
from typing import final

from common.config import Proposal
from common.errors import ConfigError
from common.privacy import Charge, epsilon, noise_for
from common.secure_sum import GRID, WARMUP_GRID, Cohort, check_integers, noise_shares


@final
@dataclass(frozen=True)
class Plan:
    """What a site does and pays in one run, computed from public values alone.

    Attributes:
        declared_patients: The rounded cohort size that the site made public.
        sample_rate: Probability of each patient in each private step.
        warmup_noise_multiplier: Of each release of the warm-up; None without warm-up.
        train_noise_multiplier: Of every private step; None without rounds.
        steps: Private steps of all rounds together.
        epsilon: What the whole run costs by PLD; at most the proposal's epsilon.
        delta: The proposal's delta.
        cohort: With secure-sum all sites together; a step is then one of all of them.
        noise_shares: Into how many sites' equal parts the noise of a release is split; 1: each site adds all of it.
    """

    declared_patients: int
    sample_rate: float
    warmup_noise_multiplier: float | None
    train_noise_multiplier: float | None
    steps: int
    epsilon: float
    delta: float
    cohort: Cohort | None = None
    noise_shares: int = 1

    @property
    def divisor(self) -> float:
        """The public constant by which a clipped sum is divided: expected patients in one step."""
        return self.sample_rate * (self.declared_patients if self.cohort is None else self.cohort.patients)

    @property
    def share_noise_multiplier(self) -> float:
        """Deviation of the noise that one site adds to its part of a step, over the clip norm.

        Raises:
            ConfigError: The plan has no training rounds.
        """
        return self.charge_of_round(1).noise_multiplier / math.sqrt(self.noise_shares)

    @property
    def share_warmup_noise(self) -> float:
        """Deviation of the noise that one site adds to a release of the warm-up.

        Raises:
            ConfigError: The plan has no warm-up.
        """
        return self.charge_of_warmup().noise_multiplier / math.sqrt(self.noise_shares)

    def charge_of_warmup(self) -> Charge:
        """Return what one release of the warm-up costs: a Gaussian release of sensitivity 1.

        Raises:
            ConfigError: The plan has no warm-up.
        """
        if self.warmup_noise_multiplier is None:
            raise ConfigError("This plan has no warm-up: warmup.share is 0. Raise it or do not ask for a warm-up.")
        return Charge(self.warmup_noise_multiplier, 1.0, 1)

    def charge_of_round(self, steps_per_round: int) -> Charge:
        """Return what one training round costs.

        Raises:
            ConfigError: The plan has no training rounds.
        """
        if self.train_noise_multiplier is None:
            raise ConfigError("This plan has no training rounds: federation.rounds is 0. Raise it or do not train.")
        return Charge(self.train_noise_multiplier, self.sample_rate, steps_per_round)


def plan(proposal: Proposal, declared_patients: int, cohort: Cohort | None = None) -> Plan:
    """Split the proposed epsilon between warm-up and rounds, and calibrate both.

    The warm-up alone costs at most `warmup.share` of epsilon; the rounds fill the rest of the joint composition.

    Args:
        proposal: The shared sections of the configuration.
        declared_patients: The rounded cohort size that the site made public.
        cohort: All sites together: with secure-sum, and with that only, the sample rate follows from it. Until it is
            known a plan with secure-sum holds the warm-up alone.

    Raises:
        ConfigError: Nothing to do, no patients, too many steps, or no noise multiplier keeps the bound; a cohort
            without secure-sum, one of too few sites, or numbers that do not fit.

    Guarantees:
        - within_the_proposal: Warm-up and all rounds together cost at most (epsilon, delta).
        - deterministic: The same public values give the same plan.
        - no_false_cohort_costs_less: Whatever cohort is stated, a round is charged for the rate at which patients are
          drawn and for the noise that is added, as long as no more sites collude than the proposal says.
    """
    if declared_patients < 1:
        raise ConfigError(f"Expected declared_patients={declared_patients} at least 1.")
    privacy, share, rounds = proposal.privacy, proposal.warmup.share, proposal.federation.rounds
    if rounds == 0 and share == 0:
        raise ConfigError("federation.rounds = 0 and warmup.share = 0 leave nothing to learn; raise one of them.")
    together = proposal.train.algorithm == "secure-sum"
    if cohort is not None and not together:
        raise ConfigError("A plan with train.algorithm = local has no cohort: each site trains for itself.")
    rate = min(1.0, privacy.batch_patients / (declared_patients if cohort is None else cohort.patients))
    trained = proposal.training_rounds
    steps = 0 if together and cohort is None else trained * proposal.train.steps_per_round
    charges: list[Charge] = []
    warmup = train = None
    if share > 0:
        target, releases = privacy.epsilon * (share if trained else 1.0), proposal.warmup_releases
        warmup = noise_for(target, privacy.delta, 1.0, releases)
        charges.append(Charge(warmup, 1.0, releases))
    if steps > 0:
        train = noise_for(privacy.epsilon, privacy.delta, rate, steps, charges)
        charges.append(Charge(train, rate, steps))
    shares = 1 if cohort is None else noise_shares(cohort, privacy.colluding_sites)
    if cohort is not None and warmup is not None:
        check_integers(declared_patients, warmup / math.sqrt(shares), WARMUP_GRID)
    if cohort is not None and train is not None:
        # more than twice as many as expected and 128 are sampled with a chance below 2^-64, see client/dp
        check_integers(2 * privacy.batch_patients + 128, train / math.sqrt(shares), GRID)
    cost = epsilon(charges, privacy.delta)
    return Plan(declared_patients, rate, warmup, train, steps, cost, privacy.delta, cohort, shares)


def plans_of(proposal: Proposal, declared_patients: Collection[int]) -> list[Plan]:
    """Return the plan of each site of a run by the declared patients of all of them.

    Raises:
        ConfigError: As `plan`.
    """
    together = proposal.train.algorithm == "secure-sum"
    cohort = Cohort(len(declared_patients), sum(declared_patients)) if together else None
    return [plan(proposal, declared, cohort) for declared in declared_patients]


def delta_warning(delta: float, declared_patients: int) -> str | None:
    """Return why `delta` is too large for a cohort, or None when it is small enough."""
    if delta * declared_patients < 1:
        return None
    return (
        f"privacy.delta = {delta:g} is not below 1/{declared_patients} (one over the declared patients): a delta of "
        "that size allows a mechanism that publishes one patient's images outright. "
        f"Use at most {0.1 / declared_patients:.0e}."
    )
