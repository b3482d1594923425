"""The classifier that judges images: reproducible, learns what is there, and its ROC figure by hand."""

import numpy as np
import pytest
import torch

from simulations.evaluate import Scores, Training, area_under_roc, score, train_classifier

SHORT = Training(steps=30, batch=16)


def _bright_or_dark(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    labels = np.arange(count) % 2
    images = rng.integers(0, 100, (count, 28, 28)) + 100 * labels[:, None, None]
    return images.astype(np.uint8), labels.astype(np.int64)


def _weights(seed: int) -> torch.Tensor:
    images, labels = _bright_or_dark(40, 0)
    rng = torch.Generator().manual_seed(seed)
    model = train_classifier(images, torch.from_numpy(labels), 2, rng, SHORT)
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


def test_train_classifier_is_deterministic_in_its_generator() -> None:
    torch.manual_seed(1)
    first = _weights(0)
    torch.manual_seed(2)
    assert torch.equal(first, _weights(0))
    assert not torch.equal(first, _weights(1))


def test_classifier_learns_what_tells_the_classes_apart() -> None:
    images, labels = _bright_or_dark(40, 0)
    model = train_classifier(images, torch.from_numpy(labels), 2, torch.Generator().manual_seed(0), SHORT)
    other_images, other_labels = _bright_or_dark(40, 1)
    assert score(model, other_images, other_labels) == Scores(1.0, 1.0)
    assert score(model, other_images, 1 - other_labels) == Scores(0.0, 0.0)


def test_a_classifier_of_colours_sees_them_and_of_grey_is_what_it_was() -> None:
    rng, labels = np.random.default_rng(0), np.arange(40) % 2
    images = np.repeat(rng.integers(0, 100, (40, 28, 28, 1)), 3, axis=3)
    images[np.arange(40), :, :, 2 * labels] += 100  # red or blue, of one brightness
    images = images.astype(np.uint8)
    model = train_classifier(images, torch.from_numpy(labels), 2, torch.Generator().manual_seed(0), SHORT)
    assert score(model, images, labels).accuracy == 1.0
    grey = train_classifier(images[..., 0], torch.from_numpy(labels), 2, torch.Generator().manual_seed(0), SHORT)
    shapes = [[tuple(parameter.shape) for parameter in one.parameters()] for one in (model, grey)]
    assert (shapes[0][0], shapes[1][0]) == ((32, 3, 5, 5), (32, 1, 5, 5))
    assert shapes[0][1:] == shapes[1][1:]


def test_score_has_no_auc_where_one_class_is_missing() -> None:
    images, labels = _bright_or_dark(40, 0)
    model = train_classifier(images, torch.from_numpy(labels), 2, torch.Generator().manual_seed(0), SHORT)
    assert score(model, images[labels == 1], labels[labels == 1]).auc is None


def test_area_under_roc_counts_ties_half() -> None:
    scores = np.array([0.1, 0.5, 0.5, 0.9])
    # Pairs (positive, negative): (0.5, 0.1) won, (0.5, 0.5) tied, (0.9, 0.1) won, (0.9, 0.5) won.
    assert area_under_roc(scores, np.array([False, False, True, True])) == pytest.approx(3.5 / 4)
