"""The bounded sums: what one patient can do to them."""

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from client.warmup import _CHUNK, embedding_sum, rows_alike
from common.config import ImageConfig
from common.crypto import KeyStream
from common.errors import IntakeError
from common.features import CONSTANT, feature_dim, feature_map, features
from common.lens import SIGHTS, Sight
from common.look import PUBLIC, Look, read_look
from common.noise import gaussian
from tests.hostile_requests import HOSTILE_LENSES, make_lens

FM = feature_map(28)
CLASSES = 3
GREY, COLOUR = (ImageConfig(size=28, channels=channels, classes=("a", "b", "c")) for channels in (1, 3))
LOOK = read_look(GREY, PUBLIC, {})


def draw(rng: np.random.Generator, count: int) -> npt.NDArray[np.uint8]:
    kinds = [
        rng.integers(0, 256, (count, 1, 28, 28)),
        np.full((count, 1, 28, 28), rng.integers(0, 256)),
        rng.integers(0, 2, (count, 1, 28, 28)) * 255,
    ]
    return kinds[rng.integers(0, 3)].astype(np.uint8)


@settings(deadline=None, derandomize=True, max_examples=25)
@given(seed=st.integers(0, 2**31), others=st.integers(0, 8), count=st.sampled_from([1, 2, 7, 200]), mixed=st.booleans())
def test_one_patient_one_unit(seed: int, others: int, count: int, mixed: bool) -> None:
    rng = np.random.default_rng(seed)
    images = np.concatenate([draw(rng, others), draw(rng, count)])
    labels = rng.integers(0, CLASSES, len(images)) if mixed else np.full(len(images), 1)
    patients = np.array([f"p{number % 3}" for number in range(others)] + ["the patient"] * count)
    order = rng.permutation(len(images))
    colour = np.concatenate([images, draw(rng, len(images)), 255 - images], axis=1)
    for pixels, look in ((colour, read_look(COLOUR, PUBLIC, {})), (images, LOOK)):
        everybody = embedding_sum(pixels[order], labels[order], patients[order], CLASSES, look)
        without = embedding_sum(pixels[:others], labels[:others], patients[:others], CLASSES, look)
        moved = (everybody - without).norm().item()
        assert moved <= 1
    if not mixed and count == 1:
        assert moved > 0.99  # and the whole unit is used, none of the budget is lost


@settings(deadline=None, derandomize=True, max_examples=15)
@given(seed=st.integers(0, 2**31), copies=st.integers(2, 5))
def test_duplicates(seed: int, copies: int) -> None:
    rng = np.random.default_rng(seed)
    images, labels = draw(rng, 6), rng.integers(0, CLASSES, 6)
    patients = np.array([0, 0, 1, 1, 1, 2])
    more = np.concatenate([np.arange(6), np.repeat(np.flatnonzero(patients == 1), copies - 1)])
    once = embedding_sum(images, labels, patients, CLASSES, LOOK)
    again = embedding_sum(images[more], labels[more], patients[more], CLASSES, LOOK)
    assert torch.allclose(once, again, atol=1e-6)


@pytest.mark.parametrize("sight", SIGHTS)
@pytest.mark.parametrize("how", HOSTILE_LENSES)
def test_one_patient_one_unit_through_a_hostile_lens(sight: Sight, how: str) -> None:
    """Overflow, NaN, or a scale so small that the last bit of a pixel decides: the others' part stays what it was."""
    look = read_look(GREY, sight, HOSTILE_LENSES[how](make_lens(GREY, sight)))
    rng = np.random.default_rng(0)
    images = np.concatenate([draw(rng, 2), draw(rng, 3), draw(rng, 2)])
    labels, patients = rng.integers(0, CLASSES, 7), np.array([0, 0, 1, 1, 1, 2, 2])
    everybody = embedding_sum(images, labels, patients, CLASSES, look)
    assert everybody.isfinite().all()
    for patient in range(3):
        others = patients != patient
        without = embedding_sum(images[others], labels[others], patients[others], CLASSES, look)
        assert (everybody - without).norm() <= 1


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_one_patient_one_unit_counts_what_is_not_finite_as_zero(value: float) -> None:
    """The second image's vector is not finite: the patient's mean is half of the first's, cut down to length 1."""

    def vectors(images: Tensor, labels: Tensor) -> Tensor:
        rows = torch.full((len(images), 4), 3e38)
        rows[images[:, 0, 0, 0] > 0, 2] = value
        return rows + 0 * labels[:, None]

    images = np.zeros((2, 1, 28, 28), np.uint8)
    images[1] = 255
    total = embedding_sum(images, np.array([1, 1]), np.array([7, 7]), CLASSES, Look(vectors, 4, vectors))
    assert torch.allclose(total[1], torch.full((4,), 0.25, dtype=torch.float64))
    assert torch.all(total[[0, 2]] == 0)


