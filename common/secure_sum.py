"""The numbers of one secure sum, as sites and coordinator both compute them: who takes part, the noise, the grid.

A site rounds its clipped sum with its part of the noise to whole steps of a public grid; the coordinator adds whole
numbers. Out of scope: the sum itself (client/dp/share), what is done with it (server/secure_sum), masking: there is
none yet.

Source: docs/decisions/0011.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import final

from common.config import MAX_COHORT_PATIENTS, MAX_SITES, PrivacyConfig
from common.errors import ConfigError, WireError
from common.messages import Scalar

GRID = 2.0**-16
"""Step of the public grid, in clipping norms."""

MIN_STEPS = 64.0
"""Least deviation of one share in grid steps: what rounding does to the law of the sum is then below e^-40,000."""

TAILS = 17.2
"""No draw of `common.noise.gaussian` is further out, in its standard deviations."""

_LARGEST = 2**31 - 1


@final
@dataclass(frozen=True)
class Cohort:
    """All sites of a run together, as the coordinator states them to everybody: public.

    Attributes:
        sites: How many there are.
        patients: Sum of the numbers that they declare.
    """

    sites: int
    patients: int

    def settings(self) -> dict[str, Scalar]:
        """Return what a request for a gradient says of the cohort."""
        return {"cohort_sites": self.sites, "cohort_patients": self.patients}


def parse_cohort(settings: Mapping[str, object], declared_patients: int, min_patients: int) -> Cohort:
    """Read the cohort from the settings of a request, as a site that believes none of it.

    Args:
        settings: Of the request, exactly these.
        declared_patients: Of this site.
        min_patients: What every other site declares at least.

    Raises:
        WireError: A setting is missing, extra, no whole number or out of bounds; or the numbers leave no room for this
            site and the others.
    """
    sites, patients = settings.get("cohort_sites"), settings.get("cohort_patients")
    if len(settings) != 2 or type(sites) is not int or type(patients) is not int:
        raise WireError("Expected the settings cohort_sites and cohort_patients as whole numbers and no others.")
    least = declared_patients + (sites - 1) * min_patients
    if not 1 <= sites <= MAX_SITES or not least <= patients <= MAX_COHORT_PATIENTS:
        raise WireError(
            f"Expected a cohort of 1 to {MAX_SITES} sites that together declare this site's {declared_patients} "
            f"patients, {min_patients} for each of the others, and at most {MAX_COHORT_PATIENTS}."
        )
    return Cohort(sites, patients)


def noise_shares(cohort: Cohort, colluding_sites: int | str) -> int:
    """Return into how many equal parts the noise of a step is split: the sites that are surely honest and there.

    Raises:
        ConfigError: As many sites may collude as there are.
    """
    if colluding_sites == "all":
        return 1
    if not 0 <= int(colluding_sites) < cohort.sites:
        raise ConfigError(
            f"Expected privacy.colluding_sites={colluding_sites} below the number of sites, {cohort.sites}: nobody "
            'would be left to add noise. Lower it, or set "all".'
        )
    return cohort.sites - int(colluding_sites)


def check_integers(privacy: PrivacyConfig, share_noise_multiplier: float) -> None:
    """Refuse what the whole numbers cannot carry, from public values alone.

    Args:
        privacy: Expected patients in a step.
        share_noise_multiplier: Deviation of one site's share over the clipping norm.

    Raises:
        ConfigError: A share's noise is too fine for the grid, or a share might not fit into 32 bits.

    Guarantees:
        - fits: With at most twice as many sampled patients as expected and 128 (more have a chance below 2^-64, see
          client/dp) no coordinate of a share exceeds 32 bits. One that did would be cut, which is post-processing.
        - fine_grid: The deviation of a share is at least `MIN_STEPS` grid steps.
    """
    if share_noise_multiplier < MIN_STEPS * GRID:
        raise ConfigError(
            f"Expected a share's noise of at least {MIN_STEPS * GRID:g} clipping norms, got "
            f"{share_noise_multiplier:g}: rounding to the grid would show. Raise privacy.colluding_sites, or plan "
            "fewer sites."
        )
    # 1.01 is more than the widening for rounding adds
    largest = 2 * privacy.batch_patients + 128 + 1.01 * TAILS * share_noise_multiplier + 1
    if largest / GRID > _LARGEST:
        raise ConfigError(
            f"Expected at most {math.floor(_LARGEST * GRID)} clipping norms in one share of the sum, got up to "
            f"{largest:.0f}: twice privacy.batch_patients={privacy.batch_patients} and {TAILS} times the noise "
            f"{share_noise_multiplier:g}. Lower privacy.batch_patients, or raise privacy.epsilon."
        )
