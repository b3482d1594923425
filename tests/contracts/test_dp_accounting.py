"""What the ledger relies on in dp-accounting, by numbers computed by hand. A change here stops an upgrade."""

import math

import dp_accounting
import pytest
from dp_accounting import pld, rdp
from scipy.stats import norm


def pld_accountant(interval: float = 1e-3) -> pld.PLDAccountant:
    return pld.PLDAccountant(
        dp_accounting.NeighboringRelation.ADD_OR_REMOVE_ONE, value_discretization_interval=interval
    )


def gaussian_delta(sigma: float, epsilon: float) -> float:
    """Balle and Wang 2018 (arXiv:1805.06530), theorem 8, for sensitivity 1."""
    return norm.cdf(0.5 / sigma - epsilon * sigma) - math.exp(epsilon) * norm.cdf(-0.5 / sigma - epsilon * sigma)


def test_one_gaussian_release_has_the_delta_of_the_formula() -> None:
    # sigma 1, epsilon 1: Phi(-1/2) - e Phi(-3/2) = 0.308538 - 2.718282 * 0.066807 = 0.126937
    assert gaussian_delta(1.0, 1.0) == pytest.approx(0.126937, abs=1e-6)
    accountant = pld_accountant().compose(dp_accounting.GaussianDpEvent(1.0))
    assert accountant.get_delta(1.0) == pytest.approx(0.126937, abs=2e-4)
    assert accountant.get_delta(1.0) >= gaussian_delta(1.0, 1.0)  # rounded to the safe side


def test_four_gaussian_releases_are_one_with_half_the_noise() -> None:
    four = pld_accountant().compose(dp_accounting.GaussianDpEvent(2.0), 4)
    assert four.get_delta(0.7) == pytest.approx(gaussian_delta(1.0, 0.7), rel=2e-3)


def test_poisson_sampling_scales_the_total_variation_by_the_rate() -> None:
    # delta at epsilon 0 is the total variation distance: 0.1 * (2 Phi(1/2) - 1) = 0.1 * 0.382925
    event = dp_accounting.PoissonSampledDpEvent(0.1, dp_accounting.GaussianDpEvent(1.0))
    assert pld_accountant().compose(event).get_delta(0.0) == pytest.approx(0.0382925, abs=2e-4)


def test_poisson_sampling_at_rate_one_is_no_sampling() -> None:
    event = dp_accounting.PoissonSampledDpEvent(1.0, dp_accounting.GaussianDpEvent(1.0))
    assert pld_accountant().compose(event).get_delta(1.0) == pytest.approx(0.126937, abs=2e-4)


def test_the_relation_is_add_or_remove_one() -> None:
    # To replace one is to remove one and to add one: sensitivity 2, as if the noise were half.
    relation = dp_accounting.NeighboringRelation.REPLACE_ONE
    replaced = pld.PLDAccountant(relation, value_discretization_interval=1e-3)
    replaced.compose(dp_accounting.GaussianDpEvent(2.0))
    added = pld_accountant().compose(dp_accounting.GaussianDpEvent(1.0))
    assert replaced.get_delta(1.0) == pytest.approx(added.get_delta(1.0), abs=2e-4)


def test_renyi_bound_of_one_gaussian_release() -> None:
    # Renyi divergence of order a is a / (2 sigma^2); by Canonne et al. 2020, proposition 12, epsilon at order a is
    # a / 2 + log((a - 1) / a) - (log delta + log a) / (a - 1). At a = 6: 3 - 0.182322 + (11.512925 - 1.791759) / 5
    accountant = rdp.RdpAccountant([6.0]).compose(dp_accounting.GaussianDpEvent(1.0))
    assert accountant.get_epsilon(1e-5) == pytest.approx(3 - 0.182322 + 9.721166 / 5, abs=1e-5)


def test_the_order_of_a_heterogeneous_composition_does_not_matter() -> None:
    plain = dp_accounting.GaussianDpEvent(3.0)
    sampled = dp_accounting.PoissonSampledDpEvent(0.05, dp_accounting.GaussianDpEvent(0.8))
    one = pld_accountant().compose(plain).compose(sampled, 20).get_epsilon(1e-5)
    other = pld_accountant().compose(sampled, 20).compose(plain).get_epsilon(1e-5)
    assert one == pytest.approx(other, rel=1e-6)
