"""What a finished run leaves behind: the generator, the privacy card, sheets by class, the report.

The card follows NIST SP 800-226: unit, relation, figures, mechanism, accountant, trust model, randomness, limits.
Out of scope: drawing the report (server/report), what a release costs (common/privacy).
"""

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from common.artefact import save_generator
from common.config import Config
from common.errors import StorageError
from common.files import write_atomic
from common.generate import file_names
from common.sheets import class_row, label_width, write_label, write_png
from server.checkpoint import State
from server.records import RoundRecord, SiteRelease
from server.report import round_sheets, round_up, write_report
from server.rounds import averaged_pair
from server.run_folder import RunFolder

SIMULATED_SECRETS = "simulated: derived from the seed, for reproduction; not private against anyone who knows the seed"
MAX_SHEET_ROWS = 12

_MECHANISM = {
    "warm_up": "Gaussian noise on sums over all patients of vectors of norm at most 1, one vector a patient; "
    "one release a run",
    "training": "Poisson sampling of patients; each sampled patient's mean gradient is clipped to max_grad_norm; "
    "Gaussian noise of noise_multiplier x max_grad_norm on the sum, divided by a public constant; the generator and "
    "the weights that are sent are post-processing",
}
_NOISE = (
    "Drawn and added in float64, the noisy sum rounded to a public grid of 2^-16 of its deviation, then to float32; "
    "each number is the sum of four normal numbers over two, against attacks on the low bits of floating-point noise "
    "(Holohan and Braghin 2021, arXiv 2107.10138); there is no exact argument as for noise on integers"
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


def write_results(
    config: Config, folder: RunFolder, state: State, records: list[RoundRecord], secrets: str = SIMULATED_SECRETS
) -> None:
    """Write generator.safetensors and .json, privacy.json, samples/class-*.png and report.html.

    Args:
        config: The run's configuration.
        folder: Its folder.
        state: The last checkpoint; its averaged generator is the result.
        records: Every round up to it.
        secrets: Where noise and sampling came from, in words.

    Raises:
        StorageError: A file could not be written, or a sheet could not be read.
    """
    card = privacy_card(config, records, secrets)
    spent = {name: site["epsilon_spent"] for name, site in card["sites"].items()}
    generator = averaged_pair(config, state).generator
    save_generator(folder.path, generator, config, folder.run_id, state.round, spent)
    content = json.dumps(card, indent=2, ensure_ascii=False, allow_nan=False)
    write_atomic(folder.path / "privacy.json", content.encode())
    write_class_sheets(folder.samples, config.image.classes)
    write_report(folder.path)


def privacy_card(config: Config, records: Sequence[RoundRecord], secrets: str) -> dict[str, Any]:
    """Put the guarantee of a run into plain values, ready for JSON.

    Guarantees:
        - worst_site: The stated epsilon is the largest that any site reported.
        - rounded_up: The sentence never states less epsilon than was spent.
    """
    sites = {name: _site(records, name) for name in sorted({name for record in records for name in record.sites})}
    worst = max((site["epsilon_spent"] for site in sites.values()), default=0.0)
    return {
        "version": 1,
        "statement": _statement(worst, config.privacy.delta) if sites else "No site released anything.",
        "unit": "patient",
        "relation": "add or remove all images of one patient",
        "epsilon_max": worst,
        "delta": config.privacy.delta,
        "sites": sites,
        "mechanism": _MECHANISM | {"max_grad_norm": config.privacy.max_grad_norm},
        "accountant": "PLD, dp-accounting, pessimistic: an upper bound",
        "trust_model": "local noise: the guarantee holds against the coordinator and all other sites",
        "randomness": secrets,
        "noise": _NOISE,
        "not_covered": list(_NOT_COVERED),
    }


def write_class_sheets(samples: Path, classes: Sequence[str]) -> None:
    """Stack each class's row of the round sheets, the round's number at the left, into class-NAME.png.

    Args:
        samples: Holds round-*.png; at most 12 of them, the first and the last among these, become rows.
        classes: Names in the order of their numbers.

    Raises:
        StorageError: A sheet does not read, or a file could not be written.
    """
    sheets = {f"round {number}": _open(path) for number, path in thin_out(round_sheets(samples), MAX_SHEET_ROWS)}
    if not sheets:
        return
    margin = label_width(list(sheets))
    for number, file in enumerate(file_names(classes)):
        rows = {label: class_row(sheet, number, classes).reduce(2) for label, sheet in sheets.items()}
        height, width = max(row.height for row in rows.values()), max(row.width for row in rows.values())
        stacked = Image.new("L", (margin + width, len(rows) * height), 255)
        for place, (label, row) in enumerate(rows.items()):
            stacked.paste(row, (margin, place * height))
            write_label(stacked, label, place * height, height)
        write_png(samples / f"class-{file}.png", stacked)


def thin_out(items: Sequence[tuple[int, Path]], most: int) -> list[tuple[int, Path]]:
    """Pick at most `most` items, evenly spaced, the first and the last among them."""
    if len(items) <= most:
        return list(items)
    return [items[round(place * (len(items) - 1) / (most - 1))] for place in range(most)]


def _site(records: Sequence[RoundRecord], name: str) -> dict[str, Any]:
    released = [(record.round, record.sites[name]) for record in records if name in record.sites]
    last = released[-1][1]
    counts = Counter((number == 0, _terms(release)) for number, release in released)
    return {
        "declared_patients": last.declared_patients,
        "epsilon_spent": max(release.epsilon_spent for _, release in released),
        "epsilon_allowed": last.epsilon_allowed,
        "releases": [
            {
                "kind": "warm-up" if warmup else "train",
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


def _statement(epsilon: float, delta: float) -> str:
    return (
        f"For every patient at every site, everything that left the site is ({round_up(epsilon)}, "
        f"{delta:g})-differentially private with respect to adding or removing all images of that patient, as long as "
        "the site's random numbers stay secret."
    )


def _open(path: Path) -> Image.Image:
    try:
        with Image.open(path, formats=["PNG"]) as sheet:
            return sheet.convert("L")
    except (OSError, SyntaxError, ValueError) as error:
        raise StorageError(
            f"The sheet {path} does not read ({type(error).__name__}). Delete it, then run the same command again."
        ) from error
