import math

import dp_accounting
import pytest
from dp_accounting import pld, rdp
from hypothesis import given, settings
from hypothesis import strategies as st
from opacus.accountants import PRVAccountant
from scipy.optimize import brentq
from scipy.stats import norm

from common.errors import ConfigError
from common.privacy import MAX_STEPS, Charge, affordable_rounds, epsilon, epsilon_rdp, noise_for

DELTA = 1e-5
FEW = settings(deadline=None, derandomize=True, max_examples=8)

sigmas = st.floats(0.6, 20.0)
rates = st.floats(0.005, 0.6)
counts = st.integers(1, 300)
charges = st.builds(Charge, sigmas, rates, counts)

# the three settings of the literature that the design is held to; epsilon by RDP and by PLD
REFERENCE = [
    (512 / 60_000, 2.0, 174_000, 10.079, 9.385),
    (128 / 60_000, 1.0, 450_000, 9.970, 9.277),
    (512 / 60_000, 14.0, 165_000, 1.0036, 0.9182),
]

# the figures that the design states for them; they hold at the rate of a loader of ceil(60,000 / B) batches
STATED = [
    (1 / 118, 2.0, 174_000, 9.995, 9.307),
    (1 / 469, 1.0, 450_000, 9.963, 9.273),
    (1 / 118, 14.0, 165_000, 0.996, 0.913),
]


def fine_pld(pieces, interval):
    accountant = pld.PLDAccountant(value_discretization_interval=interval)
    for piece in pieces:
        gaussian = dp_accounting.GaussianDpEvent(piece.noise_multiplier)
        accountant.compose(dp_accounting.PoissonSampledDpEvent(piece.sample_rate, gaussian), piece.steps)
    return accountant.get_epsilon(DELTA)


def analytic_gaussian(sigma):
    """Return epsilon of one Gaussian release in closed form (Balle and Wang 2018, theorem 8)."""

    def excess(value):
        a, b = 0.5 / sigma, value * sigma
        return norm.cdf(a - b) - math.exp(value) * norm.cdf(-a - b) - DELTA

    return brentq(excess, 0.0, 60.0, xtol=1e-9)


@pytest.mark.parametrize(("rate", "sigma", "steps", "by_rdp", "by_pld"), REFERENCE)
def test_reference_figures(rate, sigma, steps, by_rdp, by_pld):
    piece = Charge(sigma, rate, steps)
    assert epsilon([piece], DELTA) == pytest.approx(by_pld, rel=1e-4)
    assert epsilon_rdp([piece], DELTA) == pytest.approx(by_rdp, rel=1e-4)


@pytest.mark.parametrize(("rate", "sigma", "steps", "by_rdp", "by_pld"), STATED)
def test_stated_figures_to_the_third_digit(rate, sigma, steps, by_rdp, by_pld):
    piece = Charge(sigma, rate, steps)
    assert epsilon_rdp([piece], DELTA) == pytest.approx(by_rdp, rel=1e-4)
    assert epsilon([piece], DELTA) == pytest.approx(by_pld, rel=2e-3)  # a finer grid than theirs: 9.307, 9.272, 0.911


@pytest.mark.parametrize(("rate", "sigma", "steps", "by_rdp", "by_pld"), STATED)
def test_stated_figures_by_dp_accounting_alone_to_the_third_digit(rate, sigma, steps, by_rdp, by_pld):
    """With the library's own grid of 1e-4: what the design states, and what `epsilon` computes finer."""
    assert fine_pld([Charge(sigma, rate, steps)], 1e-4) == pytest.approx(by_pld, abs=5e-4)


@pytest.mark.parametrize(("images", "stated"), [(2, 22.6), (4, 59.9)])
def test_image_level_accounting_is_wrong_for_patients(images, stated):
    # a patient with k images is drawn about k times as often as the accounting of images believes
    assert epsilon([Charge(2.0, images / 118, 174_000)], DELTA) == pytest.approx(stated, rel=1e-2)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Optimal order")  # Opacus' bound on its own grid
@pytest.mark.parametrize(("rate", "sigma", "steps", "by_rdp", "by_pld"), REFERENCE)
def test_reference_figures_by_the_libraries_alone(rate, sigma, steps, by_rdp, by_pld):
    accountant = PRVAccountant()
    accountant.history = [(sigma, rate, steps)]
    assert accountant.get_epsilon(DELTA) == pytest.approx(by_pld, abs=0.011)  # its stated error is 0.01
    renyi = rdp.RdpAccountant()
    renyi.compose(dp_accounting.PoissonSampledDpEvent(rate, dp_accounting.GaussianDpEvent(sigma)), steps)
    assert renyi.get_epsilon(DELTA) == pytest.approx(by_rdp, rel=1e-4)
    assert fine_pld([Charge(sigma, rate, steps)], 4e-5) == pytest.approx(by_pld, rel=5e-4)


