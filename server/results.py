"""What a finished run leaves behind: the generator, the privacy card, sheets by class, the report.

The card follows NIST SP 800-226: unit, relation, figures, mechanism, accountant, trust model, randomness, limits.
Out of scope: drawing the report (server/report), what a release costs (common/privacy).
"""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from common.artefact import save_generator
from common.config import Config
from common.errors import StorageError
from common.files import write_atomic
from common.generate import file_names
from common.plan import Plan, plan
from common.privacy import Charge, epsilon
from common.secure_sum import GRID, Cohort
from common.sheets import class_row, label_width, write_label, write_png
from server.checkpoint import State
from server.declared import newest_releases
from server.pace import round_up
from server.records import RoundRecord, SiteRelease, read_records
from server.report import fit_sheets, round_sheets, write_report
from server.rounds import averaged_pair
from server.run_folder import RunFolder

SITES_SECRETS = "drawn by each site from its operating system; no seed, nothing that the coordinator knows"
SIMULATED_SECRETS = "simulated: derived from the seed, for reproduction; not private against anyone who knows the seed"
MAX_SHEET_ROWS = 12

_MECHANISM = {
    "warm_up": "Gaussian noise on sums over all patients of vectors of norm at most 1, one vector a patient in each "
    "of its releases",
    "training": "Poisson sampling of patients; each sampled patient's mean gradient is clipped to max_grad_norm; "
    "Gaussian noise of noise_multiplier x max_grad_norm on the sum, divided by a public constant; the generator and "
    "the weights that are sent are post-processing",
}
_NOISE = (
    "Drawn and added in float64, the noisy sum rounded to a public grid of 2^-16 of its deviation, then to float32; "
    "each number is the sum of four normal numbers over two, against attacks on the low bits of floating-point noise "
    "(Holohan and Braghin 2021, arXiv 2107.10138); there is no exact argument as for noise on integers"
)
_TOGETHER = {
    "warm_up": "Gaussian noise on the sum over all patients of all sites of vectors of norm at most 1, one vector a "
    "patient in each of its releases; each site adds its share of the noise and rounds to a public grid",
    "training": "One step of one discriminator a round, of all sites together (secure-sum). Poisson sampling of "
    "patients with one public rate at all sites; each sampled patient's mean gradient is clipped to max_grad_norm; "
    "each site adds its share of Gaussian noise to its sum and rounds to a public grid; the coordinator adds the whole "
    "numbers, divides by a public constant and steps; it alone has the generator, which is post-processing",
}
_NOISE_TOGETHER = (
    "Drawn and added in float64, then rounded to whole steps of 2^-16 max_grad_norm, in the warm-up of 2^-10. The sum "
    "of rounded normal numbers has, up to less than e^-40,000, the law of a rounded normal number with rounding noise "
    "of public law on top: post-processing of the Gaussian mechanism (docs/decisions/0011). That is proven for numbers "
    "that are exactly normal. Drawn in float64, one in about 2^34 falls to the next whole step; against attacks on the "
    "low bits each is the sum of four normal numbers over two. For this part there is an argument, no proof"
)
_NOT_COVERED = (
    "What is true of the population as a whole, with or without any one patient: that is what the generator learns.",
    "A patient known at k sites: what each site releases composes, up to k times the figure; sites are not linked.",
    "Declared cohort sizes, the names of sites and classes, and which rounds a site took part in: they are public.",
    "How long a site takes to answer.",
    "In the simulator: evaluation on held-out patients; their figures are exact and not noised.",
    "A release that a site charged but whose answer was lost after its last one here: the site's own ledger is the "
    "authority.",
)


