"""The quality benchmark: its form on a tiny federation of phantoms, its referee, and what it refuses. Never a time."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from client.intake import Dataset
from common.command import run_command
from common.config_text import build_config, read_config
from common.errors import ConfigError, IntakeError, ResumeError, UnreadableSource
from server.app import Job
from simulations.benchmark import quality
from simulations.benchmark.__main__ import app
from simulations.benchmark.quality import measure
from simulations.benchmark.referee import Effort, judge, make_referee
from simulations.benchmark.report import Result, print_result, write_result
from simulations.benchmark.samples import as_table, data_digest
from simulations.benchmark.variants import QualityConfig, configurations, split_settings
from simulations.engines import run_job
from simulations.evaluate import Training

CONFIGS = Path(__file__).resolve().parents[2] / "simulations" / "configs"
BRIEF = Effort(Training(steps=20, batch=16), synthetic_images=64, frechet_images=64)
SMALL = """
image = {size = 28}
privacy = {epsilon = 8.0, batch_patients = 8, min_patients = 10}
warmup = {steps = 6, batch_size = 32}
model = {name = "mlp", generator_width = 16, discriminator_width = 8}
train = {steps_per_round = 3, d_steps_per_g_step = 2, generator_batch = 8}
performance = {threads = 1}
"""
PHANTOMS = """
federation = {rounds = 4}
simulation = {sites = 2, phantom_patients = 60, partition = "iid"}
quality = {seeds = [0, 1]}
"""


def _config(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "config.toml"
    path.write_text(SMALL + text)
    return path


def _digits(path: Path, with_test: bool = True) -> Path:
    """Write 40 people to learn from and 12 to test on, in the MNIST form: bright or dark images."""
    labels = np.arange(52) % 2
    images = np.random.default_rng(0).integers(0, 100, (52, 28, 28)) + 100 * labels[:, None, None]
    images = images.astype(np.uint8)
    test = {"x_test": images[40:], "y_test": labels[40:]} if with_test else {}
    np.savez(path, x_train=images[:40], y_train=labels[:40], **test)
    return path


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Result:
    return measure(_config(tmp_path_factory.mktemp("quality"), PHANTOMS), None, effort=BRIEF)


@pytest.mark.slow
@pytest.mark.xdist_group("quality_tiny")
def test_every_row_is_there_for_every_seed(tiny: Result) -> None:
    names = ["real", "warmup only", "federation", "centralised", "single-site mean", "single-site best"]
    assert [(row["row"], row["seeds"]) for row in tiny.rows] == [(name, 2) for name in names]
    assert all(0 <= row["accuracy"] <= 1 and row["accuracy_sd"] >= 0 and row["frechet"] > 0 for row in tiny.rows)
    assert all(row["auc"] is None for row in tiny.rows)  # phantoms have four classes
    assert all(math.isfinite(value) for value in tiny.ratios.values())


@pytest.mark.slow
@pytest.mark.xdist_group("quality_tiny")
def test_rows_state_what_each_run_cost(tiny: Result) -> None:
    rows = {row["row"]: row for row in tiny.rows}
    assert rows["real"]["epsilon"] is None
    assert rows["warmup only"]["epsilon"] <= 0.7 * 8.0 < rows["federation"]["epsilon"] <= 8.0
    assert rows["warmup only"]["upload_bytes"] < rows["federation"]["upload_bytes"]
    assert rows["single-site mean"]["upload_bytes"] == rows["federation"]["upload_bytes"]
    sums, lens = rows["warmup only"]["upload_bytes"], rows["warmup only"]["download_bytes"]
    assert lens == 4 * 64 * (4 + 1)  # so few are looked at through 64 cosines: a centre a class, and a scale
    # then the weights go both ways
    assert rows["federation"]["download_bytes"] - lens == rows["federation"]["upload_bytes"] - sums
    assert 0 < rows["warmup only"]["processor_seconds"] < rows["federation"]["processor_seconds"]


@pytest.mark.slow
@pytest.mark.xdist_group("quality_tiny")
def test_table_and_json_hold_the_figures(tiny: Result, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    print_result(as_table(tiny))
    assert f"{tiny.rows[2]['frechet']:.4g} ± " in capsys.readouterr().out
    write_result(tiny, tmp_path / "result.json")
    written = json.loads((tmp_path / "result.json").read_text())
    assert set(written) == {"name", "machine", "versions", "rows", "ratios", "samples"}
    assert written["rows"] == list(tiny.rows)


@pytest.mark.slow
def test_official_test_split_is_held_out_whole(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = "federation = {rounds = 0}\nsimulation = {sites = 1, holdout = 0.0, partition = 'iid'}\n"
    path = _config(tmp_path, text + "quality = {seeds = [0], test = 'x_test'}\n")
    result = measure(path, _digits(tmp_path / "digits.npz"), effort=BRIEF)
    rows = {row["row"]: row for row in result.rows}
    assert set(rows) == {"real", "warmup only", "federation"}  # one site alone is the federation
    assert rows["real"]["accuracy"] == 1.0
    assert rows["real"]["auc"] == 1.0
    assert rows["federation"] | {"row": ""} == rows["warmup only"] | {"row": ""}
    assert rows["federation"]["download_bytes"] == 4 * 64 * (2 + 1)  # a lens
    assert rows["real"]["accuracy_sd"] is None
    told = capsys.readouterr().err
    assert "seed 0 (1 of 1)" in told
    assert "hospital-01: 40 patients" in told


def _referee_data() -> tuple[np.ndarray, np.ndarray, Dataset]:
    labels = (np.arange(60) % 2).astype(np.int64)
    images = np.random.default_rng(0).integers(0, 100, (60, 28, 28)) + 100 * labels[:, None, None]
    images = images.astype(np.uint8)
    return images[:40], labels[:40], Dataset(images[40:, None], labels[40:], np.arange(20))


def test_held_out_unseen_by_the_reference() -> None:
    images, labels, held_out = _referee_data()
    upside_down = Dataset(255 - held_out.images, held_out.labels, held_out.patients)
    one, other = (make_referee(images, labels, dataset, 2, BRIEF) for dataset in (held_out, upside_down))
    assert all(map(torch.equal, one.features.state_dict().values(), other.features.state_dict().values()))


class _Painter(nn.Module):
    """Images of one grey level a class, with some noise from the latent."""

    def __init__(self, levels: tuple[float, float]) -> None:
        super().__init__()
        self.levels = torch.tensor(levels)

    def forward(self, latent: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return (self.levels[labels, None, None, None] + 0.2 * latent[:, :1, None, None]).expand(-1, 1, 28, 28)


def test_images_like_the_real_ones_are_nearer_and_more_useful_than_shifted_ones() -> None:
    referee = make_referee(*_referee_data(), 2, BRIEF)
    config = build_config({}, {"image.size": 28, "model.latent_dim": 4, "image.classes": ("dark", "bright")})
    like_real = judge(referee, config, _Painter((-0.6, 0.18)))
    swapped = judge(referee, config, _Painter((0.18, -0.6)))
    shifted = judge(referee, config, _Painter((0.2, 1.0)))
    auc, auc_swapped = like_real.scores.auc, swapped.scores.auc
    assert auc is not None
    assert auc_swapped is not None
    assert auc > 0.9 > 0.1 > auc_swapped
    assert like_real.frechet < shifted.frechet
    assert judge(referee, config, _Painter((-0.6, 0.18))) == like_real


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.toml")), ids=lambda path: path.stem)
def test_configurations_that_come_along_are_valid_and_name_no_data(path: Path) -> None:
    settings, tree = split_settings(read_config(path))
    config = configurations(tree, settings, {})["federation"]
    assert settings.seeds in ((0,), (0, 1, 2))
    assert config.simulation.data == ""
    assert (settings.test == "x_test") == (config.simulation.holdout == 0)
    assert f"--config simulations/configs/{path.name}" in path.read_text()


def test_without_a_quality_table_the_defaults_hold() -> None:
    assert split_settings({"image": {"size": 28}}) == (QualityConfig(), {"image": {"size": 28}})


@pytest.mark.parametrize(
    ("quality", "message"),
    [
        ({"seed": [0]}, r"quality\.seed=.*Known keys of \[quality\]: seeds, baselines, test, variants"),
        ({"seeds": []}, r"quality\.seeds=.*at least 1"),
        ({"seeds": [-1]}, r"quality\.seeds\.0=-1"),
        ({"seeds": [0, 0]}, r"seeds.*differ"),
        ({"baselines": ["fake"]}, r"quality\.baselines\.0='fake'.*'real', 'centralised' or 'single-site'"),
        ({"test": "x_train"}, r"quality\.test='x_train'"),
        (3, r"quality=3"),
    ],
)
def test_a_wrong_quality_table_is_named(quality: object, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        split_settings({"quality": quality})


VARIANTS = """
federation = {rounds = 2}
simulation = {sites = 2, holdout = 0.25, partition = "iid"}
[quality]
seeds = [0]
baselines = ["real"]
[quality.variants."as before"]
server.weights = "declared"
[quality.variants."no average"]
"train.ema_decay" = 0.0
"server.ema_decay" = 0.0
[quality.variants."one class"]
"simulation.one_class_site" = true
"""


def _figures(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row without its name and what the clock says."""
    return {key: value for key, value in row.items() if key not in ("row", "seconds", "processor_seconds")}


