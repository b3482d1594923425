import numpy as np
import pytest

from client.intake.refusals import Refused
from client.intake.windows import Lut, Stages, Window, show

RAMP = np.arange(-500, 1548, dtype=np.int16).reshape(32, 64)


@pytest.mark.parametrize(
    "stages",
    [
        Stages(),
        Stages(percentiles=(2, 95)),
        Stages(2.5, -100, view=Window(100, 300)),
        Stages(view=Window(100, 300, "SIGMOID")),
        Stages(modality=Lut(-10, np.arange(100.0)[::-1], 16), percentiles=(1, 99)),
        Stages(view=Lut(0, np.arange(256.0), 8), inverse=True),
        Stages(percentiles=(1, 99), inverse=True, padding=(-500, -300)),
    ],
)
def test_curve_is_pointwise(stages: Stages) -> None:
    assert np.allclose(show(RAMP, stages), show(RAMP.astype(np.float64), stages), atol=1e-3)
    assert show(RAMP, stages).dtype == np.float32


def test_inverted_last_and_once() -> None:
    window = Window(100, 300)
    assert np.allclose(show(RAMP, Stages(view=window)) + show(RAMP, Stages(view=window, inverse=True)), 255)


@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("view", [None, Window(300, 500)])
def test_padding_is_background(inverse: bool, view: Window | None) -> None:
    padded = RAMP.copy()
    padded[0] = -2000
    stages = Stages(view=view, inverse=inverse, padding=(-2000, -2000))
    assert not show(padded, stages)[0].any()
    rest = Stages(view=view, inverse=inverse)
    assert np.array_equal(show(padded, stages)[1:], show(RAMP[1:], rest))
    assert not show(np.full((4, 4), -2000), stages).any()


@pytest.mark.parametrize("inverse", [False, True])
def test_one_value_is_black(inverse: bool) -> None:
    assert not show(np.full((4, 4), 9, np.uint16), Stages(inverse=inverse)).any()


def test_percentiles_are_values_that_occur() -> None:
    """Of 1..100 each once, 10 % do not exceed 10 and 90 % do not exceed 90."""
    levels = show(np.arange(1, 101, dtype=np.uint8).reshape(10, 10), Stages(percentiles=(10, 90)))
    assert np.allclose(levels.ravel(), np.clip((np.arange(1, 101) - 10) / 80, 0, 1) * 255, atol=1e-3)


def test_percentiles_that_agree_give_way_to_the_full_range() -> None:
    speck = np.zeros((100, 100), np.uint8)
    speck[3, 3] = 7
    assert show(speck, Stages(percentiles=(1, 99)))[3, 3] == 255


def test_windows_that_make_no_sense() -> None:
    cases = {Window(1, 0): False, Window(1, 1): True, Window(1, 0.5): False, Window(1, 0.5, "SIGMOID"): True}
    cases |= {Window(1, float("inf")): False, Window(1, -3, "LINEAR_EXACT"): False}
    assert {window: window.makes_sense() for window in cases} == cases


def test_values_that_are_not_finite_are_refused() -> None:
    for values in (np.array([[np.nan, 1.0]]), np.array([[1.0, np.inf]])):
        with pytest.raises(Refused, match="finite"):
            show(values, Stages())
    with pytest.raises(Refused, match="finite"):
        show(RAMP, Stages(slope=1e308))


def test_levels_are_finite() -> None:
    with pytest.raises(Refused, match="not finite"):
        show(RAMP, Stages(view=Lut(0, np.array([0.0, np.nan, 1.0]), 8)))
