"""Virtual hospitals: in which form they hold their images, and what they refuse. The rest: tests/e2e."""

from pathlib import Path

import numpy as np
import pytest

from client.agent import open_site
from client.home import Home, load_images
from client.policy import load as load_policy
from common.config import Config
from common.config_text import build_config
from common.errors import ConfigError, RefusalCode
from common.messages import Kind, Request
from simulations.hospitals import build_hospitals, connect, draw_federation, held_out_images, site_name

COLOURS = np.random.default_rng(0).integers(0, 256, (60, 28, 28, 3)).astype(np.uint8)


def _config(data: Path, channels: int) -> Config:
    changes = {"image.size": 28, "image.channels": channels, "privacy.min_patients": 10, "simulation.holdout": 0.2}
    return build_config(
        {}, {"simulation.data": str(data), "simulation.sites": 2, "simulation.partition": "iid", **changes}
    )


@pytest.fixture
def data(tmp_path: Path) -> Path:
    numbers = np.arange(60)
    path = tmp_path / "images.npz"
    np.savez(path, images=COLOURS, labels=numbers % 2, patient_id=numbers + 100)  # in the order of the intake
    return path


@pytest.mark.parametrize("channels", [1, 3])
def test_hospitals_and_the_held_out_hold_the_channels_that_are_asked(tmp_path: Path, data: Path, channels: int) -> None:
    federation = draw_federation(_config(data, channels))
    config = federation.config
    assert len(list(build_hospitals(federation, tmp_path / "run"))) == 2
    homes = [Home(tmp_path / "run" / "hospitals" / site_name(index)) for index in range(2)]
    sets = [load_images(home, config.image.classes, 28, channels) for home in homes]
    held_out = held_out_images(config, tmp_path / "run")
    assert held_out is not None
    seen = np.concatenate([one.images[:] for one in (*sets, held_out)])
    assert seen.shape == (60, channels, 28, 28)
    if channels == 3:
        wanted = {image.tobytes() for image in np.moveaxis(COLOURS, 3, 1)}
        assert {image.tobytes() for image in seen} == wanted


def test_hospitals_allow_the_size_that_the_run_asks_for(tmp_path: Path, data: Path) -> None:
    config = build_config(_config(data, 1).model_dump(), {"image.size": 128})
    for _ in build_hospitals(draw_federation(config), tmp_path / "run"):
        pass
    assert load_policy(Home(tmp_path / "run" / "hospitals" / site_name(0)).policy).allowed_image_sizes == (128,)


def test_hospitals_that_hold_grey_refuse_colour_and_their_ledgers_stay_empty(tmp_path: Path, data: Path) -> None:
    federation = draw_federation(_config(data, 1))
    for _ in build_hospitals(federation, tmp_path / "run"):
        pass
    colour = build_config(federation.config.model_dump(), {"image.channels": 3})
    for number in range(2):
        ask = connect(tmp_path / "run", colour, number)
        assert (
            ask(Request(Kind.WARMUP, "run-1", 0, colour.proposal(), {"look": "public"})).refusal is RefusalCode.NO_DATA
        )
        home = Home(tmp_path / "run" / "hospitals" / site_name(number))
        assert open_site(home).ledger.entries == ()
        assert "28 px in colour (classes 0, 1), this site has 28 px in grey (classes 0, 1)" in home.log.read_text()


def test_phantoms_in_colour_have_three_equal_channels(tmp_path: Path) -> None:
    changes = {"image.size": 28, "image.channels": 3, "privacy.min_patients": 2, "simulation.phantom_patients": 8}
    federation = draw_federation(build_config({}, {"simulation.sites": 1, "simulation.holdout": 0.0, **changes}))
    for _ in build_hospitals(federation, tmp_path):
        pass
    images = load_images(Home(tmp_path / "hospitals" / site_name(0)), federation.config.image.classes, 28, 3).images[:]
    assert images.std() > 0
    assert (images == images[:, :1]).all()


def test_a_class_whose_patients_are_at_no_site_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "rare.npz"
    labels = np.arange(60) % 2
    labels[7] = 2
    np.savez(path, images=COLOURS, labels=labels, patient_id=np.arange(60) + 100)
    with pytest.raises(ConfigError, match="patients of each class at a site, got none of '2'"):
        draw_federation(_config(path, 1))  # who is held out is drawn by class, so that it is this one
    everybody = build_config(_config(path, 1).model_dump(), {"simulation.holdout": 0.0})
    assert "2" in {record.label for site in draw_federation(everybody).sites for record in site.records}
    few = [
        build_config(everybody.model_dump(), {"federation.seed": s, "simulation.max_patients": 20}) for s in range(9)
    ]
    with pytest.raises(ConfigError, match=r"left out by simulation\.max_patients"):
        list(map(draw_federation, few))