@pytest.fixture(scope="module")
def varied(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Result]:
    """A folder with config.toml, digits.npz and result.json, and the result."""
    folder = tmp_path_factory.mktemp("variants")
    digits = _digits(folder / "digits.npz")
    return folder, measure(_config(folder, VARIANTS), digits, folder / "result.json", effort=BRIEF)


@pytest.mark.slow
@pytest.mark.xdist_group("quality_varied")
def test_variants_are_rows_beside_the_federation(varied: tuple[Path, Result]) -> None:
    rows = {row["row"]: row for row in varied[1].rows}
    assert list(rows) == ["real", "warmup only", "federation", "as before", "no average", "one class"]
    # the same patients, seeds and referee: a variant that changes nothing gives the same figures
    assert _figures(rows["as before"]) == _figures(rows["federation"])
    assert rows["no average"]["frechet"] != rows["federation"]["frechet"] != rows["one class"]["frechet"]
    assert set(varied[1].ratios) == {
        f"{figure}_{row}" for figure in ("accuracy_minus", "frechet_over") for row in ("real", "warmup_only")
    }


@pytest.mark.slow
@pytest.mark.xdist_group("quality_varied")
def test_interrupted_benchmark_keeps_its_rows_and_goes_on(
    varied: tuple[Path, Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, whole = varied
    arguments = (folder / "config.toml", folder / "digits.npz", tmp_path / "result.json")
    runs = 0

    def run_three(job: Job) -> None:
        nonlocal runs
        runs += 1
        if runs == 4:  # warm-up and rounds of the federation, the first variant, and now the second
            raise KeyboardInterrupt
        run_job(job)

    monkeypatch.setattr(quality, "run_job", run_three)
    with pytest.raises(KeyboardInterrupt):
        measure(*arguments, effort=BRIEF)
    written = json.loads((tmp_path / "result.json").read_text())
    kept = ["real", "warmup only", "federation", "as before"]
    assert [row["row"] for row in written["rows"]] == [sample["row"] for sample in written["samples"]] == kept
    monkeypatch.undo()
    capsys.readouterr()
    result = measure(*arguments, effort=BRIEF)
    told = capsys.readouterr().err
    assert "seed 0 (1 of 1): no average, one class\n" in told
    assert "no average: 2 rounds" in told
    assert "federation: " not in told
    assert list(map(_figures, result.rows)) == list(map(_figures, whole.rows))
    assert [row["row"] for row in result.rows] == [row["row"] for row in whole.rows]
    assert json.loads((tmp_path / "result.json").read_text())["rows"] == list(result.rows)


@pytest.mark.slow
@pytest.mark.xdist_group("quality_varied")
def test_finished_file_is_not_run_again(varied: tuple[Path, Result]) -> None:
    folder, whole = varied
    content = (folder / "result.json").read_bytes()
    assert measure(folder / "config.toml", folder / "digits.npz", folder / "result.json", effort=BRIEF) == whole
    assert (folder / "result.json").read_bytes() == content


@pytest.mark.slow
@pytest.mark.xdist_group("quality_varied")
def test_file_of_another_configuration_or_other_data_is_refused(varied: tuple[Path, Result], tmp_path: Path) -> None:
    folder, _ = varied
    config, digits, result = (folder / name for name in ("config.toml", "digits.npz", "result.json"))
    content = result.read_bytes()
    other = {"train.learning_rate_d": 1e-3}
    with pytest.raises(ResumeError, match=r"row 'real' for seed 0 of another configuration.*--json"):
        measure(config, digits, result, other, BRIEF)
    renamed = _written(tmp_path / "renamed.toml", config.read_text().replace('"no average"', '"no mean"'))
    with pytest.raises(ResumeError, match=r"row 'no average' for seed 0.*not asked for"):
        measure(renamed, digits, result, effort=BRIEF)
    with pytest.raises(ResumeError, match="other data"):
        measure(config, _digits(tmp_path / "digits.npz", with_test=False), result, effort=BRIEF)
    with pytest.raises(ResumeError, match="other data"):  # judged otherwise
        measure(config, digits, result)
    assert result.read_bytes() == content


@pytest.mark.parametrize(
    "content", ["", "[]", '{"name": "dp-step"}', '{"samples": [{"row": "real"}]}', '{"samples": 3}']
)
def test_file_that_is_no_result_is_refused(tmp_path: Path, content: str) -> None:
    path = _written(tmp_path / "result.json", content)
    with pytest.raises(ResumeError, match="no result of the benchmark quality"):
        measure(_config(tmp_path, PHANTOMS), None, path, effort=BRIEF)
    assert path.read_text() == content


def _written(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def test_data_are_known_by_their_content(tmp_path: Path) -> None:
    one, other = _written(tmp_path / "one", "a"), _written(tmp_path / "other", "a")
    assert data_digest(one) == data_digest(other) != data_digest(_written(tmp_path / "third", "b"))
    for name in ("x", "y"):
        (tmp_path / name).mkdir()
        _written(tmp_path / name / "1.png", "a")
    assert data_digest(tmp_path / "x") == data_digest(tmp_path / "y")
    _written(tmp_path / "y" / "2.png", "")
    assert data_digest(tmp_path / "x") != data_digest(tmp_path / "y")


def test_variant_changes_win_and_nested_tables_are_dotted_keys() -> None:
    variants = {"a": {"train": {"ema_decay": 0.25}}, "b": {"privacy.views": 4, "federation.rounds": 3}}
    settings, tree = split_settings({"federation": {"rounds": 2}, "quality": {"variants": variants}})
    configs = configurations(tree, settings, {"federation.seed": 7, "federation.rounds": 5})
    assert list(configs) == ["federation", "a", "b"]
    assert {config.federation.seed for config in configs.values()} == {7}
    assert [config.federation.rounds for config in configs.values()] == [5, 5, 3]
    assert [config.train.ema_decay for config in configs.values()] == [0.9, 0.25, 0.9]
    assert configs["b"].privacy.views == 4


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("x", {"simulation.sites": 3}, r"'x' changes simulation\.sites.*missing_share.*--set"),
        ("x", {"simulation.max_patients": 3}, r"simulation\.max_patients"),
        ("x", {"simulation": {"holdout": 0.5}}, r"simulation\.holdout"),
        ("x", {"federation.seed": 3}, r"federation\.seed"),
        ("x", {"image.size": 64}, r"image\.size"),
        ("x", {"performance.threads": 1}, r"performance\.threads"),
        ("x", {}, r"'x' changes nothing"),
        ("federation", {"train.ema_decay": 0.0}, r"'federation' needs another name"),
        (" ", {"train.ema_decay": 0.0}, r"needs another name"),
        ("x", 3, r"quality\.variants\.x=3"),
        ("x", {"train.ema_deca": 0.0}, r'\[quality\.variants\."x"\]: Unknown key train\.ema_deca\..* train\.ema_decay'),
        ("x", {"trian.ema_decay": 0.0}, r"nearest known key is train"),
        ("x", {"ema_decay": 0.0}, r'variants\."x".*Unknown key ema_decay'),
        ("x", {"train.ema_decay": 2.0}, r'variants\."x".*train\.ema_decay=2\.0'),
    ],
)
def test_a_wrong_variant_is_named(name: str, changes: object, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        configurations({}, split_settings({"quality": {"variants": {name: changes}}})[0], {})


def test_set_reaches_the_run_and_the_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = _config(tmp_path, PHANTOMS)
    changes = {"quality.seeds": [0, 0]}
    with pytest.raises(ConfigError, match="differ"):
        measure(path, None, changes=changes)
    with pytest.raises(SystemExit) as stopped:
        run_command(app, ["quality", "--config", str(path), "--set", "simulation.site=3"])
    assert stopped.value.code == 3
    assert "simulation.sites" in capsys.readouterr().err


def test_missing_config_is_named() -> None:
    with pytest.raises(ConfigError, match="--config FILE"):
        measure(None, None)


def test_missing_and_damaged_data_are_refused(tmp_path: Path) -> None:
    config = _config(tmp_path, PHANTOMS)
    with pytest.raises(UnreadableSource, match="does not exist"):
        measure(config, tmp_path / "absent.npz", effort=BRIEF)
    (tmp_path / "damaged.npz").write_bytes(b"not an archive")
    with pytest.raises(IntakeError, match="damaged"):
        measure(config, tmp_path / "damaged.npz", effort=BRIEF)


def test_data_without_a_test_split_are_refused(tmp_path: Path) -> None:
    path = _config(tmp_path, "simulation = {sites = 1, holdout = 0.0}\nquality = {test = 'x_test'}\n")
    with pytest.raises(IntakeError, match="x_test with y_test"):
        measure(path, _digits(tmp_path / "digits.npz", with_test=False), effort=BRIEF)
    with pytest.raises(ConfigError, match="needs --data"):
        measure(path, None, effort=BRIEF)


def test_two_kinds_of_held_out_patients_are_refused(tmp_path: Path) -> None:
    path = _config(tmp_path, "simulation = {sites = 1, holdout = 0.2}\nquality = {test = 'x_test'}\n")
    with pytest.raises(ConfigError, match=r"simulation\.holdout = 0"):
        measure(path, _digits(tmp_path / "digits.npz"), effort=BRIEF)


def test_nobody_held_out_is_refused(tmp_path: Path) -> None:
    path = _config(tmp_path, "simulation = {sites = 2, phantom_patients = 60, holdout = 0.0}\n")
    with pytest.raises(IntakeError, match="held out"):
        measure(path, None, effort=BRIEF)


def test_a_folder_for_the_figures_that_is_not_there_is_refused_before_hours_of_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = _config(tmp_path, PHANTOMS)
    with pytest.raises(SystemExit) as stopped:
        run_command(app, ["quality", "--config", str(path), "--json", str(tmp_path / "none" / "figures.json")])
    assert stopped.value.code == 3
    assert "--json in a folder that is there" in capsys.readouterr().err
