"""How good are the images of a federation? Its run for several seeds, beside what real images and single sites reach.

Every row is judged by the same referee on patients that no site has. Nothing is chosen by what the referee says: a
configuration is read, run and reported. Out of scope: the judging (referee), the table `[quality]` (variants), the
figures as a table and a file (samples).
"""

import contextlib
import sys
import tempfile
import time
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, final

import numpy as np
import torch

from client.home import Home, load_images
from client.intake import Scan, scan
from common.artefact import pictures
from common.config import Config
from common.config_text import build_config, read_config, with_changes
from common.errors import ConfigError, FederationError, IntakeError
from server import checkpoint
from server.app import Job
from server.records import read_records
from server.rounds import averaged_pair
from server.run_folder import RunFolder, open_run
from simulations.benchmark.referee import Effort, Judgement, Referee, judge, make_referee
from simulations.benchmark.report import Result, write_result
from simulations.benchmark.samples import Key, Sample, as_result, data_digest, load_samples, mean_of, origin
from simulations.benchmark.variants import (
    BASE,
    CENTRALISED,
    SINGLE_SITES,
    QualityConfig,
    configurations,
    row_names,
    split_settings,
)
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

NOTHING_GOES_WRONG = {"simulation.missing_share": 0.0, "simulation.poor_site_budget": 1.0}
"""For whoever trains alone; who has which patients stays."""

Named = tuple[str, Sample]


@final
@dataclass(frozen=True)
class Seconds:
    """What a run took: wall time, and the time of all threads of this process."""

    wall: float
    processor: float

    def __add__(self, other: "Seconds") -> "Seconds":
        return Seconds(self.wall + other.wall, self.processor + other.processor)


def measure(
    config: Path | None,
    data: Path | None,
    json: Path | None = None,
    changes: Mapping[str, Any] | None = None,
    effort: Effort | None = None,
) -> Result:
    """Run a configuration and its variants for each of its seeds and judge what comes out.

    Args:
        config: A TOML file as `fedmedgan-simulate` reads it, with a table `[quality]` if wanted.
        data: The images; those of the configuration when None, and phantoms when it names none.
        json: Written after every row; where it stands already, its rows are not made again.
        changes: Values by dotted key that win over the file.
        effort: How thoroughly images are judged.

    Returns:
        One row each for the federation, its warm-up, its variants and the baselines.

    Raises:
        ConfigError: There is no configuration, or a key or value is wrong.
        IntakeError: The data cannot be used, or there is nobody to test on.
        ResumeError: `json` is of another configuration, of other data, or no result of this benchmark.
        FederationError: No site took part.
    """
    if config is None:
        raise ConfigError("Expected --config FILE for the benchmark quality. simulations/configs holds some.")
    effort = effort or Effort()
    settings, tree = split_settings(with_changes(read_config(config), changes or {}))
    plans = _plans(tree, settings, data)
    wanted = _origins(plans, settings, effort)
    found = load_samples(json, wanted) if json is not None and json.exists() else {}
    for number, (seed, configs) in enumerate(plans.items(), start=1):
        missing = [name for name in row_names(settings, configs) if (name, seed) not in found]
        _say(f"seed {seed} ({number} of {len(plans)}): {', '.join(missing) or 'every row is there'}")
        if not missing:
            continue
        with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):
            for name, sample in _one_seed(configs, settings, effort, Path(folder), missing):
                found[name, seed] = sample
                _say(f"seed {seed}, {name}: {_told(sample)}")
                if json is not None:
                    write_result(as_result(found, wanted), json)
    return as_result(found, wanted)


def _plans(tree: dict[str, Any], settings: QualityConfig, data: Path | None) -> dict[int, dict[str, Config]]:
    """Return the configurations by seed and row, all of them checked before the first is run."""
    plans: dict[int, dict[str, Config]] = {}
    for seed in settings.seeds:
        changes: dict[str, Any] = {"federation.seed": seed, "performance.engine": "local"}
        changes |= {"simulation.data": str(data.absolute())} if data else {}
        plans[seed] = configurations(tree, settings, changes)
    return plans


def _origins(plans: Mapping[int, Mapping[str, Config]], settings: QualityConfig, effort: Effort) -> dict[Key, str]:
    source = next(iter(plans.values()))[BASE].simulation.data
    others = (data_digest(Path(source)) if source and Path(source).exists() else "", settings.test, repr(effort))
    return {
        (name, seed): origin(configs.get(name, configs[BASE]), *others)
        for seed, configs in plans.items()
        for name in row_names(settings, configs)
    }