def write_results(config: Config, folder: RunFolder, state: State, records: list[RoundRecord], secrets: str) -> None:
    """Write generator.safetensors and .json, privacy.json, samples/class-*.png and report.html.

    Args:
        config: The run's configuration.
        folder: Its folder.
        state: The last checkpoint; its averaged generator is the result.
        records: Every round up to it; to what they released comes what stands in `failed.jsonl` and `declared.json`.
        secrets: Where noise and sampling came from, in words.

    Raises:
        ResumeError: `failed.jsonl` does not read.
        StorageError: A file could not be written, or a sheet could not be read.
    """
    not_kept = [*newest_releases(folder.declared), *read_records(folder.failed)]
    card = privacy_card(config, [*not_kept, *records], secrets, state.cohort)
    spent = {name: site["epsilon_spent"] for name, site in card["sites"].items()}
    generator = averaged_pair(config, state).generator
    save_generator(folder.path, generator, config, folder.run_id, state.round, spent)
    content = json.dumps(card, indent=2, ensure_ascii=False, allow_nan=False)
    write_atomic(folder.path / "privacy.json", content.encode())
    write_class_sheets(folder.samples, config.image.classes)
    write_report(folder.path)


def privacy_card(
    config: Config, records: Sequence[RoundRecord], secrets: str, declared: Mapping[str, int] | None = None
) -> dict[str, Any]:
    """Put the guarantee of a run into plain values, ready for JSON.

    Args:
        config: The run's configuration.
        records: Its rounds, and attempts at a round that were answered. A site answers one question a round, so that
            two records of a round hold the same release of a site.
        secrets: Where noise and sampling came from, in words.
        declared: With secure-sum the declared patients of every site of the run.

    Guarantees:
        - worst_site: The stated epsilon is the largest that any site reported.
        - rounded_up: The sentence never states less epsilon than was spent.
        - failed_rounds_count: A release counts whether or not its round was kept, and once however often it came.
        - assumption_in_the_sentence: Where sites share noise, the sentence speaks of their sum, says what is assumed,
          and what whoever sees a single site's parts could learn.
    """
    together = config.train.algorithm == "secure-sum"
    kind = "gradient" if together else "train"
    sites = {
        name: _site(records, name, kind, config.refinements)
        for name in sorted({name for record in records for name in record.sites})
    }
    worst = max((site["epsilon_spent"] for site in sites.values()), default=0.0)
    shared = _secure_sum(config, declared) if together and declared else None
    return {
        "version": 1,
        "statement": _statement(worst, config.privacy.delta, shared) if sites else "No site released anything.",
        "unit": "patient",
        "relation": "add or remove all images of one patient",
        "epsilon_max": worst,
        "delta": config.privacy.delta,
        "sites": sites,
        "mechanism": (_TOGETHER if together else _MECHANISM) | {"max_grad_norm": config.privacy.max_grad_norm},
        "secure_sum": shared,
        "accountant": "PLD, dp-accounting, pessimistic: an upper bound",
        "trust_model": _trust_model(config, len(declared or {})),
        "randomness": secrets,
        "noise": _NOISE_TOGETHER if together else _NOISE,
        "not_covered": list(_NOT_COVERED),
    }


def write_class_sheets(samples: Path, classes: Sequence[str]) -> None:
    """Stack each class's row of the sheets, what each is of at the left, into class-NAME.png.

    Args:
        samples: Holds round-*.png, of which at most 12, the first and the last among these, become rows; before them
            those of fit-*.png, from the first fit.
        classes: Names in the order of their numbers.

    Raises:
        StorageError: A sheet does not read, or a file could not be written.
    """
    sheets = {f"fit, step {step}": _open(path) for step, path in fit_sheets(samples)}
    sheets |= {f"round {number}": _open(path) for number, path in thin_out(round_sheets(samples), MAX_SHEET_ROWS)}
    if not sheets:
        return
    margin = label_width(list(sheets))
    for number, file in enumerate(file_names(classes)):
        rows = {label: class_row(sheet, number, classes).reduce(2) for label, sheet in sheets.items()}
        height, width = max(row.height for row in rows.values()), max(row.width for row in rows.values())
        stacked = Image.new(next(iter(rows.values())).mode, (margin + width, len(rows) * height), "white")
        for place, (label, row) in enumerate(rows.items()):
            stacked.paste(row, (margin, place * height))
            write_label(stacked, label, place * height, height)
        write_png(samples / f"class-{file}.png", stacked)


def thin_out(items: Sequence[tuple[int, Path]], most: int) -> list[tuple[int, Path]]:
    """Pick at most `most` items, evenly spaced, the first and the last among them."""
    if len(items) <= most:
        return list(items)
    return [items[round(place * (len(items) - 1) / (most - 1))] for place in range(most)]


