"""What a run of the default configuration would cost a site with so many patients: an estimate for the first look.

Out of scope: a planned run (`fedmedgan-site budget --config`).
"""

import math
from dataclasses import dataclass
from typing import final

from common.config_text import build_config
from common.privacy import Charge, epsilon

_UNNAMED = ("all",)
LEAST = 2
"""Patients without which there is no run."""


@final
@dataclass(frozen=True)
class Cost:
    """The estimate.

    Attributes:
        declared_patients: What it is computed for.
        from_policy: Whether the site declares that number; else it is the patients found, rounded to two figures.
        rounds: Of the default run.
        steps: Private steps of all rounds together.
        batch_patients: Patients in a step, on average.
        sample_rate: Probability of each patient in each step.
        delta: Of both numbers below.
        training_epsilon: Of the steps alone, without the warm-up, with noise multiplier 1.
        target_epsilon: Of the default run, warm-up included.
        noise_multiplier: What the steps then take.
    """

    declared_patients: int
    from_policy: bool
    rounds: int
    steps: int
    batch_patients: int
    sample_rate: float
    delta: float
    training_epsilon: float
    target_epsilon: float
    noise_multiplier: float | None

    def lines(self) -> list[str]:
        """Return it as text."""
        number = "as policy.toml says" if self.from_policy else "those found, rounded down to two figures"
        more = (
            "more patients, less noise"
            if self.sample_rate < 1
            else f"up to {self.batch_patients} patients everybody is in every step, and their number changes nothing"
        )
        noise = "no noise" if self.noise_multiplier is None else f"a noise multiplier of {self.noise_multiplier:.2f}"
        return [
            f"cost of a run with {self.declared_patients} declared patients ({number}): the default run "
            f"({self.rounds} rounds, {self.steps} private steps, {self.batch_patients} patients a step) with noise "
            f"multiplier 1.0 costs epsilon {self.training_epsilon:.2f} at delta {self.delta:g} in training alone, the "
            "warm-up not counted",
            f"to stay within epsilon {self.target_epsilon:g}, the warm-up counted, training takes {noise}: {more}",
        ]


def estimate(patients: int, declared: int | None = None) -> Cost | None:
    """Return what a default run costs; None with too few patients for one.

    Args:
        patients: Those that were found.
        declared: What the site declares, where it has a policy.

    Guarantees:
        - honest_number: It is computed for the number that it names: the declared one, or two figures of those found.
    """
    from common.plan import plan  # it takes torch along, which `import` does without

    number = declared if declared is not None else _two_figures(patients)
    if min(number, patients) < LEAST:
        return None
    base = build_config({}, {"image.classes": _UNNAMED})
    delta = min(base.privacy.delta, 0.1 / number)
    config = build_config({}, {"image.classes": _UNNAMED, "privacy.delta": delta})
    agreed, privacy = plan(config, number), config.privacy
    alone = epsilon([Charge(1.0, agreed.sample_rate, agreed.steps)], delta)
    return Cost(
        number,
        declared is not None,
        config.federation.rounds,
        agreed.steps,
        privacy.batch_patients,
        agreed.sample_rate,
        delta,
        alone,
        privacy.epsilon,
        agreed.train_noise_multiplier,
    )


def _two_figures(number: int) -> int:
    step = 10 ** max(0, math.floor(math.log10(number)) - 1) if number else 1
    return number // step * step
