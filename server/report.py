"""The report of a run: one HTML file that holds everything to look at and needs no network.

It reads only what stands in the run folder, so it can be written anew at any time. Out of scope: what stands there
(server/results).
"""

import base64
import io
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

from jinja2 import Environment, StrictUndefined, UndefinedError
from markupsafe import Markup
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from common.artefact import GeneratorInfo, load_info
from common.config import Config
from common.config_text import build_config, read_config
from common.errors import ResumeError
from common.files import write_atomic
from common.generate import file_names
from server.pace import amount, round_up
from server.records import RoundRecord, read_records
from server.report_page import PAGE

MAX_FILE_BYTES = 64 * 1024**2
MAX_CLASS_SHEETS = 16
MAX_POINTS = 300
"""Of one curve; a run may have thousands of rounds."""
LINES = ("#0b6e99", "#c8553d", "#5b8c2a", "#7a4fa3", "#b07d12", "#3a3a3a")
"""Colours of the sites' curves; with more sites than colours a band from the smallest to the largest is drawn."""

_KNOWN_FILES = {
    "config.toml": "every setting of the run",
    "run.json": "the run's id in the sites' ledgers",
    "cohort.json": "with secure-sum: who takes part, with the declared patients",
    "run.lock": "held while the run is at work",
    "declared.json": "what each site spent, as it declared with its newest release",
    "now.txt": "what the run does at this moment",
    "handshake.json": "what each site said before it was asked: versions, and how many rounds it will join",
    "start": "the generator that the run started from, trained on public data",
    "metrics.jsonl": "one line a round: sites, cost, accuracy on fakes, time",
    "generator.safetensors": "the weights of the generator: the result",
    "generator.json": "what the weights are, and their SHA-256",
    "privacy.json": "the guarantee, for machines",
    "evaluation.json": "the test on held-out patients, for machines",
    "samples": "sheets of the same latents after every round, and one sheet a class",
    "checkpoints": "the last three states, to resume from",
}
_BLUE, _GREY = "#0b6e99", "#8a8a8a"
_SVG: dict[Any, Any] = {"svg.fonttype": "none", "svg.hashsalt": "fedmedgan", "font.size": 9.0, "axes.linewidth": 0.7}


@final
@dataclass(frozen=True)
class Curve:
    """A drawing, what stands above and below it, and the colour of each site in it."""

    title: str
    note: str
    svg: Markup
    legend: Sequence[tuple[str, str]] = ()


def write_report(run: Path) -> Path:
    """Write report.html from the files of a run folder and return its path.

    Raises:
        ResumeError: A file is missing or does not decode.
        WireError: generator.json does not decode.
        StorageError: The report could not be written.

    Guarantees:
        - self_contained: The file refers to nothing outside itself and holds no script.
        - escaped: Names and texts from the files are shown as text, whatever they hold.
    """
    config, records = build_config(read_config(run / "config.toml")), read_records(run / "metrics.jsonl")
    info, card = load_info(run), _read_json(run / "privacy.json")
    evaluation = _read_json(run / "evaluation.json") if (run / "evaluation.json").exists() else None
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    environment.filters |= {"up": round_up, "amount": amount, "figure": _figure, "percent": _percent}
    shown = _shown(run, config, info, records, card)
    try:
        html = environment.from_string(PAGE).render(evaluation=evaluation, **shown)
    except (UndefinedError, TypeError, ValueError) as error:
        raise ResumeError(
            f"privacy.json or evaluation.json in {run} does not hold what is expected ({error}). "
            "Run the same command with --resume to write the results again."
        ) from error
    write_atomic(run / "report.html", html.encode())
    return run / "report.html"


def round_sheets(samples: Path) -> list[tuple[int, Path]]:
    """List the sheets of a run's rounds by number, in order."""
    return _sheets(samples, "round")


def fit_sheets(samples: Path) -> list[tuple[int, Path]]:
    """List the sheets of the first fit by step, in order."""
    return _sheets(samples, "fit")


def _sheets(samples: Path, what: str) -> list[tuple[int, Path]]:
    matches = ((re.fullmatch(rf"{what}-(\d+)\.png", path.name), path) for path in samples.glob(f"{what}-*.png"))
    return sorted((int(match[1]), path) for match, path in matches if match)


