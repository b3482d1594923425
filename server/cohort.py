"""Who takes part in a run with secure-sum: fixed before the first release, since everybody's noise follows from it.

`cohort.json` in the run folder is written before a site is asked; from then on no other cohort is ever stated.
With local training there is no cohort: whoever is here takes part. Out of scope: greeting (server/roster), the numbers
that follow (common/secure_sum).
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from common.config import Config
from common.errors import FederationError
from common.plan import plan
from common.secure_sum import Cohort
from server.rounds import Members
from server.run_folder import RunFolder, read_fixed, write_fixed

Declared = Mapping[str, int]
"""Declared patients by site; empty with local training."""

_KEY = "declared_patients"


def fix_cohort(folder: RunFolder, config: Config, members: Members) -> Declared:
    """Return who takes part: those who may and are here, or whom this run named before.

    Raises:
        FederationError: Nobody may.
        ResumeError: `cohort.json` does not read.
        StorageError: It cannot be written.
    """
    if config.train.algorithm == "local":
        return {}
    if stored := stored_cohort(folder):
        return stored
    cohort = planned_cohort(config, members)
    if not members:
        raise FederationError("No site takes part: the handshake above says why. Mend the sites, then resume.")
    if not cohort:
        raise FederationError(
            f"No site declares privacy.min_patients={config.privacy.min_patients} patients. Lower it, or ask others."
        )
    write_fixed(_path(folder), _KEY, cohort)
    return cohort


def planned_cohort(config: Config, members: Members) -> Declared:
    """Return who would take part, were the cohort fixed now: those who may and are here; empty with local training."""
    if config.train.algorithm == "local":
        return {}
    declared = {name: member.declared_patients for name, member in members.items()}
    return {name: patients for name, patients in declared.items() if patients >= config.privacy.min_patients}


def stored_cohort(folder: RunFolder) -> Declared:
    """Return whom the run named before, if it did.

    Raises:
        ResumeError: `cohort.json` does not read.
    """
    return read_fixed(_path(folder), _KEY, int)


def _path(folder: RunFolder) -> Path:
    return folder.path / "cohort.json"


def cohort_of(declared: Declared) -> Cohort:
    """Return the numbers that everybody is told."""
    return Cohort(len(declared), sum(declared.values()))


def taking_part(config: Config, members: Members, declared: Declared) -> Members:
    """Return the members of the cohort that are here, with the plan that follows from it; nobody else is asked."""
    cohort = cohort_of(declared)
    here = {name: member for name, member in members.items() if member.declared_patients == declared.get(name)}
    return {name: replace(member, plan=plan(config, member.declared_patients, cohort)) for name, member in here.items()}


def least_sites(config: Config, declared: Declared) -> int:
    """Return how many sites must answer: with `colluding_sites` a number, no more than that may be missing.

    A site that is missing takes its part of the noise with it, and the guarantee reckons with that many.
    """
    colluding = config.privacy.colluding_sites
    missing = len(declared) if colluding == "all" else colluding
    return max(config.federation.min_sites, len(declared) - missing)
