"""What a release looks at is read alike by site and coordinator, and strictly."""

import numpy as np
import pytest
import torch

from common.config import ImageConfig
from common.errors import WireError
from common.features import feature_map, features
from common.lens import to_arrays
from common.look import look_dims, read_look
from tests.common.test_lens import make_lens, pictures

IMAGE = ImageConfig(size=28, classes=("a", "b"))


def test_the_public_map_does_not_see_labels() -> None:
    look, images = read_look(IMAGE, "public", {}), pictures(3)
    expected = features(feature_map(28), images)
    for labels in (torch.tensor([0, 0, 0]), torch.tensor([1, 0, 1])):
        assert torch.equal(look.vectors(images, labels), expected)


@pytest.mark.parametrize("name", ["means", "learned"])
def test_dims_are_those_of_the_vectors(name) -> None:
    look = read_look(IMAGE, name, to_arrays(make_lens(name)))
    assert look.vectors(pictures(2), torch.tensor([0, 1])).shape == (2, look.dim)
    assert look_dims(IMAGE)[name] == look.dim
    assert look_dims(IMAGE)["public"] == read_look(IMAGE, "public", {}).dim


@pytest.mark.parametrize("name", ["", "Public", "learned ", None, 3, 1.5])
def test_no_other_name_is_known(name) -> None:
    with pytest.raises(WireError, match="look"):
        read_look(IMAGE, name, {})


def test_the_public_map_takes_no_arrays() -> None:
    with pytest.raises(WireError):
        read_look(IMAGE, "public", {"lens.scale": np.ones(64, np.float32)})