def attack_bounds(epsilon: float, delta: float) -> tuple[float, float]:
    """Return what the guarantee bounds of a guess whether one patient took part.

    Args:
        epsilon: The stated figure.
        delta: The stated figure.

    Returns:
        The largest share of right guesses at even odds, and the largest share of patients found at 0.1 % false alarms.

    Source: Kairouz, Oh and Viswanath 2015 (arXiv 1311.0776), theorem 2.1.
    """
    growth = math.exp(min(epsilon, 700.0))
    return (growth + delta) / (growth + 1), min(1.0, 0.001 * growth + delta, 1 - (0.999 - delta) / growth)


def _shown(
    run: Path, config: Config, info: GeneratorInfo, records: Sequence[RoundRecord], card: Mapping[str, Any]
) -> dict[str, Any]:
    sheets = round_sheets(run / "samples")
    several = len(sheets) + len(fit_sheets(run / "samples")) > 1
    named = zip(config.image.classes, file_names(config.image.classes), strict=True)
    by_class = [(name, run / "samples" / f"class-{file}.png") for name, file in named]
    there = [(name, path) for name, path in by_class if path.exists()][:MAX_CLASS_SHEETS]
    names = sorted({name for record in records for name in record.sites})
    return {
        "name": run.resolve().name,
        "config": config,
        "info": info,
        "card": card,
        "seconds": sum(record.seconds for record in records),
        "upload_bytes": sum(record.upload_bytes for record in records),
        "download_bytes": sum(record.download_bytes for record in records),
        "a_site": records[-1].bytes_a_site if records else (0, 0),
        "attack_bounds": attack_bounds,
        "final_sheet": (sheets[-1][0], _data_uri(sheets[-1][1])) if sheets else None,
        "class_sheets": [(name, _data_uri(path)) for name, path in there] if several else [],
        "records_count": len(records),
        "unseen": _unseen(config, records),
        "curves": list(_curves(config, records, names)),
        "refusals": _refusals(records),
        "settings": _settings(config, "simulated" in str(card.get("randomness"))),
        "files": _files(run),
    }


def _unseen(config: Config, records: Sequence[RoundRecord]) -> tuple[str, ...]:
    """Return the classes that drowned, by the last round of the warm-up that was fitted."""
    fitted = [record for record in records if record.round <= config.refinements and not record.lost]
    return fitted[-1].unseen if fitted else ()


def _settings(config: Config, simulated: bool) -> list[tuple[str, list[tuple[str, Any]]]]:
    """List what the run was set to; between machines nothing that a simulation alone reads."""
    left_out = {("performance", "engine"), ("performance", "parallel_sites")}
    return [
        (section, [pair for pair in getattr(config, section) if simulated or (section, pair[0]) not in left_out])
        for section in Config.model_fields
        if simulated or section not in ("simulation", "run")
    ]


def _curves(config: Config, records: Sequence[RoundRecord], names: Sequence[str]) -> Iterator[Curve]:
    trained = [record for record in records if record.round > config.refinements and not record.lost]
    told = [(record.round, record.fake_accuracy) for record in trained if record.fake_accuracy is not None]
    if len(records) == 1 and not trained:  # of one point no curve is to be seen
        return
    if names:
        yield _epsilon_curve(records, names)
    if told:
        figure, axes = _axes("share told")
        axes.axhline(0.5, color=_GREY, linestyle=":", linewidth=1)
        _plot(axes, told)
        axes.set_ylim(-0.03, 1.03)
        note = "Near 1 the discriminator is ahead, near 0.5 it cannot tell. Mean over the sites; reads no patient."
        yield Curve("Fakes that the discriminators tell to be fakes", note, _svg(figure))
    if trained:
        figure, axes = _axes("L2 norm")
        _plot(axes, [(record.round, record.update_norm) for record in trained])
        axes.set_ylim(bottom=0)
        yield Curve("Change of the global weights", "How far one round moves both networks.", _svg(figure))
    if records:
        figure, axes = _axes("seconds")
        shown = _thinned([(record.round, record.seconds) for record in records])
        axes.bar(*zip(*shown, strict=True), color=_BLUE, width=0.7 * max(1.0, len(records) / len(shown)))
        last = config.refinements
        warmup = f"Rounds 0 to {last} are the warm-up" if last else "Round 0 is the warm-up"
        yield Curve("Time of a round", f"Wall time at the coordinator. {warmup}.", _svg(figure))


