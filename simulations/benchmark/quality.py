"""How good are the images of a federation? Its run for several seeds, beside what real images and single sites reach.

Every row is judged by the same referee on patients that no site has. Nothing is chosen by what the referee says: a
configuration is read, run and reported. Out of scope: the judging (simulations/benchmark/referee).
"""

import contextlib
import statistics
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass, fields, replace
from pathlib import Path
from typing import Annotated, Any, Literal, final

import numpy as np
import torch
from pydantic import Field, ValidationError, field_validator

from client.home import Home, load_images
from client.intake import Scan, scan
from common.artefact import pictures
from common.config import Config, Section
from common.config_text import build_config, read_config
from common.errors import ConfigError, FederationError, IntakeError
from server import checkpoint
from server.app import Job
from server.records import read_records
from server.rounds import averaged_pair
from server.run_folder import RunFolder, open_run
from simulations.benchmark.referee import Effort, Judgement, Referee, judge, make_referee
from simulations.benchmark.report import Result
from simulations.engines import run_job
from simulations.hospitals import (
    Federation,
    build_hospitals,
    declared_patients,
    draw_federation,
    held_out_images,
    patients_in,
    site_name,
)

Seed = Annotated[int, Field(ge=0, lt=2**63)]
Named = tuple[str, "Sample"]


@final
class QualityConfig(Section):
    """The table `[quality]` of a configuration for this benchmark; it never reaches the run."""

    seeds: Annotated[tuple[Seed, ...], Field(min_length=1)] = (0, 1, 2)
    baselines: tuple[Literal["real", "single-site"], ...] = ("real", "single-site")
    test: Literal["holdout", "x_test"] = "holdout"
    """Held-out patients: those of simulation.holdout, or the NPZ's own `x_test` with `y_test` (each a person)."""

    @field_validator("seeds")
    @classmethod
    def _each_once(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        if len(set(value)) < len(value):
            raise ValueError("expected seeds that differ, for equal ones give equal figures")
        return value


@final
@dataclass(frozen=True)
class Sample:
    """The figures of one row for one seed; None where there is none.

    Attributes:
        accuracy: Of a classifier trained on the row's images, on held-out patients.
        auc: Its area under the ROC curve, for two classes.
        frechet: Distance to the held-out images.
        seconds: Wall time of the run, without judging.
        upload_bytes: What one site sent.
        epsilon: The most that a site spent.
    """

    accuracy: float
    auc: float | None
    frechet: float
    seconds: float | None = None
    upload_bytes: float | None = None
    epsilon: float | None = None


def measure(config: Path | None, data: Path | None, effort: Effort | None = None) -> Result:
    """Run a configuration for each of its seeds and judge what comes out.

    Args:
        config: A TOML file as `fedmedgan-simulate` reads it, with a table `[quality]` if wanted.
        data: The images; phantoms when None.
        effort: How thoroughly images are judged.

    Returns:
        One row each for the federation, its warm-up and the baselines.

    Raises:
        ConfigError: There is no configuration, or a key or value is wrong.
        IntakeError: The data cannot be used, or there is nobody to test on.
        FederationError: No site took part.
    """
    if config is None:
        raise ConfigError("Expected --config FILE for the benchmark quality. simulations/configs holds some.")
    settings, tree = split_settings(read_config(config))
    samples: defaultdict[str, list[Sample]] = defaultdict(list)
    for number, seed in enumerate(settings.seeds, start=1):
        changes: dict[str, Any] = {"federation.seed": seed, "performance.engine": "local"}
        changes |= {"simulation.data": str(data.absolute())} if data else {}
        _say(f"seed {seed} ({number} of {len(settings.seeds)}): reading the images")
        with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):
            for name, sample in _one_seed(build_config(tree, changes), settings, effort or Effort(), Path(folder)):
                samples[name].append(sample)
                _say(f"seed {seed}, {name}: {_told(sample)}")
    return Result("quality", [_row(name, group) for name, group in samples.items()], _ratios(samples))


def split_settings(tree: Mapping[str, Any]) -> tuple[QualityConfig, dict[str, Any]]:
    """Take the table `[quality]` out of a configuration.

    Raises:
        ConfigError: A key of it is unknown or a value out of bounds.
    """
    rest = dict(tree)
    try:
        return QualityConfig.model_validate(rest.pop("quality", {})), rest
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(["quality", *map(str, first["loc"])])
        raise ConfigError(
            f"Expected another {key}={first.get('input')!r}: {first['msg'].removeprefix('Value error, ')}. "
            f"Known keys of [quality]: {', '.join(QualityConfig.model_fields)}."
        ) from error


def as_table(result: Result) -> Result:
    """Write mean and standard deviation of each figure into one cell, for people."""
    rows = [
        {
            key: f"{value:.4g} ± {row[f'{key}_sd']:.2g}" if row.get(f"{key}_sd") is not None else value
            for key, value in row.items()
            if not key.endswith("_sd")
        }
        for row in result.rows
    ]
    return replace(result, rows=[{k: "" if v is None else v for k, v in row.items()} for row in rows])


def _one_seed(config: Config, settings: QualityConfig, effort: Effort, folder: Path) -> Iterator[Named]:
    torch.set_num_threads(config.performance.threads)
    federation = draw_federation(config)
    if settings.test == "x_test":
        federation = replace(federation, held_out=_official_test(federation.config, folder))
    out = folder / "federation"
    for line in build_hospitals(federation, out):
        _say(line)
    _say("training the reference classifier on the real images of all sites")
    referee = _make_referee(federation, out, effort)
    if "real" in settings.baselines:
        yield "real", _sample(referee.real)
    yield from _federation(federation, out, referee)
    if "single-site" in settings.baselines and config.simulation.sites > 1:
        yield from _single_sites(federation, folder, referee)


