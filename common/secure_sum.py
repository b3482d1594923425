"""The numbers of one secure sum, as sites and coordinator both compute them: who takes part, the noise, the grid.

A site rounds its bounded sum with its part of the noise to whole steps of a public grid; the coordinator adds whole
numbers. So it is with gradients and with the warm-up. Out of scope: the sums themselves (client/dp/share,
client/warmup), what is done with them (server/secure_sum, server/warmup_round), masking: there is none yet.

Source: docs/decisions/0011.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import final

import numpy as np
from jaxtyping import Float64, Int32
from torch import Tensor

from common.config import MAX_COHORT_PATIENTS, MAX_SITES
from common.errors import ConfigError, WireError
from common.messages import Scalar

GRID = 2.0**-16
"""Step of the public grid of gradients, in clipping norms."""

WARMUP_GRID = 2.0**-10
"""Step of the public grid of the warm-up, in vectors of length 1: coarser, since every patient of a site is in it."""

MIN_STEPS = 64.0
"""Least deviation of one share in grid steps: what rounding does to the law of the sum is then below e^-40,000."""

TAILS = 17.2
"""No draw of `common.noise.gaussian` is further out, in its standard deviations."""

_LARGEST = 2**31 - 1

COHORT_SETTINGS = ("cohort_sites", "cohort_patients")


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
        """Return what a request says of the cohort."""
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


def check_integers(patients: int, share_noise_multiplier: float, grid: float) -> None:
    """Refuse what the whole numbers cannot carry, from public values alone.

    Args:
        patients: Who can be in one share, with room to spare.
        share_noise_multiplier: Deviation of one site's share over the bound on a patient's contribution.
        grid: Step of the grid over the same bound.

    Raises:
        ConfigError: A share's noise is too fine for the grid, or a share might not fit into 32 bits.

    Guarantees:
        - fits: With so many patients no coordinate of a share exceeds 32 bits. One that did would be cut, which is
          post-processing.
        - fine_grid: The deviation of a share is at least `MIN_STEPS` grid steps.
    """
    if share_noise_multiplier < MIN_STEPS * grid:
        raise ConfigError(
            f"Expected a share's noise of at least {MIN_STEPS * grid:g} times a patient's bound, got "
            f"{share_noise_multiplier:g}: rounding to the grid would show. Raise privacy.colluding_sites, or plan "
            "fewer sites."
        )
    # 1.01 is more than the widening for rounding adds
    largest = patients + 1.01 * TAILS * share_noise_multiplier + 1
    if largest / grid > _LARGEST:
        raise ConfigError(
            f"Expected at most {math.floor(_LARGEST * grid)} times a patient's bound in one share of the sum, got up "
            f"to {largest:.0f}: {patients} patients and {TAILS} times the noise {share_noise_multiplier:g}. "
            "Lower privacy.batch_patients, raise privacy.epsilon, or split a site with so many patients."
        )


def to_integers(noisy: Float64[Tensor, "..."], step: float) -> Int32[np.ndarray, "..."]:
    """Round a sum that has its noise already to whole steps of the grid.

    Guarantees:
        - always_fits: Every number fits into 32 bits; what does not is cut.
    """
    return (noisy / step).round_().clamp_(-_LARGEST, _LARGEST).numpy().astype(np.int32)