def _epsilon_curve(records: Sequence[RoundRecord], names: Sequence[str]) -> Curve:
    figure, axes = _axes("epsilon")
    allowed = [release.epsilon_allowed for record in records for release in record.sites.values()]
    for level in {min(allowed), max(allowed)}:
        axes.axhline(level, color=_GREY, linestyle="--", linewidth=1)
    legend = list(zip(names, LINES, strict=False)) if len(names) <= len(LINES) else []
    for name, colour in legend:
        _plot(axes, [(r.round, r.sites[name].epsilon_spent) for r in records if name in r.sites], colour)
    note = "Spent by each site's own ledger"
    if not legend:
        heard = [(r.round, [site.epsilon_spent for site in r.sites.values()]) for r in records if r.sites]
        _plot(axes, [(number, max(spent)) for number, spent in heard])
        lowest, highest = [min(spent) for _, spent in heard], [max(spent) for _, spent in heard]
        axes.fill_between([number for number, _ in heard], lowest, highest, color=_BLUE, alpha=0.3, linewidth=0)
        note = f"From the smallest to the largest of {len(names)} sites"
    axes.set_ylim(bottom=0)
    return Curve("Epsilon spent", f"{note}; dashed: what the sites' policies allow.", _svg(figure), legend)


def _plot(axes: Axes, points: Sequence[tuple[int, float]], colour: str = _BLUE) -> None:
    rounds, values = zip(*_thinned(points), strict=True)
    axes.plot(rounds, values, color=colour, marker="o", markersize=3, linewidth=1.3)


def _thinned(points: Sequence[tuple[int, float]]) -> list[tuple[int, float]]:
    """Keep at most `MAX_POINTS` of a curve, evenly spaced, the last among them."""
    step = -(-len(points) // MAX_POINTS)
    return list(points[::-1][::step])[::-1]


def _axes(label: str) -> tuple[Figure, Axes]:
    with rc_context(_SVG):
        figure = Figure(figsize=(4.6, 2.5), layout="constrained")
        axes = figure.add_subplot()
    axes.set_xlabel("round")
    axes.set_ylabel(label)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=9, integer=True))
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#e4e4e4", linewidth=0.6)
    axes.set_axisbelow(True)
    return figure, axes


def _svg(figure: Figure) -> Markup:
    content = io.StringIO()
    with rc_context(_SVG):
        figure.savefig(content, format="svg", metadata={"Date": None}, transparent=True)
    text = content.getvalue()
    # Every letter in it is ours: names of sites stand in the page, never in a drawing.
    return Markup(text[text.index("<svg") :])  # noqa: S704


def _refusals(records: Sequence[RoundRecord]) -> list[tuple[str, str, list[int]]]:
    rounds: dict[tuple[str, str], list[int]] = {}
    for record in records:
        for site, code in record.refused.items():
            rounds.setdefault((site, code), []).append(record.round)
    return [(site, code, numbers) for (site, code), numbers in sorted(rounds.items())]


def _files(run: Path) -> list[tuple[str, int, str]]:
    sizes = {
        path.name: sum(part.stat().st_size for part in (path.rglob("*") if path.is_dir() else [path]) if part.is_file())
        for path in sorted(run.iterdir())
        if not path.name.startswith(".") and path.name != "report.html"
    }
    return [(name, size, _KNOWN_FILES.get(name, "")) for name, size in sizes.items()]


def _figure(value: float, digits: int = 3) -> str:
    return f"{value:,.{digits}g}" if abs(value) < 1000 else f"{value:,.0f}"


def _percent(value: float) -> str:
    return f"{100 * value:.4g} %"


def _data_uri(path: Path) -> str:
    return f"data:image/png;base64,{base64.b64encode(_read(path)).decode()}"


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(_read(path))
    except ValueError as error:
        raise ResumeError(f"{path} is not JSON. Run the same command with --resume to write it again.") from error
    if not isinstance(value, dict):
        raise ResumeError(f"{path} does not hold an object. Run the same command with --resume to write it again.")
    return value


def _read(path: Path) -> bytes:
    try:
        with path.open("rb") as handle:
            content = handle.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise ResumeError(
            f"{path} does not read: {error.strerror}. Finish the run with --resume, then write the report again."
        ) from error
    if len(content) > MAX_FILE_BYTES:
        raise ResumeError(f"Expected {path} of at most {MAX_FILE_BYTES} bytes, got more. Delete it and resume the run.")
    return content
