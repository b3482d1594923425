"""From stored values to grey levels: modality LUT or rescale, then VOI LUT or window, then presentation, in this order.

All of it is a curve over single values. Where the values are whole numbers of at most 16 bits, it is worked out once
for each value that may occur and then looked up, so that a large image costs one look-up a pixel.

Source: DICOM PS3.3 C.11.1 (modality LUT), C.11.2 (VOI LUT), C.7.5.1.1.2 (pixel padding), C.7.6.3.1.2 (MONOCHROME1).
Out of scope: where these are found in a header (client/intake/stages).
"""

from dataclasses import dataclass, field
from typing import Any, final

import numpy as np
from jaxtyping import Float64, Int64, Num

from client.intake.pixels import Grey
from client.intake.refusals import Reason, Refused

_MAX_CURVE = 2**16
"""Most different whole numbers for which the curve is worked out beforehand; not where there are fewer pixels."""

Values = Float64[np.ndarray, "values"]


@final
@dataclass(frozen=True, eq=False)
class Lut:
    """A look-up table: values outside it take its first or last entry.

    Attributes:
        first: The value that takes the first entry.
        entries: The entries.
        bits: Depth of the entries as stated.

    Source: DICOM PS3.3 C.11.1.1.1. Written here because pydicom's own wraps around where values exceed the entries'
        type.
    """

    first: int
    entries: Float64[np.ndarray, "entries"] = field(repr=False)
    bits: int

    def __call__(self, values: Values) -> Values:
        """Look values up."""
        index = np.clip(np.rint(values) - self.first, 0, len(self.entries) - 1)
        return self.entries[index.astype(np.int64)]


@final
@dataclass(frozen=True)
class Window:
    """A window: centre, width and function.

    Source: DICOM PS3.3 C.11.2.1.2.1 (LINEAR) and C.11.2.1.3 (LINEAR_EXACT, SIGMOID). Written here because pydicom's
        own maps to a range that depends on BitsStored and the rescale.
    """

    centre: float
    width: float
    function: str = "LINEAR"

    def makes_sense(self) -> bool:
        """Return whether the standard allows it: a width of at least 1 for LINEAR, above 0 otherwise."""
        return np.isfinite(self.centre + self.width).item() and self.width > (0.999 if self.function == "LINEAR" else 0)

    def __call__(self, values: Values) -> Values:
        """Return the shares of the full brightness, in [0, 1]."""
        if self.function == "SIGMOID":
            return 1 / (1 + np.exp(np.clip(-4 * (values - self.centre) / self.width, -700, 700)))
        if self.function == "LINEAR_EXACT":
            share = (values - self.centre) / self.width + 0.5
        else:
            share = (values - (self.centre - 0.5)) / max(self.width - 1, 1e-9) + 0.5
        return np.clip(share, 0, 1)


@final
@dataclass(frozen=True)
class Stages:
    """What an image's header and the site's rules say about its values.

    Attributes:
        slope, intercept: Of the rescale; 1 and 0 where there is none.
        modality: The modality LUT, which then takes the rescale's place.
        view: VOI LUT or window; None where nothing is stated or what is stated makes no sense.
        percentiles: Where `view` is None: which of the image's own values become black and white.
        inverse: Whether the lowest value is the brightest.
        padding: Lowest and highest stored value that mean "no image here".
    """

    slope: float = 1.0
    intercept: float = 0.0
    modality: Lut | None = None
    view: Lut | Window | None = None
    percentiles: tuple[float, float] = (0.0, 100.0)
    inverse: bool = False
    padding: tuple[float, float] | None = None


def show(stored: Num[np.ndarray, "rows columns"], stages: Stages) -> Grey:
    """Turn stored values into grey levels in [0, 255].

    Raises:
        Refused: A value is not finite after the modality stage or in the end.

    Guarantees:
        - inverted_last_and_once: The levels of an inverse image are 255 minus those of the same without inversion.
        - padding_is_background: Padding becomes 0, whatever the presentation, and does not move the percentiles.
        - one_value_is_black: An image of a single value, with no window, is 0 everywhere.
        - curve_is_pointwise: Whole numbers, looked up, give the same levels as the same numbers as floats.
    """
    if stored.dtype.kind in "iu" and stored.size:
        low, high = int(stored.min()), int(stored.max())
        if high - low < min(_MAX_CURVE, stored.size):
            place = np.subtract(stored, np.array(low, stored.dtype), dtype=_unsigned(stored.dtype), casting="unsafe")
            counts = None if stages.view else np.bincount(place.ravel(), minlength=high - low + 1)
            curve = _levels(np.arange(low, high + 1, dtype=np.float64), counts, stages)
            return np.take(curve.astype(np.float32), place)
    flat = stored.astype(np.float64).ravel()
    return _levels(flat, np.ones(len(flat), np.int64), stages).reshape(stored.shape).astype(np.float32)


def _unsigned(kind: np.dtype[Any]) -> np.dtype[Any]:
    """Return the unsigned type of the same bytes: differences of signed values wrap around into it."""
    return np.dtype(f"u{kind.itemsize}")


def _levels(stored: Values, counts: Int64[np.ndarray, "values"] | None, stages: Stages) -> Values:
    """Work the curve out for stored values of which there are so many each (`counts`, where that matters)."""
    image = np.full(len(stored), True)
    if stages.padding is not None:
        image = (stored < stages.padding[0]) | (stored > stages.padding[1])
    with np.errstate(over="ignore", invalid="ignore"):
        values = stages.modality(stored) if stages.modality else stored * stages.slope + stages.intercept
    if not np.isfinite(values[image]).all():
        raise Refused(Reason.NOT_FINITE)
    values = np.where(image, values, 0)
    if isinstance(stages.view, Lut):
        share = np.clip(stages.view(values) / (2.0**stages.view.bits - 1), 0, 1)
    elif stages.view is not None:
        share = stages.view(values)
    else:
        present = image if counts is None else image & (counts > 0)
        ends = _ends(values[present], None if counts is None else counts[present], stages.percentiles)
        if ends is None:
            return np.zeros(len(stored))
        share = np.clip((values - ends[0]) / (ends[1] - ends[0]), 0, 1)
    if not np.isfinite(share[image]).all():
        raise Refused(Reason.NOT_FINITE)
    return np.where(image, 255 * (1 - share if stages.inverse else share), 0)


def _ends(
    values: Values, counts: Int64[np.ndarray, "values"] | None, percentiles: tuple[float, float]
) -> tuple[float, float] | None:
    """Return the values at two percentiles; the lowest and highest where these agree; None for a single value.

    A percentile p is the lowest value that at least p % of the pixels do not exceed: a value that occurs, so that it
    moves with any change of scale.
    """
    if not len(values):
        return None
    order = np.argsort(values)
    ranks = np.cumsum(np.ones(len(values)) if counts is None else counts[order])
    places = np.searchsorted(ranks, np.array(percentiles) / 100 * ranks[-1])
    low, high = values[order[np.minimum(places, len(order) - 1)]]
    if low == high:
        low, high = values[order[0]], values[order[-1]]
    return (float(low), float(high)) if np.isfinite(high - low) and high > low else None
