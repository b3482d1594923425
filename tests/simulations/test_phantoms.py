"""The made-up patients and their images: laws, likenesses and differences, learnability."""

from collections import Counter
from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from simulations.phantoms.anatomy import render
from simulations.phantoms.cohort import CLASSES, ENCODINGS, MAX_IMAGES, draw_patients, draw_scanner

SETTINGS = settings(deadline=None, derandomize=True, max_examples=15)
SEEDS = st.integers(0, 2**32 - 1)


def reduced(patient, image, scanner):
    """Render as the training sees an image: 32 x 32 pixels, mean 0, standard deviation 1."""
    small = render(patient, image, scanner, 64).reshape(32, 2, 32, 2).mean(axis=(1, 3)).ravel()
    return (small - small.mean()) / small.std()


def labelled(count, seed):
    patients = draw_patients(count, seed)
    scanners = [draw_scanner(site, seed) for site in range(4)]
    images = [reduced(patient, 0, scanners[number % 4]) for number, patient in enumerate(patients)]
    return np.stack(images), np.array([patient.label for patient in patients])


@SETTINGS
@given(seed=SEEDS, fewer=st.integers(0, 30), more=st.integers(0, 30))
def test_prefix_stable(seed, fewer, more):
    assert draw_patients(fewer + more, seed)[:fewer] == draw_patients(fewer, seed)


@SETTINGS
@given(seed=SEEDS, count=st.integers(1, 40))
def test_classes_balanced_and_identifiers_distinct(seed, count):
    patients = draw_patients(count, seed)
    counts = Counter(patient.label for patient in patients)
    assert set(counts) <= set(range(len(CLASSES)))
    assert max(counts.values()) - min(counts[label] for label in range(len(CLASSES))) <= 1
    assert len({patient.patient_id for patient in patients}) == count
    assert len({patient.seed for patient in patients}) == count


def test_another_seed_gives_other_patients_of_another_issuer():
    one, other = draw_patients(50, 1), draw_patients(50, 2)
    assert {patient.issuer for patient in one}.isdisjoint(patient.issuer for patient in other)
    assert {patient.seed for patient in one}.isdisjoint(patient.seed for patient in other)


def test_images_skewed():
    numbers = np.array([patient.images for patient in draw_patients(3000, 5)])
    counts = np.bincount(numbers, minlength=MAX_IMAGES + 1)
    assert counts[0] == 0
    assert len(counts) == MAX_IMAGES + 1
    law = 0.56 ** np.arange(MAX_IMAGES)
    assert stats.chisquare(counts[1:], 3000 * law / law.sum()).pvalue > 0.001
    wrong = 0.65 ** np.arange(MAX_IMAGES)
    assert stats.chisquare(counts[1:], 3000 * wrong / wrong.sum()).pvalue < 1e-6
    assert abs(numbers.mean() - 2.2) < 0.1
    assert counts.argmax() == 1


def test_images_do_not_depend_on_the_class():
    patients = draw_patients(3000, 6)
    table = np.zeros((len(CLASSES), MAX_IMAGES))
    for patient in patients:
        table[patient.label, patient.images - 1] += 1
    assert stats.chi2_contingency(table).pvalue > 0.001


@SETTINGS
@given(seed=SEEDS, turn=st.integers(0, 5))
def test_all_encodings_in_four_sites(seed, turn):
    sites = [draw_scanner(4 * turn + place, seed).encodings for place in range(4)]
    assert Counter(encoding for encodings in sites for encoding in encodings) == Counter(ENCODINGS)
    assert len(ENCODINGS) == 48
    assert {len(encodings) for encodings in sites} == {12}


def test_deterministic():
    patient, scanner = draw_patients(1, 3)[0], draw_scanner(2, 3)
    assert render(patient, 0, scanner).tobytes() == render(patient, 0, scanner).tobytes()
    assert draw_scanner(2, 3) == scanner


@pytest.mark.parametrize("size", [28, 33, 128])
def test_images_are_in_range_and_used_well(size):
    for number, patient in enumerate(draw_patients(8, 4)):
        image = render(patient, 0, draw_scanner(number, 4), size)
        assert image.shape == (size, size)
        assert image.dtype == np.float32
        assert image.min() >= 0.0
        assert image.max() <= 1.0
        assert image.std() > 0.08