@pytest.mark.parametrize("sigma", [0.5, 0.67, 1.0, 5.0, 80.0])
def test_one_gaussian_agrees_with_the_closed_form(sigma):
    exact = analytic_gaussian(sigma)
    assert epsilon([Charge(sigma, 1.0, 1)], DELTA) == pytest.approx(exact, rel=2e-4)
    assert epsilon([Charge(sigma * 4, 1.0, 16)], DELTA) == pytest.approx(exact, rel=2e-4)


@FEW
@given(charges, st.lists(charges, max_size=2), st.randoms(use_true_random=False))
def test_order_does_not_matter(first, others, random):
    pieces = [first, *others, Charge(1.5, 1.0, 1)]
    split = [Charge(piece.noise_multiplier, piece.sample_rate, 1) for piece in pieces[:1]]
    rest = Charge(first.noise_multiplier, first.sample_rate, first.steps - 1)
    shuffled = [*split, rest, *others, Charge(1.5, 1.0, 1)]
    random.shuffle(shuffled)
    assert epsilon(shuffled, DELTA) == epsilon(pieces, DELTA)


@pytest.mark.slow
@FEW
@given(sigmas, rates, counts)
def test_monotone_in_steps_and_rate_and_antitone_in_noise(sigma, rate, steps):
    here = epsilon([Charge(sigma, rate, steps)], DELTA)
    small = 1e-3 * here + 1e-9
    assert epsilon([Charge(sigma, rate, steps + 5)], DELTA) >= here - small
    assert epsilon([Charge(sigma, rate * 1.3, steps)], DELTA) >= here - small
    assert epsilon([Charge(sigma * 1.1, rate, steps)], DELTA) <= here + small


@pytest.mark.slow
@FEW
@given(st.lists(charges, min_size=1, max_size=3), charges)
def test_monotone_after_what_other_runs_charged(before, piece):
    def cost(sigma, rate, steps):
        return epsilon([*before, Charge(sigma, rate, steps)], DELTA)

    sigma, rate, steps = piece.noise_multiplier, piece.sample_rate, piece.steps
    here = cost(sigma, rate, steps)
    small = 1e-3 * here + 1e-9
    assert epsilon(before, DELTA) <= here + small
    assert cost(sigma, rate, steps * 2) >= here - small
    assert cost(sigma, rate * 1.5, steps) >= here - small
    assert cost(sigma * 1.5, rate, steps) <= here + small


@pytest.mark.slow
@FEW
@given(st.lists(charges, min_size=1, max_size=3))
def test_upper_bound_never_below_dp_accounting_beyond_its_error(pieces):
    grid = 5e-4  # theirs is rounded upwards too, by up to a width where epsilon is next to nothing
    assert epsilon(pieces, DELTA) >= fine_pld(pieces, grid) * (1 - 1e-3) - grid


@FEW
@given(st.lists(charges, min_size=1, max_size=3))
def test_pld_is_at_most_rdp(pieces):
    assert epsilon(pieces, DELTA) <= epsilon_rdp(pieces, DELTA) + 1e-3


@pytest.mark.parametrize(
    "pieces",
    [
        [Charge(2.0, 0.32, 96)],
        [Charge(0.8, 0.01, 200)],
        [Charge(0.6, 0.002, 20)],
        [Charge(20.0, 0.5, 300)],
        [Charge(1.2, 0.05, 30), Charge(4.0, 0.3, 60)],
        [Charge(0.7, 0.004, 10), Charge(15.0, 0.2, 500)],
    ],
)
def test_upper_bound_against_a_fine_grid(pieces):
    here, fine = epsilon(pieces, DELTA), fine_pld(pieces, 3e-4)
    assert fine * (1 - 1e-3) <= here <= fine * (1 + 2e-3)


@pytest.mark.filterwarnings("ignore:Optimal order")
@pytest.mark.parametrize(
    ("sigma", "rate", "steps"), [(0.9, 0.01, 50), (2.0, 0.32, 96), (1.2, 0.1, 100), (8.0, 0.3, 300)]
)
def test_agrees_with_the_prv_accountant_within_its_stated_error(sigma, rate, steps):
    accountant = PRVAccountant()
    accountant.history = [(sigma, rate, steps)]
    stated = 0.03
    upper = accountant.get_epsilon(DELTA, eps_error=stated)
    here = epsilon([Charge(sigma, rate, steps)], DELTA)
    assert upper - 2 * stated <= here <= upper + 1e-3


