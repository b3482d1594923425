"""Who takes part in a private step: patients by Poisson sampling, some images of each, and views of those.

Every draw comes from the secret stream. Out of scope: what is done with the batch (client/dp).
"""

import numpy as np
import torch
from jaxtyping import Int64, UInt8

from client.dp import Batch
from client.intake import Dataset
from common.config import PrivacyConfig
from common.crypto import KeyStream
from common.noise import bernoulli, uniform

_LARGEST_SHIFT = 1 / 16
"""Of a side: what a patient's position under the detector varies anyway."""


def draw_patients(dataset: Dataset, sample_rate: float, privacy: PrivacyConfig, secret: KeyStream) -> Batch:
    """Draw each patient independently with probability `sample_rate`, and some images of each.

    Args:
        dataset: The site's patients.
        sample_rate: In (0, 1]; public.
        privacy: At most `images_per_patient` images of a drawn patient, chosen at random without replacement, and
            `views` of each: itself, and copies moved by a few pixels.
        secret: The source of all draws.

    Returns:
        The batch; empty when nobody was drawn.

    Guarantees:
        - poisson: Every patient is in the batch with the same probability, independently of every other.
        - all_images_of_one_row: All images of a patient, and all their views, share one row number.
    """
    drawn = np.flatnonzero(bernoulli(secret, dataset.number_of_patients, sample_rate))
    starts = np.searchsorted(dataset.patients, drawn, side="left")
    ends = np.searchsorted(dataset.patients, drawn, side="right")
    pairs = zip(starts, ends, strict=True)
    chosen = [_some(range(start, end), privacy.images_per_patient, secret) for start, end in pairs]
    rows = np.repeat(np.concatenate([np.empty(0, np.int64), *chosen]), privacy.views)
    patients = np.repeat(np.arange(len(drawn)), [len(images) * privacy.views for images in chosen])
    images = dataset.images[rows]
    if privacy.views > 1:
        images = _moved(images, np.arange(len(rows)) % privacy.views == 0, secret)
    return Batch(
        torch.from_numpy(images).float() / 127.5 - 1,
        torch.from_numpy(dataset.labels[rows]),
        torch.from_numpy(patients.astype(np.int64)),
        len(drawn),
    )


def _some(rows: range, at_most: int, secret: KeyStream) -> Int64[np.ndarray, " some"]:
    candidates = np.arange(rows.start, rows.stop, dtype=np.int64)
    if len(candidates) <= at_most:
        return candidates
    return candidates[np.argsort(uniform(secret, len(candidates)))[:at_most]]


def _moved(
    images: UInt8[np.ndarray, "images channels size size"], stays: np.ndarray, secret: KeyStream
) -> UInt8[np.ndarray, "images channels size size"]:
    """Move each image that does not stay by up to a sixteenth of its side; its border is repeated."""
    count, _, size, _ = images.shape
    most = max(1, round(size * _LARGEST_SHIFT))
    shifts = np.floor(uniform(secret, 2 * count) * (2 * most + 1)).astype(np.int64).reshape(2, count) - most
    lines, columns = np.clip(np.arange(size) + np.where(stays, 0, shifts)[:, :, None], 0, size - 1)
    moved = images[np.arange(count)[:, None, None], :, lines[:, :, None], columns[:, None, :]]
    return np.ascontiguousarray(np.moveaxis(moved, -1, 1))
