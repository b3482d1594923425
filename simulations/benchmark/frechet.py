"""The Frechet distance between two sets of feature vectors. Out of scope: which features (benchmark/referee)."""

from dataclasses import dataclass
from typing import final

import numpy as np
import numpy.typing as npt
from jaxtyping import Float


@final
@dataclass(frozen=True)
class Moments:
    """Mean and covariance of feature vectors, in double precision."""

    mean: npt.NDArray[np.float64]
    covariance: npt.NDArray[np.float64]


def moments(vectors: Float[np.ndarray, "images features"]) -> Moments:
    """Return mean and covariance (divided by the count less one) of at least two vectors.

    Raises:
        ValueError: There are fewer than two.
    """
    if len(vectors) < 2:
        raise ValueError(f"Expected at least 2 vectors to have a covariance, got {len(vectors)}.")
    wide = vectors.astype(np.float64)
    return Moments(wide.mean(axis=0), np.cov(wide, rowvar=False).reshape(wide.shape[1], wide.shape[1]))


def frechet_distance(one: Moments, other: Moments) -> float:
    """Return the squared Frechet distance of two Gaussians with these moments, what the field calls FID.

    Guarantees:
        - zero_to_itself: Equal moments have distance 0 up to rounding.
        - symmetric: The order does not matter.
        - shift_is_squared: Moving all vectors by d adds |d|^2.

    Source: Dowson and Landau (1982); Heusel et al. (2017), equation 6. The trace of the root of C1 C2 is that of the
        root of C1^1/2 C2 C1^1/2, which is symmetric.
    """
    values, vectors = np.linalg.eigh(one.covariance)
    root = (vectors * np.sqrt(values.clip(min=0))) @ vectors.T
    cross = np.sqrt(np.linalg.eigvalsh(root @ other.covariance @ root).clip(min=0)).sum()
    means = np.square(one.mean - other.mean).sum()
    return float(means + np.trace(one.covariance) + np.trace(other.covariance) - 2 * cross)
