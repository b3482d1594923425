"""The Frechet distance against closed forms."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from simulations.benchmark.frechet import Moments, frechet_distance, moments


def _vectors(seed: int, count: int = 50, features: int = 5) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.normal(size=(count, features)) @ rng.normal(size=(features, features))


def test_a_case_by_hand() -> None:
    # Diagonal covariances: |(3, 4)|^2 + (2 - 1)^2 + (5 - 3)^2.
    one = Moments(np.zeros(2), np.diag([4.0, 25.0]))
    other = Moments(np.array([3.0, 4.0]), np.diag([1.0, 9.0]))
    assert frechet_distance(one, other) == pytest.approx(25 + 1 + 4)


def test_a_case_whose_covariances_do_not_commute() -> None:
    # For 2 x 2 the trace of the root of M = C1 C2 is sqrt(tr M + 2 sqrt(det M)).
    one, other = np.array([[2.0, 1.0], [1.0, 2.0]]), np.diag([1.0, 4.0])
    product = one @ other
    root = np.sqrt(np.trace(product) + 2 * np.sqrt(np.linalg.det(product)))
    found = frechet_distance(Moments(np.zeros(2), one), Moments(np.zeros(2), other))
    assert found == pytest.approx(4 + 5 - 2 * root)


@given(st.integers(0, 1000))
@settings(derandomize=True, deadline=None, max_examples=25)
def test_zero_to_itself(seed: int) -> None:
    one = moments(_vectors(seed))
    assert frechet_distance(one, one) == pytest.approx(0, abs=1e-9 * np.trace(one.covariance))


@given(st.integers(0, 1000))
@settings(derandomize=True, deadline=None, max_examples=25)
def test_symmetric(seed: int) -> None:
    one, other = moments(_vectors(seed)), moments(_vectors(seed + 1))
    assert frechet_distance(one, other) == pytest.approx(frechet_distance(other, one))


@given(st.integers(0, 1000), st.floats(-5, 5))
@settings(derandomize=True, deadline=None, max_examples=25)
def test_shift_is_squared(seed: int, shift: float) -> None:
    vectors = _vectors(seed)
    found = frechet_distance(moments(vectors), moments(vectors + shift))
    assert found == pytest.approx(5 * shift**2, abs=1e-6)


def test_covariances_of_rank_one_are_no_obstacle() -> None:
    line = np.outer(np.arange(10.0), [1.0, 2.0, 0.0])
    assert frechet_distance(moments(line), moments(-line)) == pytest.approx((2 * 4.5) ** 2 * 5)


def test_one_vector_has_no_covariance() -> None:
    with pytest.raises(ValueError, match="at least 2"):
        moments(np.zeros((1, 3)))