def _federation(federation: Federation, out: Path, referee: Referee) -> Iterator[Named]:
    config = federation.config
    folder = open_run(out, config, resume=False)
    stopped = threading.Event()
    stopped.set()  # a run that is asked to stop at once ends after round 0, and can be taken up
    _say("the warm-up")
    seconds = _seconds(Job(config, folder, stopped))
    if config.warmup.share > 0:
        sample = _judged(config, folder, referee, seconds)
        yield "warmup only", sample
        if config.federation.rounds == 0:
            yield "federation", sample
            return
    _say(f"{config.federation.rounds} rounds")
    seconds += _seconds(Job(config, folder))
    yield "federation", _judged(config, folder, referee, seconds)


def _single_sites(federation: Federation, folder: Path, referee: Referee) -> Iterator[Named]:
    """Let each site train alone, with the same settings and the same epsilon."""
    changes = {"simulation.sites": 1, "federation.min_sites": 1, "server.aggregation": "mean"}
    config = build_config(federation.config.model_dump(), changes)
    found: list[Sample] = []
    for index, part in enumerate(federation.sites):
        if declared_patients(patients_in(part)) < config.privacy.min_patients:
            continue
        _say(f"{site_name(index)} alone")
        alone = replace(federation, config=config, sites=(part,), held_out=Scan((), {}))
        out = folder / f"alone-{index}"
        for _ in build_hospitals(alone, out):
            pass
        run = open_run(out, config, resume=False)
        found.append(_judged(config, run, referee, _seconds(Job(config, run))))
    yield "single-site mean", Sample(*(_mean(values) for values in zip(*map(astuple, found), strict=True)))
    yield "single-site best", max(found, key=lambda sample: sample.accuracy if sample.auc is None else sample.auc)


def _seconds(job: Job) -> float:
    started = time.perf_counter()
    run_job(job)
    return time.perf_counter() - started


def _judged(config: Config, folder: RunFolder, referee: Referee, seconds: float) -> Sample:
    """Judge the newest state of a run."""
    state = checkpoint.load_latest(folder.checkpoints)
    records = read_records(folder.metrics)
    releases = [release for record in records for release in record.sites.values()]
    if state is None or not releases:
        raise FederationError("No site took part, so there is nothing to judge. The lines above say why.")
    _say(f"judging the images after round {state.round}")
    judged = judge(referee, config, averaged_pair(config, state).generator)
    upload_bytes = sum(record.upload_bytes / max(1, len(record.sites)) for record in records)
    epsilon = max(release.epsilon_spent for release in releases)
    return replace(_sample(judged), seconds=seconds, upload_bytes=upload_bytes, epsilon=epsilon)


def _sample(judged: Judgement) -> Sample:
    return Sample(judged.scores.accuracy, judged.scores.auc, judged.frechet)


def _make_referee(federation: Federation, out: Path, effort: Effort) -> Referee:
    config = federation.config
    held_out = held_out_images(config, out)
    if held_out is None:
        raise IntakeError("Nobody is held out to test on. Raise simulation.holdout, or set test = 'x_test'.")
    homes = [Home(out / "hospitals" / site_name(index)) for index in range(len(federation.sites))]
    image = config.image
    sites = [load_images(home, image.classes, image.size, image.channels) for home in homes]
    images = pictures(np.concatenate([site.images for site in sites]))
    labels = np.concatenate([site.labels for site in sites])
    return make_referee(images, labels, held_out, len(config.image.classes), effort)


def _official_test(config: Config, folder: Path) -> Scan:
    """Read the test split of an NPZ in the MNIST form through the intake, as if it were a source of its own."""
    if config.simulation.holdout > 0:
        raise ConfigError("Expected simulation.holdout = 0 beside test = 'x_test': the data say who is held out.")
    if not config.simulation.data:
        raise ConfigError("test = 'x_test' needs --data NPZ. Give one in the MNIST form, or use test = 'holdout'.")
    path = folder / "test.npz"
    try:
        with np.load(config.simulation.data, allow_pickle=False) as archive:
            np.savez(path, x_train=archive["x_test"], y_train=archive["y_test"])
    except (OSError, ValueError, KeyError) as error:
        raise IntakeError(
            "The NPZ has no x_test with y_test, as test = 'x_test' asks. Use test = 'holdout'."
        ) from error
    return scan(path)


def _row(name: str, samples: Sequence[Sample]) -> dict[str, Any]:
    row: dict[str, Any] = {"row": name, "seeds": len(samples)}
    for figure in (field.name for field in fields(Sample)):
        values = [getattr(sample, figure) for sample in samples]
        row[figure] = _mean(values)
        if figure in ("accuracy", "auc", "frechet"):
            row[f"{figure}_sd"] = statistics.stdev(values) if len(values) > 1 and None not in values else None
    return row


def _mean(values: Sequence[Any]) -> Any:
    return None if None in values else statistics.fmean(values)


def _ratios(samples: Mapping[str, Sequence[Sample]]) -> dict[str, float]:
    """Compare the federation with each other row: differences of mean accuracy, quotients of mean distance."""
    ours = _row("", samples["federation"])
    ratios: dict[str, float] = {}
    for name, group in samples.items():
        if name != "federation":
            other, key = _row("", group), name.replace(" ", "_").replace("-", "_")
            ratios[f"accuracy_minus_{key}"] = ours["accuracy"] - other["accuracy"]
            ratios[f"frechet_over_{key}"] = ours["frechet"] / other["frechet"]
    return ratios


def _told(sample: Sample) -> str:
    auc = "" if sample.auc is None else f", AUC {sample.auc:.4f}"
    return f"accuracy {sample.accuracy:.4f}{auc}, Frechet distance {sample.frechet:.2f}"


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