def kept(look: Look) -> tuple[Look, list[Tensor]]:
    """Make a look that keeps what it gives."""
    seen: list[Tensor] = []

    def vectors(images: Tensor, labels: Tensor) -> Tensor:
        seen.append(look.vectors(images, labels))
        return seen[-1]

    return Look(vectors, look.dim, look.trial), seen


@pytest.mark.parametrize("what", [PUBLIC, *SIGHTS])
@pytest.mark.parametrize("image", [GREY, COLOUR], ids=["grey", "colour"])
def test_rounding_of_one_image_does_not_depend_on_the_others(image: ImageConfig, what: str) -> None:
    """Bit by bit, whatever stands before it and however many there are: a lens could make a last bit decide a vector,
    and then one patient would move what the others give."""
    look, seen = kept(read_look(image, what, {} if what == PUBLIC else make_lens(image, what)))
    rng = np.random.default_rng(1)
    images = rng.integers(0, 256, (300, image.channels, 28, 28)).astype(np.uint8)
    labels, patients = rng.integers(0, CLASSES, 300), np.arange(300)
    embedding_sum(images, labels, patients, CLASSES, look)
    whole = torch.cat(seen)[:300]
    for first, last in ((0, 1), (0, 100), (1, 258), (37, 60), (299, 300)):
        seen.clear()
        part = slice(first, last)
        embedding_sum(images[part], labels[part], patients[part], CLASSES, look)
        assert torch.equal(torch.cat(seen)[: last - first], whole[part])


def test_images_pass_one_by_one_where_a_place_shows_in_the_bits() -> None:
    def shows_its_place(images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return images.flatten(1)[:, :4] * (1 + torch.arange(len(images))[:, None] * 2.0**-22)

    rng = np.random.default_rng(3)
    images, labels = rng.integers(0, 256, (9, 1, 28, 28)).astype(np.uint8), np.arange(9)
    look = Look(lambda images, labels: torch.zeros(len(images), 4), 4, shows_its_place)  # hides it from a trial
    assert rows_alike(look, (1, 28, 28)) == 1
    look = Look(shows_its_place, 4, shows_its_place)
    assert rows_alike(look, (1, 28, 28)) == 1
    assert rows_alike(LOOK, (1, 28, 28)) == _CHUNK
    everybody = embedding_sum(images, labels, np.arange(9), 9, look)
    last = embedding_sum(images[8:], labels[8:], np.arange(1), 9, look)
    assert torch.equal(everybody - embedding_sum(images[:8], labels[:8], np.arange(8), 9, look), last)


def test_sum_is_the_plain_loop_over_patients() -> None:
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (700, 1, 28, 28)).astype(np.uint8)  # more than two chunks
    labels, patients = rng.integers(0, CLASSES, 700), rng.integers(0, 40, 700)
    vectors = features(FM, torch.from_numpy(images.astype(np.float32)) / 127.5 - 1).double()
    expected = torch.zeros(CLASSES, feature_dim(FM), dtype=torch.float64)
    for patient in range(40):
        mine = np.flatnonzero(patients == patient)
        for image in mine:
            expected[labels[image]] += vectors[image] / len(mine)
    total = embedding_sum(images, labels, patients, CLASSES, LOOK)
    assert torch.allclose(total, expected, atol=1e-5)
    assert total[:, 0].sum().item() == pytest.approx(40 * CONSTANT)


def test_an_empty_site_adds_nothing() -> None:
    nobody = np.zeros(0, dtype=np.int64)
    total = embedding_sum(np.zeros((0, 1, 28, 28), dtype=np.uint8), nobody, nobody, CLASSES, LOOK)
    assert total.shape == (CLASSES, feature_dim(FM))
    assert torch.all(total == 0)


@pytest.mark.parametrize("label", [-1, CLASSES])
def test_labels_out_of_range_are_refused(label: int) -> None:
    images = np.zeros((2, 1, 28, 28), dtype=np.uint8)
    with pytest.raises(IntakeError, match="labels from 0 to 2"):
        embedding_sum(images, np.array([0, label]), np.array(["anna", "anna"]), CLASSES, LOOK)


def test_rounded_last_hides_the_exact_sum():
    """The attack on low bits: with the true sum, could a float32 noise have given what was released? See Mironov 2012.

    Noise that was rounded before it was added would make every coordinate reachable from the true sum and leave some
    unreachable from a neighbour's.
    """
    exact = torch.rand(20_000, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 40
    noise = gaussian(KeyStream(bytes(range(32))), (20_000,), 1.1)

    def unreachable(released):
        near = (released.double() - exact).float()
        steps = [near, torch.nextafter(near, near + 1), torch.nextafter(near, near - 1)]
        return int((~torch.stack([(exact + n.double()).float() == released for n in steps]).any(dim=0)).sum())

    assert unreachable((exact + noise.float().double()).float()) == 0  # what a wrong order looks like
    assert unreachable((exact + noise).float()) > 200
