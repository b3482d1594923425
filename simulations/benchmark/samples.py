"""What the quality benchmark found: figures by row and seed, as a table and as the file that a later call goes on from.

Out of scope: where they come from (simulations/benchmark/quality).
"""

import hashlib
import json
import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, final

from common.config import Config
from common.errors import IntakeError, ResumeError
from server.run_folder import FREE_SECTIONS
from simulations.benchmark.report import Result
from simulations.benchmark.variants import BASE, CENTRALISED, SINGLE_SITES

Key = tuple[str, int]
"""A row's name and a seed."""


@final
@dataclass(frozen=True)
class Sample:
    """The figures of one row for one seed; None where there is none.

    Attributes:
        accuracy: Of a classifier trained on the row's images, on held-out patients.
        auc: Its area under the ROC curve, for two classes.
        frechet: Distance to the held-out images.
        seconds: Wall time of the run, without judging.
        processor_seconds: Of all its threads, sites and coordinator together.
        upload_bytes: What one site sent that was there in every round.
        download_bytes: What it received.
        epsilon: The most that a site spent.
    """

    accuracy: float
    auc: float | None
    frechet: float
    seconds: float | None = None
    processor_seconds: float | None = None
    upload_bytes: float | None = None
    download_bytes: float | None = None
    epsilon: float | None = None


def origin(config: Config, *others: str) -> str:
    """Return a digest of what a sample is computed from: equal ones give equal figures, up to times and threads.

    Args:
        config: Of the row's run, with its seed. Where the data lie does not count.
        others: Whatever else decides: the data, who is held out, how images are judged.
    """
    tree = config.model_dump(mode="json", exclude={*FREE_SECTIONS})
    del tree["simulation"]["data"]
    return hashlib.sha256(json.dumps([tree, *others], sort_keys=True).encode()).hexdigest()


def data_digest(path: Path) -> str:
    """Return the SHA-256 of a file, or of the names and contents of all files in a folder.

    Raises:
        IntakeError: It does not read.
    """
    files = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
    whole = hashlib.sha256()
    for file in files:
        try:
            with file.open("rb") as handle:
                content = hashlib.file_digest(handle, "sha256").hexdigest()
        except OSError as error:
            raise IntakeError(f"Could not read the data {path}: {error.strerror}. Check --data.") from error
        whole.update(f"{file.relative_to(path)} {content}\n".encode())
    return whole.hexdigest()


def load_samples(path: Path, wanted: Mapping[Key, str]) -> dict[Key, Sample]:
    """Read what an interrupted benchmark wrote.

    Args:
        path: Its JSON.
        wanted: The origin of every sample that is wanted now.

    Raises:
        ResumeError: It is another file, or a sample in it is not wanted or has another origin.
    """
    advice = "Name another file with --json, or move this one away."
    found: dict[Key, Sample] = {}
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        for line in content["samples"]:
            figures = dict(line)
            key, of = (figures.pop("row"), figures.pop("seed")), figures.pop("origin")
            found[key] = Sample(**figures)
            if wanted.get(key) != of:
                raise ResumeError(
                    f"{path} holds the row {key[0]!r} for seed {key[1]} of another configuration or other data, or one "
                    f"that is not asked for. {advice}"
                )
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ResumeError(f"{path} stands there and is no result of the benchmark quality. {advice}") from error
    return found


def as_result(found: Mapping[Key, Sample], wanted: Mapping[Key, str]) -> Result:
    """Put figures into a result: rows with means over the seeds, and each sample with its origin."""
    groups: defaultdict[str, list[Sample]] = defaultdict(list)
    for name, seed in wanted:
        groups[name] += [found[name, seed]] if (name, seed) in found else []
    rows = {name: _row(name, group) for name, group in groups.items() if group}
    samples = [
        {"row": key[0], "seed": key[1], "origin": of, **asdict(found[key])}
        for key, of in wanted.items()
        if key in found
    ]
    return Result("quality", list(rows.values()), _ratios(rows), samples)


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


def mean_of(samples: Sequence[Sample]) -> Sample:
    """Return the mean of each figure; None where one has none."""
    return Sample(**{field.name: _mean([getattr(one, field.name) for one in samples]) for field in fields(Sample)})


def _row(name: str, samples: Sequence[Sample]) -> dict[str, Any]:
    row: dict[str, Any] = {"row": name, "seeds": len(samples)}
    for figure, mean in asdict(mean_of(samples)).items():
        row[figure] = mean
        if figure in ("accuracy", "auc", "frechet"):
            values = [getattr(sample, figure) for sample in samples]
            row[f"{figure}_sd"] = statistics.stdev(values) if len(values) > 1 and None not in values else None
    return row


def _mean(values: Sequence[Any]) -> Any:
    return None if None in values else statistics.fmean(values)


def _ratios(rows: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """Compare the federation with each baseline: differences of mean accuracy, quotients of mean distance."""
    ratios: dict[str, float] = {}
    for name in ("real", "warmup only", CENTRALISED, *SINGLE_SITES):
        if name in rows and BASE in rows:
            ours, other, key = rows[BASE], rows[name], name.replace(" ", "_").replace("-", "_")
            ratios[f"accuracy_minus_{key}"] = ours["accuracy"] - other["accuracy"]
            ratios[f"frechet_over_{key}"] = ours["frechet"] / other["frechet"]
    return ratios
