"""The quality benchmark: its form on a tiny federation of phantoms, its referee, and what it refuses. Never a time."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from client.intake import Dataset
from common.config_text import build_config, read_config
from common.errors import ConfigError, IntakeError
from simulations.benchmark.quality import QualityConfig, as_table, measure, split_settings
from simulations.benchmark.referee import Effort, judge, make_referee
from simulations.benchmark.report import Result, print_result, write_result
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
    return measure(_config(tmp_path_factory.mktemp("quality"), PHANTOMS), None, BRIEF)


@pytest.mark.slow
def test_every_row_is_there_for_every_seed(tiny: Result) -> None:
    names = ["real", "warmup only", "federation", "single-site mean", "single-site best"]
    assert [(row["row"], row["seeds"]) for row in tiny.rows] == [(name, 2) for name in names]
    assert all(0 <= row["accuracy"] <= 1 and row["accuracy_sd"] >= 0 and row["frechet"] > 0 for row in tiny.rows)
    assert all(row["auc"] is None for row in tiny.rows)  # phantoms have four classes
    assert all(math.isfinite(value) for value in tiny.ratios.values())


@pytest.mark.slow
def test_rows_state_what_each_run_cost(tiny: Result) -> None:
    rows = {row["row"]: row for row in tiny.rows}
    assert rows["real"]["epsilon"] is None
    assert rows["warmup only"]["epsilon"] <= 0.7 * 8.0 < rows["federation"]["epsilon"] <= 8.0
    assert rows["warmup only"]["upload_bytes"] < rows["federation"]["upload_bytes"]
    assert rows["single-site mean"]["upload_bytes"] == rows["federation"]["upload_bytes"]


@pytest.mark.slow
def test_table_and_json_hold_the_figures(tiny: Result, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    print_result(as_table(tiny))
    assert f"{tiny.rows[2]['frechet']:.4g} ± " in capsys.readouterr().out
    write_result(tiny, tmp_path / "result.json")
    written = json.loads((tmp_path / "result.json").read_text())
    assert set(written) == {"name", "machine", "versions", "rows", "ratios"}
    assert written["rows"] == list(tiny.rows)


@pytest.mark.slow
def test_official_test_split_is_held_out_whole(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = "federation = {rounds = 0}\nsimulation = {sites = 1, holdout = 0.0, partition = 'iid'}\n"
    path = _config(tmp_path, text + "quality = {seeds = [0], test = 'x_test'}\n")
    result = measure(path, _digits(tmp_path / "digits.npz"), BRIEF)
    rows = {row["row"]: row for row in result.rows}
    assert set(rows) == {"real", "warmup only", "federation"}  # one site alone is the federation
    assert rows["real"]["accuracy"] == 1.0
    assert rows["real"]["auc"] == 1.0
    assert rows["federation"] | {"row": ""} == rows["warmup only"] | {"row": ""}
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
    config = build_config(tree)
    assert settings.seeds == (0, 1, 2)
    assert config.simulation.data == ""
    assert (settings.test == "x_test") == (config.simulation.holdout == 0)
    assert f"--config simulations/configs/{path.name}" in path.read_text()


def test_without_a_quality_table_the_defaults_hold() -> None:
    assert split_settings({"image": {"size": 28}}) == (QualityConfig(), {"image": {"size": 28}})


@pytest.mark.parametrize(
    ("quality", "message"),
    [
        ({"seed": [0]}, r"quality\.seed=.*Known keys of \[quality\]: seeds, baselines, test"),
        ({"seeds": []}, r"quality\.seeds=.*at least 1"),
        ({"seeds": [-1]}, r"quality\.seeds\.0=-1"),
        ({"seeds": [0, 0]}, r"seeds.*differ"),
        ({"baselines": ["fake"]}, r"quality\.baselines\.0='fake'.*'real' or 'single-site'"),
        ({"test": "x_train"}, r"quality\.test='x_train'"),
        (3, r"quality=3"),
    ],
)
def test_a_wrong_quality_table_is_named(quality: object, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        split_settings({"quality": quality})


def test_missing_config_is_named() -> None:
    with pytest.raises(ConfigError, match="--config FILE"):
        measure(None, None)


def test_missing_and_damaged_data_are_refused(tmp_path: Path) -> None:
    config = _config(tmp_path, PHANTOMS)
    with pytest.raises(IntakeError, match="does not exist"):
        measure(config, tmp_path / "absent.npz", BRIEF)
    (tmp_path / "damaged.npz").write_bytes(b"not an archive")
    with pytest.raises(IntakeError, match="damaged"):
        measure(config, tmp_path / "damaged.npz", BRIEF)


def test_data_without_a_test_split_are_refused(tmp_path: Path) -> None:
    path = _config(tmp_path, "simulation = {sites = 1, holdout = 0.0}\nquality = {test = 'x_test'}\n")
    with pytest.raises(IntakeError, match="x_test with y_test"):
        measure(path, _digits(tmp_path / "digits.npz", with_test=False), BRIEF)
    with pytest.raises(ConfigError, match="needs --data"):
        measure(path, None, BRIEF)


def test_two_kinds_of_held_out_patients_are_refused(tmp_path: Path) -> None:
    path = _config(tmp_path, "simulation = {sites = 1, holdout = 0.2}\nquality = {test = 'x_test'}\n")
    with pytest.raises(ConfigError, match=r"simulation\.holdout = 0"):
        measure(path, _digits(tmp_path / "digits.npz"), BRIEF)


def test_nobody_held_out_is_refused(tmp_path: Path) -> None:
    path = _config(tmp_path, "simulation = {sites = 2, phantom_patients = 60, holdout = 0.0}\n")
    with pytest.raises(IntakeError, match="held out"):
        measure(path, None, BRIEF)
