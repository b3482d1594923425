"""What a request wants looked at: read alike by site and coordinator, and refused where it is no such thing."""

import numpy as np
import pytest
import torch

from common import lens
from common.config import ImageConfig
from common.errors import WireError
from common.features import feature_map, features
from common.lens import SIGHTS, Sight
from common.look import PUBLIC, look_dims, read_look
from tests.hostile_requests import BAD_LENSES, LOOKS, make_lens

IMAGE = ImageConfig(size=28, classes=("clear", "opacity"))
PIXELS = torch.rand(4, 1, 28, 28, generator=torch.Generator().manual_seed(0)) * 2 - 1
LABELS = torch.tensor([0, 1, 1, 0])


def test_public_is_the_public_map_whatever_the_labels() -> None:
    look = read_look(IMAGE, PUBLIC, {})
    assert torch.equal(look.vectors(PIXELS, LABELS), features(feature_map(28), PIXELS))
    assert torch.equal(look.vectors(PIXELS, LABELS), look.vectors(PIXELS, 1 - LABELS))


@pytest.mark.parametrize("sight", SIGHTS)
def test_a_sight_is_the_lens_of_the_arrays(sight: Sight) -> None:
    arrays = make_lens(IMAGE, sight)
    expected = lens.look(lens.from_arrays(IMAGE, sight, arrays), PIXELS, LABELS)
    assert torch.equal(read_look(IMAGE, sight, arrays).vectors(PIXELS, LABELS), expected)


@pytest.mark.parametrize("channels", [1, 3])
def test_dims_are_the_lengths_of_the_vectors(channels: int) -> None:
    image = ImageConfig(size=32, channels=channels, classes=("clear", "opacity"))
    dims = look_dims(image)
    assert set(dims) == {PUBLIC, *SIGHTS}
    for name, dim in dims.items():
        look = read_look(image, name, {} if name == PUBLIC else make_lens(image, name))
        assert look.dim == dim
        assert look.vectors(torch.zeros(2, channels, 32, 32), torch.tensor([0, 1])).shape == (2, dim)


@pytest.mark.parametrize("look", LOOKS, ids=lambda look: repr(look)[:20])
def test_what_is_no_look_is_refused_without_being_repeated(look: object) -> None:
    with pytest.raises(WireError) as refused:
        read_look(IMAGE, look, {})
    assert len(str(refused.value)) < 200


def test_public_takes_no_arrays() -> None:
    for arrays in ({"w": np.zeros(1, np.float32)}, make_lens(IMAGE, "means")):
        with pytest.raises(WireError, match="Expected 0 named arrays"):
            read_look(IMAGE, PUBLIC, arrays)


@pytest.mark.parametrize("how", BAD_LENSES)
def test_a_bad_lens_is_refused(how: str) -> None:
    with pytest.raises(WireError):
        read_look(IMAGE, "learned", BAD_LENSES[how](make_lens(IMAGE)))
