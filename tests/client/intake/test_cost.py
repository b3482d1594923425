"""What a run would cost, as the first look says."""

import pytest

from client.intake.cost import Cost, estimate


def cost(patients: int, declared: int | None = None) -> Cost:
    found = estimate(patients, declared)
    assert found is not None
    return found


@pytest.mark.parametrize(("patients", "declared", "number"), [(29, None, 29), (1299, None, 1200), (29, 40, 40)])
def test_honest_number(patients: int, declared: int | None, number: int) -> None:
    found = cost(patients, declared)
    assert found.declared_patients == number
    assert f"with {number} declared patients (" in found.lines()[0]
    assert ("as policy.toml says" in found.lines()[0]) == (declared is not None)


def test_more_patients_cost_less_where_that_is_said() -> None:
    few, some, many = cost(20), cost(30), cost(1000)
    assert few.training_epsilon == some.training_epsilon > many.training_epsilon
    assert "more patients, less noise" in many.lines()[1]
    assert "their number changes nothing" in few.lines()[1]


def test_the_warm_up_is_named_in_both_lines() -> None:
    first, second = cost(100).lines()
    assert "the warm-up not counted" in first
    assert "the warm-up counted" in second


def test_too_few_for_a_run() -> None:
    assert estimate(1) is None
    assert estimate(0, 100) is None
