import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from client.intake.pixels import MAX_PIXELS, check_size, fit, full_range, luminance
from client.intake.refusals import Refused


def test_fit_is_identity() -> None:
    image = np.random.default_rng(0).integers(0, 256, (32, 32)).astype(np.float32)
    assert np.array_equal(fit(image, 32)[0], image.astype(np.uint8))
    colour = np.random.default_rng(0).integers(0, 256, (32, 32, 3)).astype(np.float32)
    assert np.array_equal(fit(colour, 32, 3), np.moveaxis(colour, 2, 0).astype(np.uint8))


@pytest.mark.parametrize("shape", [(32, 32), (40, 17)])
def test_grey_in_every_channel(shape: tuple[int, int]) -> None:
    image = (np.random.default_rng(0).random(shape) * 255).astype(np.float32)
    assert np.array_equal(fit(image, 32, 3), np.repeat(fit(image, 32), 3, axis=0))


def test_colour_as_grey_is_its_luminance() -> None:
    colour = (np.random.default_rng(0).random((40, 17, 3)) * 255).astype(np.float32)
    assert np.array_equal(fit(colour, 32), fit(luminance(colour), 32))


def test_channels_are_resized_apart_and_filled_with_their_own_darkest_value() -> None:
    colour = np.zeros((40, 80, 3), dtype=np.float32)
    colour[...] = (200, 0, 90)
    colour[0, 0] = (7, 0, 90)
    square = fit(colour, 32, 3)
    assert (square[:, :8] == np.array([7, 0, 90])[:, None, None]).all()
    assert (square[:, 10:22, 2:] == np.array([200, 0, 90])[:, None, None]).all()


def test_aspect_is_kept_and_the_rest_filled_with_the_darkest_value() -> None:
    image = np.full((40, 80), 200, dtype=np.float32)
    image[0, 0] = 7
    square = fit(image, 32)[0]
    assert np.all(square[:8] == 7)
    assert np.all(square[24:] == 7)
    assert np.all(square[10:22, 2:] > 190)


def test_a_strip_does_not_grow_to_its_square() -> None:
    assert fit(np.zeros((1, 65_535), dtype=np.float32), 28, 3).shape == (3, 28, 28)


def test_resizing_is_antialiased() -> None:
    """A checkerboard becomes grey; without the filter it would become black or white."""
    board = (np.indices((128, 128)).sum(axis=0) % 2 * 255).astype(np.float32)
    assert np.abs(fit(board, 32)[0].astype(int)[2:-2, 2:-2] - 127.5).max() < 3


@settings(deadline=None, derandomize=True, max_examples=50)
@given(st.integers(1, 90), st.integers(1, 90), st.sampled_from([28, 32, 64]), st.integers(0, 2**32 - 1))
def test_any_shape_becomes_a_square_inside_the_range(rows: int, columns: int, size: int, seed: int) -> None:
    image = (np.random.default_rng(seed).random((rows, columns)) * 255).astype(np.float32)
    square = fit(image, size)
    assert square.shape == (1, size, size)
    assert square.dtype == np.uint8


def test_full_range() -> None:
    assert np.array_equal(full_range(np.array([[-5, 5], [0, 5]])), np.array([[0, 255], [127.5, 255]], dtype=np.float32))
    assert not full_range(np.full((2, 2), 9)).any()
    with pytest.raises(Refused, match="not finite"):
        full_range(np.array([[np.inf, 0.0]]))


def test_luminance_of_grey_is_grey() -> None:
    assert np.allclose(luminance(np.full((2, 2, 3), 77)), 77)


def test_limits() -> None:
    check_size(1, MAX_PIXELS)
    with pytest.raises(Refused, match="limits"):
        check_size(2, MAX_PIXELS)
    with pytest.raises(Refused, match="no image"):
        check_size(0, 5)
