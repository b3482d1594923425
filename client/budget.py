"""What is spent at a site, by run, and what a planned run would cost there. Reads; charges nothing.

What `fedmedgan-site budget` shows. Out of scope: the account itself (common/privacy), charging (client/ledger).
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, final

from client import journal, policy
from client.ledger import Entry
from client.policy import Policy
from common.config import Proposal
from common.errors import ConfigError, PolicyRefusal
from common.look import look_dims
from common.messages import Kind
from common.models import Pair, outline
from common.plan import Plan, plan
from common.privacy import Charge, affordable_rounds, epsilon
from common.secure_sum import Cohort
from common.weights import release_dtype

VERSION = 1


@final
@dataclass(frozen=True)
class RunCost:
    """What one run was charged.

    Attributes:
        run_id: The run.
        releases: Charges; each pays for one release.
        epsilon: Of this run alone; the runs together cost less than the sum.
    """

    run_id: str
    releases: int
    epsilon: float


@final
@dataclass(frozen=True)
class Forecast:
    """What a planned run comes to at this site, today.

    Attributes:
        plan: Sample rate, noise and steps, and the cost of the run alone.
        refusal: Why the policy refuses the run; None where it allows it.
        warmup: Whether all releases of the warm-up can be paid for; None where none is planned.
        rounds: How many of the planned rounds the site can join, refinements of the warm-up among them.
        rounds_planned: How many there are.
        epsilon_after: Of everything charged, with all of the run that can be paid for.
        warmup_releases: Of the planned run; 0 without a warm-up.
        in_order: How many releases can be paid for one after the other, from round 0 of the warm-up or round 1 on.
        releases: How many releases can be paid for, those of the warm-up and of the rounds together.
    """

    plan: Plan
    refusal: str | None
    warmup: bool | None
    rounds: int
    rounds_planned: int
    epsilon_after: float
    warmup_releases: int = 1
    in_order: int = 0
    releases: int = 0

    @property
    def whole(self) -> bool:
        """Whether the site can join all of the run."""
        return self.refusal is None and self.warmup is not False and self.rounds == self.rounds_planned

    @property
    def nothing(self) -> bool:
        """Whether the site can join nothing of the run, by the policy or by what is left of the budget."""
        return self.releases == 0


@final
@dataclass(frozen=True)
class Budget:
    """The state of a data set's budget.

    Attributes:
        site: Its name.
        max_epsilon: The policy's bound.
        delta: The policy's delta.
        spent: Epsilon of everything ever charged.
        runs: By run, in the order of their first charges.
        forecast: Of the planned run, where one was given.
    """

    site: str
    max_epsilon: float
    delta: float
    spent: float
    runs: tuple[RunCost, ...]
    forecast: Forecast | None = None

    @property
    def left(self) -> float:
        """What is left of the bound; a run may cost more alone and fit, since costs do not simply add up."""
        return max(0.0, self.max_epsilon - self.spent)

    def as_json(self) -> dict[str, Any]:
        """Return everything as plain values."""
        forecast = None if self.forecast is None else {**asdict(self.forecast), "whole": self.forecast.whole}
        return {"version": VERSION, **asdict(self), "left": self.left, "forecast": forecast}


def look_up(
    rules: Policy, entries: Sequence[Entry], proposal: Proposal | None = None, cohort: Cohort | None = None
) -> Budget:
    """Add up a ledger, and forecast a planned run.

    Args:
        rules: The site's policy.
        entries: The lines of its ledger.
        proposal: A run that is planned, with its classes.
        cohort: All sites of the planned run together, for one with secure-sum.

    Raises:
        ConfigError: The run cannot be planned: nothing to do, too many steps, or no noise keeps its bound; or a cohort
            is missing, or not asked for.

    Guarantees:
        - spent_is_what_the_ledger_says: The same composition as the ledger's own.
        - rounds_are_what_the_ledger_takes: So many rounds are charged by the ledger, and the next is refused.
    """
    by_run: defaultdict[str, list[Charge]] = defaultdict(list)
    for entry in entries:
        by_run[entry.request.run_id].append(entry.charge)
    runs = tuple(RunCost(name, len(charges), epsilon(charges, rules.delta)) for name, charges in by_run.items())
    spent = epsilon([entry.charge for entry in entries], rules.delta)
    planned = forecast(rules, entries, proposal, cohort) if proposal is not None else None
    return Budget(rules.site, rules.max_epsilon, rules.delta, spent, runs, planned)


def verdict(planned: Forecast) -> str:
    """Return in words whether policy and budget allow a planned run."""
    if planned.refusal is not None:
        return f"refuses it: {planned.refusal}"
    if planned.whole:
        return "allows it"
    return f"allows it; the budget allows {'nothing' if planned.nothing else 'a part'} of it"


def extent(planned: Forecast) -> str:
    """Return in words what of a planned run the site can join."""
    if planned.whole:
        return "the whole run"
    if planned.nothing:
        return "nothing of it"
    rounds = f"{planned.rounds} of {planned.rounds_planned} rounds"
    if planned.warmup:
        return f"the warm-up and {rounds}"
    if planned.rounds == 0:
        return "the first release of the warm-up"
    return rounds if planned.warmup is None else f"{rounds}, not the warm-up"


def forecast(
    rules: Policy, entries: Sequence[Entry], proposal: Proposal, cohort: Cohort | None = None, run_id: str = ""
) -> Forecast:
    """Forecast what a run comes to at a site.

    Args:
        rules: The site's policy.
        entries: The lines of its ledger.
        proposal: The run, with its classes.
        cohort: All sites of the run together, for one with secure-sum.
        run_id: Of a run that may be under way: what it was charged already is not paid for again.

    Raises:
        ConfigError: As `look_up`.
    """
    if proposal.train.algorithm == "secure-sum" and cohort is None:
        raise ConfigError(
            "With train.algorithm = secure-sum the cost follows from all sites together. "
            "Add --cohort-sites and --cohort-patients, as the coordinator announces them."
        )
    agreed, rounds = plan(proposal, rules.declared_patients, cohort), proposal.federation.rounds
    releases = proposal.warmup_releases
    refusal, warmup, joined, in_order = _refusal(rules, proposal, agreed), None, 0, 0
    taken = [entry.charge for entry in entries]
    kinds = [entry.request.kind for entry in entries if entry.request.run_id == run_id]
    looks = kinds.count(Kind.WARMUP)

    def pay(charge: Charge, wanted: int, before: int) -> int:
        before = min(before, wanted)
        more = affordable_rounds(taken, charge, wanted - before, rules.max_epsilon, rules.delta)
        taken.extend([charge] * more)
        return before + more

    if agreed.warmup_noise_multiplier is not None:
        paid = 0 if refusal else pay(agreed.charge_of_warmup(), releases, looks)
        warmup, joined, in_order = paid == releases, max(0, paid - 1), paid
    if agreed.train_noise_multiplier is not None and refusal is None:
        charge = agreed.charge_of_round(proposal.train.steps_per_round)
        trained = pay(charge, proposal.training_rounds, len(kinds) - looks)
        joined, in_order = joined + trained, in_order + (0 if warmup is False else trained)
    paid_for = len(taken) - len(entries)
    return Forecast(agreed, refusal, warmup, joined, rounds, epsilon(taken, rules.delta), releases, in_order, paid_for)


def _refusal(rules: Policy, proposal: Proposal, agreed: Plan) -> str | None:
    """Return why the policy refuses a run, by the checks that the agent makes."""
    pair = outline(proposal.model, proposal.image, len(proposal.image.classes))
    longest = max(look_dims(proposal.image).values())
    planned: list[tuple[Kind, Pair | int]] = [(Kind.WARMUP, longest)] * (agreed.warmup_noise_multiplier is not None)
    kind = Kind.TRAIN if proposal.train.algorithm == "local" else Kind.GRADIENT
    planned += [(kind, pair)] * (agreed.train_noise_multiplier is not None)
    try:
        policy.check_proposal(rules, proposal)
        policy.check_plan(rules, agreed)
        for kind, asked in planned:
            allowed = journal.release_schema(kind, journal.reply_shapes(proposal, asked), release_dtype(proposal, kind))
            policy.check_reply(rules, allowed.size_bytes)
    except PolicyRefusal as error:
        return str(error)
    return None
