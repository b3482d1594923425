"""A start on phantoms: the same for the same configuration, written once, of phantoms that no run holds out."""

from pathlib import Path

import pytest
import torch

from common.config import Config, WarmupConfig
from common.config_text import build_config
from server.start import has_start
from simulations.phantoms.cohort import draw_patients
from simulations.pretrain import phantom_images, pretrain, put_start
from tests.function_sites import SMALL_RUN

BRIEF = WarmupConfig(steps=3, batch_size=8)


def make_config(**changes: object) -> Config:
    return build_config({}, {**SMALL_RUN, "performance.threads": 1, "simulation.start": "phantoms", **changes})


@pytest.mark.slow
def test_deterministic() -> None:
    one, same, other = (
        pretrain(make_config(**{"federation.seed": seed}), BRIEF, phantoms=12).state_dict() for seed in (0, 0, 1)
    )
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert any(not torch.equal(one[name], other[name]) for name in one)


@pytest.mark.slow
def test_a_start_is_written_once_and_only_if_it_is_wished(tmp_path: Path) -> None:
    put_start(make_config(**{"simulation.start": "none"}), tmp_path, BRIEF, phantoms=12)
    assert not has_start(tmp_path)
    put_start(make_config(), tmp_path, BRIEF, phantoms=12)
    content = (tmp_path / "start" / "generator.safetensors").read_bytes()
    put_start(make_config(**{"federation.seed": 3}), tmp_path, BRIEF, phantoms=12)  # what a resumed run would do
    assert (tmp_path / "start" / "generator.safetensors").read_bytes() == content


def test_phantoms_of_a_start_are_seen_as_the_intake_shows_them_and_are_nobody_of_a_run() -> None:
    images = phantom_images(28, 3)
    assert [image.shape for image in images] == [(28, 28)] * 3
    assert all(0 <= image.min() < image.max() <= 1 for image in images)
    own = {patient.seed for patient in draw_patients(50, 2**32 + 17)}
    assert not own & {patient.seed for seed in range(20) for patient in draw_patients(50, seed)}
