"""Lenses from fakes, and how much a release may look at."""

import pytest
import torch

from common.config import Config
from common.config_text import build_config
from common.errors import ConfigError
from common.lens import coordinates, lens_dim, to_arrays
from common.plan import Plan
from common.secure_sum import Cohort
from server.lens import CLEAR, choose, make_lens, outlook
from server.rounds import initial_pair
from tests.function_sites import SMALL_RUN


def make_config(**changes: object) -> Config:
    return build_config({}, {**SMALL_RUN, **changes})


def bytes_of(lens) -> list[bytes]:
    return [array.tobytes() for array in to_arrays(lens).values()]


@pytest.mark.parametrize("sight", ["means", pytest.param("learned", marks=pytest.mark.slow)])
def test_deterministic(sight) -> None:
    config = make_config()
    generator = initial_pair(config).generator
    one, same, other = (
        make_lens(generator, config, sight, torch.Generator().manual_seed(seed), fitted=True) for seed in (0, 0, 1)
    )
    assert bytes_of(one) == bytes_of(same) != bytes_of(other)


def test_fakes_fit() -> None:
    config = make_config()
    generator = initial_pair(config).generator
    lens = make_lens(generator, config, "means", torch.Generator().manual_seed(0))
    latent = torch.randn(400, config.model.latent_dim, generator=torch.Generator().manual_seed(7))
    labels = torch.arange(400) % 2
    with torch.no_grad():
        seen = coordinates(None, generator(latent, labels))
    inside = ((seen - lens.centre[labels]) / lens.scale).norm(dim=1) <= 1
    assert 0.8 < inside.float().mean() < 0.95


def test_before_a_fit_images_of_all_kinds_stand_in() -> None:
    config = make_config()
    generator = initial_pair(config).generator
    rng = torch.Generator
    fitted = make_lens(generator, config, "means", rng().manual_seed(0))
    unfitted = make_lens(generator, config, "means", rng().manual_seed(0), fitted=False)
    nothing = make_lens(None, config, "means", rng().manual_seed(0), fitted=False)
    assert unfitted.scale.norm() > 2 * fitted.scale.norm()
    assert torch.all(nothing.centre.isfinite())
    assert torch.all(nothing.scale > 0)


def test_one_class_has_a_lens() -> None:
    config = make_config(**{"image.classes": ("all",)})
    lens = make_lens(initial_pair(config).generator, config, "learned", torch.Generator().manual_seed(0))
    assert lens.centre.shape == (1, 160)


def plans(noise: float, patients: int, sites: int = 1, shares: int = 1) -> list[Plan]:
    cohort = Cohort(sites, patients * sites)
    return [Plan(patients, 0.1, noise, None, 0, 1.0, 1e-5, cohort, shares)] * sites


def test_shares_of_the_noise_add_up_to_one() -> None:
    config = make_config()
    alone, apart = outlook(config, plans(3.0, 400)), outlook(config, plans(3.0, 100, 4))
    assert outlook(config, plans(3.0, 100, 4, shares=4)).length == pytest.approx(alone.length)
    assert apart.length == pytest.approx(alone.length / 2)


def test_the_largest_clear_map_is_taken() -> None:
    config = make_config()
    dims = {"public": 5929, "means": 65, "learned": 6897}
    clear = outlook(config, plans(1.0, int(2 * CLEAR * dims["public"] ** 0.5) + 2))
    assert clear.dims == dims
    assert choose(clear, "public") == "public"
    assert choose(clear, "learned") == "means"
    assert choose(outlook(config, plans(1.01, int(2 * CLEAR * dims["public"] ** 0.5))), "public") == "means"


def test_what_drowns_is_refused_with_the_dimension_that_would_not() -> None:
    config = make_config()
    with pytest.raises(ConfigError) as caught:
        choose(outlook(config, plans(50.0, 200)), "public")
    # 100 patients of a class, noise 50 x sqrt(65) = 403: 4.0 times; (2 x 100 / 50)^2 = 16 coordinates would do
    assert "4.0 times with 65 coordinates" in str(caught.value)
    assert "16 would do" in str(caught.value)
    assert "warmup.refinements" in str(caught.value)
    with pytest.raises(ConfigError, match="not one would do"):
        choose(outlook(config, plans(500.0, 200)), "public")
    assert choose(outlook(config, plans(24.0, 200)), "public") == "means"
    assert lens_dim(config.image, "means") == 65