def _secure_sum(config: Config, declared: Mapping[str, int]) -> dict[str, Any]:
    cohort = Cohort(len(declared), sum(declared.values()))
    agreed = plan(config, min(declared.values()), cohort)
    return {
        "cohort_sites": cohort.sites,
        "cohort_patients": cohort.patients,
        "colluding_sites": config.privacy.colluding_sites,
        "noise_multiplier": agreed.train_noise_multiplier,
        "sample_rate": agreed.sample_rate,
        "noise_shares": agreed.noise_shares,
        "noise_multiplier_of_a_share": agreed.share_noise_multiplier if agreed.steps else None,
        "warmup_noise_of_a_share": agreed.share_warmup_noise if agreed.warmup_noise_multiplier else None,
        "grid_step": GRID * config.privacy.max_grad_norm,
        "assumption": _assumption(config, cohort.sites),
        "epsilon_of_parts_seen": _epsilon_of_parts(config, agreed),
    }


def _epsilon_of_parts(config: Config, agreed: Plan) -> float:
    """Return what the whole run would cost the patients of a site whose own parts somebody sees."""
    parts: list[Charge] = []
    if config.warmup_releases:
        parts.append(Charge(agreed.share_warmup_noise, 1.0, config.warmup_releases))
    if agreed.steps:
        parts.append(Charge(agreed.share_noise_multiplier, agreed.sample_rate, agreed.steps))
    return epsilon(parts, agreed.delta)


def _assumption(config: Config, sites: int) -> str:
    colluding = config.privacy.colluding_sites
    if colluding == "all" or colluding >= sites - 1:
        return "none: each site's own noise carries the guarantee"
    return (
        f"only the sum over the sites is seen, and at most {colluding} of {sites} sites collude with the coordinator "
        "or drop out. Nothing in this release hides the shares of single sites, so the figures hold in simulation only"
    )


def _trust_model(config: Config, sites: int) -> str:
    local = "local noise: the guarantee holds against the coordinator and all other sites"
    if config.train.algorithm == "local":
        return local
    assumed = _assumption(config, sites)
    return local if assumed.startswith("none") else f"distributed noise. ASSUMPTION: {assumed}"


def _site(records: Sequence[RoundRecord], name: str, kind: str, refinements: int) -> dict[str, Any]:
    released = {record.round: record.sites[name] for record in records if name in record.sites}
    last = released[max(released)]
    counts = Counter((number <= refinements, _terms(released[number])) for number in sorted(released))
    return {
        "declared_patients": last.declared_patients,
        "epsilon_spent": max(release.epsilon_spent for release in released.values()),
        "epsilon_allowed": last.epsilon_allowed,
        "releases": [
            {
                "kind": "warm-up" if warmup else kind,
                "noise_multiplier": noise_multiplier,
                "sample_rate": sample_rate,
                "steps": steps,
                "count": count,
            }
            for (warmup, (noise_multiplier, sample_rate, steps)), count in counts.items()
        ],
    }


def _terms(release: SiteRelease) -> tuple[float, float, int]:
    return release.noise_multiplier, release.sample_rate, release.steps


def _statement(spent: float, delta: float, shared: Mapping[str, Any] | None) -> str:
    private = (
        f"({round_up(spent)}, {delta:g})-differentially private with respect to adding or removing all images of that "
        "patient"
    )
    if shared is None or shared["noise_shares"] == 1:
        return (
            f"For every patient at every site, everything that left the site is {private}, as long as the site's "
            "random numbers stay secret."
        )
    return (
        f"For every patient at every site, the sum over the sites of what left them is {private}, as long as the "
        f"sites' random numbers stay secret, and ASSUMING: {shared['assumption']}. For whoever sees what a single site "
        f"sent, epsilon is up to {round_up(shared['epsilon_of_parts_seen'])}."
    )


def _open(path: Path) -> Image.Image:
    try:
        with Image.open(path, formats=["PNG"]) as sheet:
            return sheet.convert("L" if sheet.mode == "L" else "RGB")
    except (OSError, SyntaxError, ValueError) as error:
        raise StorageError(
            f"The sheet {path} does not read ({type(error).__name__}). Delete it, then run the same command again."
        ) from error