def _one_seed(
    configs: Mapping[str, Config], settings: QualityConfig, effort: Effort, folder: Path, missing: Collection[str]
) -> Iterator[Named]:
    config = configs[BASE]
    torch.set_num_threads(config.performance.threads)
    federation = draw_federation(config)
    if settings.test == "x_test":
        federation = replace(federation, held_out=_official_test(federation.config, folder))
    out = folder / "federation"
    for line in build_hospitals(federation, out):
        _say(line)
    _say("training the referee on the real images")
    referee = _make_referee(federation, out, effort)
    if "real" in missing:
        yield "real", _sample(referee.real)
    if BASE in missing or "warmup only" in missing:
        yield from (named for named in _federation(federation, out, referee) if named[0] in missing)
    for name in configs:
        if name in missing and name != BASE:
            yield name, _variant(name, configs[name], folder, referee)
    if CENTRALISED in missing:
        _say(f"{CENTRALISED}: one holder of all patients")
        everybody = tuple(record for part in federation.sites for record in part.records)
        yield CENTRALISED, _alone(federation, Scan(everybody, {}), folder, referee)
    if set(SINGLE_SITES) & set(missing):
        yield from _single_sites(federation, folder, referee)


def _federation(federation: Federation, out: Path, referee: Referee) -> Iterator[Named]:
    config = federation.config
    folder = open_run(out, config, resume=False)
    _say(f"{BASE}: the warm-up")
    seconds = _timed(Job(config, folder, until=config.refinements))
    if config.warmup.share > 0:
        sample = _judged(config, folder, referee, seconds)
        yield "warmup only", sample
        if config.training_rounds == 0:
            yield BASE, sample
            return
    _say(f"{BASE}: {config.training_rounds} rounds of training")
    seconds += _timed(Job(config, folder))
    yield BASE, _judged(config, folder, referee, seconds)


def _variant(name: str, config: Config, folder: Path, referee: Referee) -> Sample:
    """Run a variant with hospitals of its own, whose ledgers are empty: the same patients, and the same referee."""
    federation = replace(draw_federation(config), held_out=Scan((), {}))
    _say(f"{name}: {config.federation.rounds} rounds")
    return _run_and_judge(federation, folder, referee)


def _single_sites(federation: Federation, folder: Path, referee: Referee) -> Iterator[Named]:
    found: list[Sample] = []
    for index, part in enumerate(federation.sites):
        if declared_patients(patients_in(part)) < federation.config.privacy.min_patients:
            continue
        _say(f"{site_name(index)} alone")
        found.append(_alone(federation, part, folder, referee))
    mean, best = SINGLE_SITES
    yield mean, mean_of(found)
    yield best, max(found, key=lambda sample: sample.accuracy if sample.auc is None else sample.auc)


def _alone(federation: Federation, part: Scan, folder: Path, referee: Referee) -> Sample:
    """Let one holder of patients train alone, with the same settings and the same epsilon."""
    changes = {"simulation.sites": 1, "federation.min_sites": 1, "server.aggregation": "mean"}
    changes |= {"privacy.colluding_sites": "all", **NOTHING_GOES_WRONG}
    config = build_config(federation.config.model_dump(), changes)
    return _run_and_judge(replace(federation, config=config, sites=(part,), held_out=Scan((), {})), folder, referee)


def _run_and_judge(federation: Federation, parent: Path, referee: Referee) -> Sample:
    """Run a federation from its files to its images, and leave none of them behind."""
    with tempfile.TemporaryDirectory(dir=parent) as folder:
        for _ in build_hospitals(federation, Path(folder)):
            pass
        run = open_run(Path(folder), federation.config, resume=False)
        return _judged(federation.config, run, referee, _timed(Job(federation.config, run)))


def _timed(job: Job) -> Seconds:
    started, started_processor = time.perf_counter(), time.process_time()
    run_job(job)
    return Seconds(time.perf_counter() - started, time.process_time() - started_processor)


def _judged(config: Config, folder: RunFolder, referee: Referee, seconds: Seconds) -> Sample:
    """Judge the newest state of a run."""
    state = checkpoint.load_latest(folder.checkpoints)
    records = read_records(folder.metrics)
    releases = [release for record in records for release in record.sites.values()]
    if state is None or not releases:
        raise FederationError("No site took part, so there is nothing to judge. The lines above say why.")
    _say(f"judging the images after round {state.round}")
    return replace(
        _sample(judge(referee, config, averaged_pair(config, state).generator)),
        seconds=seconds.wall,
        processor_seconds=seconds.processor,
        upload_bytes=sum(record.bytes_a_site[1] for record in records),
        download_bytes=sum(record.bytes_a_site[0] for record in records),
        epsilon=max(release.epsilon_spent for release in releases),
    )


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
    images = pictures(np.concatenate([site.images[:] for site in sites]))
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


def _told(sample: Sample) -> str:
    auc = "" if sample.auc is None else f", AUC {sample.auc:.4f}"
    return f"accuracy {sample.accuracy:.4f}{auc}, Frechet distance {sample.frechet:.2f}"


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
