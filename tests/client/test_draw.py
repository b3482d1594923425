"""Who is drawn, which images of each, and their views."""

from collections import Counter
from itertools import combinations

import numpy as np
import pytest
import torch
from scipy import stats

from client.draw import draw_patients
from client.intake import Dataset
from common.config import PrivacyConfig
from common.crypto import KeyStream
from tests.tiny_site import numbered

KEY = bytes(range(32))


def at_most(images, views=1):
    return PrivacyConfig(images_per_patient=images, views=views, batch_patients=1)


def drawn_from(batch):
    grey = ((batch.images + 1) * 127.5).round().int()
    return grey[:, 0, 0, 0].tolist(), grey[:, 0, 0, 1].tolist()


def test_all_images_of_one_row():
    batch = draw_patients(numbered([3, 1, 5, 2]), 1.0, at_most(50), KeyStream(KEY))
    patients, numbers = drawn_from(batch)
    assert batch.patients.tolist() == [0, 0, 0, 1, 2, 2, 2, 2, 2, 3, 3]
    assert patients == batch.patients.tolist()
    assert numbers == [0, 1, 2, 0, 0, 1, 2, 3, 4, 0, 1]
    assert batch.labels.tolist() == [patient % 2 for patient in patients]


def test_all_images_of_one_row_when_few_are_drawn():
    stream, dataset = KeyStream(KEY), numbered([3, 1, 5, 2] * 5)
    for _ in range(100):
        batch = draw_patients(dataset, 0.3, at_most(2), stream)
        patients, _ = drawn_from(batch)
        rows = batch.patients.tolist()
        assert sorted(set(rows)) == list(range(batch.number_of_patients))
        assert len(set(zip(rows, patients, strict=True))) == len(set(rows)) == len(set(patients))
        assert max(Counter(rows).values(), default=0) <= 2


def test_poisson_rate_of_one_takes_everybody_and_grey_levels_are_scaled():
    batch = draw_patients(numbered([1] * 256), 1.0, at_most(1), KeyStream(KEY))
    assert batch.number_of_patients == 256
    assert batch.images.min() == -1
    assert batch.images.max() == 1


def test_poisson_with_a_tiny_rate_is_empty():
    batch = draw_patients(numbered([2] * 5), 1e-9, at_most(1), KeyStream(KEY))
    assert (batch.number_of_patients, tuple(batch.images.shape)) == (0, (0, 1, 2, 2))
    assert (len(batch.labels), len(batch.patients)) == (0, 0)


def test_images_of_a_patient_are_chosen_uniformly_without_replacement():
    stream, dataset, draws = KeyStream(KEY), numbered([5]), 3000
    chosen = Counter(
        tuple(sorted(drawn_from(draw_patients(dataset, 1.0, at_most(2), stream))[1])) for _ in range(draws)
    )
    assert set(chosen) == set(combinations(range(5), 2))
    assert stats.chisquare(list(chosen.values())).pvalue > 0.01
    skewed = [count + draws / 50 * (0 in pair) for pair, count in chosen.items()]
    assert stats.chisquare(skewed).pvalue < 0.01


@pytest.mark.parametrize("size", [28, 64])
def test_views_are_the_image_and_moved_copies_of_it(size):
    pixels = np.random.default_rng(0).integers(256, size=(1, 1, size, size))
    dataset = Dataset(pixels.astype(np.uint8), np.zeros(1, np.int64), np.zeros(1, np.int64))
    batch = draw_patients(dataset, 1.0, at_most(1, views=8), KeyStream(KEY))
    views = ((batch.images + 1) * 127.5).round().long().numpy()[:, 0]
    assert (batch.number_of_patients, batch.patients.tolist()) == (1, [0] * 8)
    assert np.array_equal(views[0], pixels[0, 0])
    most, found = round(size / 16), set()
    for view in views[1:]:
        moves = [
            (down, right)
            for down in range(-most, most + 1)
            for right in range(-most, most + 1)
            if np.array_equal(
                view[most:-most, most:-most],
                pixels[0, 0, most + down : size - most + down, most + right : size - most + right],
            )
        ]
        assert len(moves) == 1
        found.add(moves[0])
    assert len(found) > 4


def test_views_move_all_channels_alike():
    pixels = np.random.default_rng(0).integers(128, size=(1, 1, 32, 32)).astype(np.uint8)
    colour = np.concatenate([pixels, pixels + 100, pixels // 2], axis=1)
    one = np.zeros(1, np.int64)
    grey, coloured = (
        draw_patients(Dataset(images, one, one), 1.0, at_most(1, views=8), KeyStream(KEY)).images
        for images in (pixels, colour)
    )
    levels = ((coloured + 1) * 127.5).round().long()
    assert torch.equal(coloured[:, :1], grey)
    assert torch.equal(levels[:, 1], levels[:, 0] + 100)
    assert torch.equal(levels[:, 2], levels[:, 0] // 2)


def test_all_images_of_one_row_with_views():
    batch = draw_patients(numbered([3, 1], 16), 1.0, at_most(2, views=3), KeyStream(KEY))
    assert batch.patients.tolist() == [0] * 6 + [1] * 3
    assert batch.number_of_patients == 2


def test_shifts_of_views_are_uniform_and_secret():
    edge = np.zeros((1, 1, 32, 32), np.uint8)
    edge[0, 0, 16, 16] = 255
    dataset, stream, seen = Dataset(edge, np.zeros(1, np.int64), np.zeros(1, np.int64)), KeyStream(KEY), Counter()
    for _ in range(400):
        batch = draw_patients(dataset, 1.0, at_most(1, views=8), stream)
        for view in batch.images[1:, 0]:
            seen[tuple(divmod(int(view.argmax()), 32))] += 1
    assert len(seen) == 25
    counts = list(seen.values())
    assert stats.chisquare(counts).pvalue > 0.001
    counts[0] += 100
    assert stats.chisquare(counts).pvalue < 0.001