def test_the_chest_does_not_depend_on_the_size():
    patient, scanner = draw_patients(1, 8)[0], replace(draw_scanner(0, 8), noise=0.0)
    large = render(patient, 0, scanner, 128).reshape(64, 2, 64, 2).mean(axis=(1, 3))
    assert np.abs(large - render(patient, 0, scanner, 64)).mean() < 0.01


def test_lungs_are_dark_and_the_middle_is_bright():
    scanner = replace(draw_scanner(0, 1), noise=0.0)
    for patient in (patient for patient in draw_patients(40, 1) if CLASSES[patient.label] == "clear"):
        image = render(patient, 0, scanner)
        right, middle, left = (image[40:75, column : column + 8].mean() for column in (32, 60, 88))
        assert max(right, left) < 0.75 * middle


def test_images_of_a_patient_are_alike():
    """Distances between two images of one patient are well below those between patients of the same class."""
    scanner = draw_scanner(1, 9)
    patients = [patient for patient in draw_patients(150, 9) if patient.images >= 2][:48]
    first = np.stack([reduced(patient, 0, scanner) for patient in patients])
    second = np.stack([reduced(patient, 1, scanner) for patient in patients])
    distance = np.linalg.norm(first[:, None] - second[None], axis=2)
    labels = np.array([patient.label for patient in patients])
    others = (labels[:, None] == labels) & ~np.eye(len(patients), dtype=bool)
    assert np.diag(distance).mean() < 0.7 * distance[others].mean()
    assert (distance.argmin(axis=0) == np.arange(len(patients))).mean() > 0.4
    assert np.diag(distance).min() > 1.0


def test_hospitals_differ():
    """The same patient looks different at every hospital, by more than the noise."""
    patient = draw_patients(1, 2)[0]
    scanners = [draw_scanner(site, 2) for site in range(6)]
    images = [render(patient, 0, replace(scanner, noise=0.0)) for scanner in scanners]
    for one, other in combinations(images, 2):
        assert np.abs(one - other).mean() > 0.01
    assert len({scanner.name for scanner in scanners}) == 6


def linear_accuracy(images, labels, test_images, test_labels):
    targets = np.eye(len(CLASSES))[labels] - 1.0 / len(CLASSES)
    weights = np.linalg.solve(images.T @ images + 300.0 * np.eye(images.shape[1]), images.T @ targets)
    return float(((test_images @ weights).argmax(axis=1) == test_labels).mean())


@pytest.mark.slow
def test_classes_are_learnable_by_a_linear_model():
    """Chance is 0.25 with standard error 0.03 on 200 images; shuffled labels stay there."""
    images, labels = labelled(600, 11)
    test_images, test_labels = labelled(200, 12)
    assert 0.45 < linear_accuracy(images, labels, test_images, test_labels) < 0.9
    shuffled = np.random.default_rng(0).permutation(labels)
    assert linear_accuracy(images, shuffled, test_images, test_labels) < 0.37


@pytest.mark.slow
def test_classes_are_learnable_by_a_small_network():
    images, labels = (torch.tensor(array) for array in labelled(1500, 13))
    test_images, test_labels = (torch.tensor(array) for array in labelled(300, 14))
    generator = torch.Generator().manual_seed(0)
    layers = [torch.nn.Unflatten(1, (1, 32, 32))]
    for inputs, outputs in ((1, 16), (16, 32), (32, 32)):
        layers += [torch.nn.Conv2d(inputs, outputs, 3, padding=1), torch.nn.ReLU(), torch.nn.MaxPool2d(2)]
    network = torch.nn.Sequential(*layers, torch.nn.Flatten(), torch.nn.Linear(512, len(CLASSES)))
    for parameter in network.parameters():
        fan_in = parameter[0].numel() if parameter.ndim > 1 else 1e6
        torch.nn.init.normal_(parameter, std=(2.0 / fan_in) ** 0.5, generator=generator)
    optimizer = torch.optim.Adam(network.parameters(), 2e-3)
    for _ in range(12):
        for rows in torch.randperm(len(images), generator=generator).split(64):
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(network(images[rows]), labels[rows]).backward()
            optimizer.step()
    with torch.no_grad():
        accuracy = (network(test_images).argmax(dim=1) == test_labels).float().mean().item()
    assert accuracy > 0.7