def test_nothing_costs_nothing():
    assert epsilon([], DELTA) == epsilon_rdp([], DELTA) == 0.0
    assert epsilon([Charge(1.0, 0.5, 0), Charge(1.0, 0.0, 100)], DELTA) == 0.0


def test_extreme_compositions_are_bounded_from_above_and_quick():
    assert epsilon([Charge(0.05, 0.3, MAX_STEPS)], DELTA) > 1e6
    assert 0 < epsilon([Charge(2.0, 0.1, 10)], 1e-15) < 60
    assert epsilon([Charge(1e6, 0.3, 100)], DELTA) == 0.0


@pytest.mark.parametrize(
    ("noise", "rate", "steps"),
    [
        (0.0, 0.5, 1),
        (-1.0, 0.5, 1),
        (math.nan, 0.5, 1),
        (1.0, 1.1, 1),
        (1.0, math.nan, 1),
        (1.0, 0.5, -1),
        (1.0, 1, 10**9),
    ],
)
def test_what_cannot_be_charged(noise, rate, steps):
    with pytest.raises(ConfigError, match="Expected"):
        Charge(noise, rate, steps)


def test_too_many_steps_in_all():
    with pytest.raises(ConfigError, match="in all"):
        epsilon([Charge(100.0, 0.1, MAX_STEPS), Charge(100.0, 0.1, 1)], DELTA)


@pytest.mark.parametrize("delta", [0.0, 1.0, math.nan])
def test_delta_out_of_range(delta):
    for call in (epsilon, epsilon_rdp):
        with pytest.raises(ConfigError, match="delta"):
            call([Charge(1.0, 0.5, 1)], delta)
    with pytest.raises(ConfigError, match="delta"):
        noise_for(1.0, delta, 0.5, 1)


@pytest.mark.slow
@settings(deadline=None, derandomize=True, max_examples=4)
@given(st.floats(0.2, 12.0), st.floats(0.02, 1.0), st.integers(1, 200), st.booleans())
def test_noise_for_holds_exactly_and_is_smallest(target, rate, steps, after_warmup):
    before = [Charge(noise_for(0.6 * target, DELTA, 1.0, 1), 1.0, 1)] if after_warmup else []
    sigma = noise_for(target, DELTA, rate, steps, before)
    assert epsilon([*before, Charge(sigma, rate, steps)], DELTA) <= target
    assert epsilon([*before, Charge(sigma * 0.998, rate, steps)], DELTA) > target
    assert sigma == float(f"{sigma:.4g}")


def test_noise_for_says_when_nothing_helps():
    with pytest.raises(ConfigError, match="No noise multiplier"):
        noise_for(1.0, DELTA, 0.3, 100, [Charge(1.0, 1.0, 1)])


@pytest.mark.slow
@settings(deadline=None, derandomize=True, max_examples=10)
@given(st.lists(charges, max_size=2), charges, st.integers(0, 60), st.floats(0.3, 15.0))
def test_affordable_rounds_that_many_fit_and_one_more_does_not(before, one_round, rounds, bound):
    count = affordable_rounds(before, one_round, rounds, bound, DELTA)
    assert 0 <= count <= rounds
    if count > 0:
        assert epsilon([*before, *[one_round] * count], DELTA) <= bound
    if count < rounds:
        assert epsilon([*before, *[one_round] * (count + 1)], DELTA) > bound


@pytest.mark.parametrize(
    ("before", "rounds", "bound", "expected"),
    [
        ([], 0, 10.0, 0),
        ([], 8, 10.0, 8),
        ([], 1000, 10.0, 18),
        ([Charge(0.67, 1.0, 1)], 1000, 10.0, 8),
        ([Charge(0.67, 1.0, 1)], 8, 7.0, 0),  # gone already
        ([Charge(0.67, 1.0, 1)], 8, math.nan, 0),
        ([], 8, 1e-9, 0),
    ],
)
def test_affordable_rounds_part_of_a_plan(before, rounds, bound, expected):
    assert affordable_rounds(before, Charge(2.5, 0.32, 12), rounds, bound, DELTA) == expected


def test_affordable_rounds_end_where_the_account_ends():
    faint = Charge(1e6, 1.0, 1000)
    assert affordable_rounds([], faint, 10**5, 10.0, DELTA) == MAX_STEPS // 1000
    assert affordable_rounds([Charge(1e6, 1.0, 1)], faint, 10**5, 10.0, DELTA) == MAX_STEPS // 1000 - 1
    assert affordable_rounds([], Charge(1.0, 0.5, 0), 7, 10.0, DELTA) == 7
    with pytest.raises(ConfigError, match="delta"):
        affordable_rounds([], faint, 1, 10.0, 1.0)
