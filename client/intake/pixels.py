"""Pixel values on their way to 0..255 in a small square. One image at a time: no statistic crosses patients.

What an image is and what is asked may differ: colour asked as grey becomes luminance, grey asked as colour becomes
three equal channels.

Out of scope: reading files.
"""

from typing import Any

import numpy as np
from jaxtyping import Float32, Num, UInt8
from PIL import Image

from client.intake.refusals import Reason, Refused

MAX_PIXELS = 64 * 1024**2

Grey = Float32[np.ndarray, "rows columns"]
"""An image of any size with values in [0, 255]."""
Levels = Float32[np.ndarray, "rows columns *colours"]
"""The same, or in colour: `rows` x `columns` x 3, red, green and blue."""
Square = UInt8[np.ndarray, "channels size size"]

_LUMA = np.array([0.299, 0.587, 0.114], dtype=np.float32)


def check_size(rows: int, columns: int) -> None:
    """Refuse an image whose header claims no pixel or too many, before anything is allocated.

    Raises:
        Refused: `NO_IMAGE` or `TOO_LARGE`.
    """
    if rows < 1 or columns < 1:
        raise Refused(Reason.NO_IMAGE)
    if rows * columns > MAX_PIXELS:
        raise Refused(Reason.TOO_LARGE)


def full_range(values: Num[np.ndarray, "rows columns *colours"]) -> Levels:
    """Stretch an image between its own minimum and maximum, all colours together; an image of one value becomes black.

    Raises:
        Refused: A value is NaN or infinite.
    """
    wide = values.astype(np.float64)
    low, high = float(wide.min()), float(wide.max())
    if not np.isfinite(high - low):
        raise Refused(Reason.NOT_FINITE)
    return ((wide - low) * (255.0 / (high - low) if high > low else 0.0)).astype(np.float32)


def luminance(colour: Num[np.ndarray, "rows columns 3"]) -> Grey:
    """Turn RGB into grey.

    Source: ITU-R BT.601, 2.5.1.
    """
    return colour.astype(np.float32) @ _LUMA


def fit(levels: Levels, size: int, channels: int = 1) -> Square:
    """Resize an image to a square, keeping its aspect, and round to whole levels.

    The longer side becomes `size` with an anti-aliasing filter (Lanczos); the rest of the square is filled with the
    image's own darkest value, in colour each channel with its own. Filling comes last, so that a strip of 1 x 65,535
    never grows to its square.

    Args:
        levels: Grey or colour, values in [0, 255].
        size: Side of the result.
        channels: Of the result: 1 for grey, 3 for red, green and blue.

    Guarantees:
        - fit_is_identity: An image of whole levels that already is `size` x `size`, and of as many channels, comes back
          unchanged.
        - grey_in_every_channel: A grey image in colour has three channels, each the grey result.
    """
    if channels == 1 or levels.ndim == 2:
        grey = levels if levels.ndim == 2 else luminance(levels)
        return np.repeat(_fit_channel(grey, size)[None], channels, axis=0)
    return np.stack([_fit_channel(np.ascontiguousarray(levels[..., number]), size) for number in range(channels)])


def _fit_channel(grey: Grey, size: int) -> UInt8[np.ndarray, "size size"]:
    rows, columns = grey.shape
    longer = max(rows, columns)
    height, width = max(1, round(rows * size / longer)), max(1, round(columns * size / longer))
    image: Any = grey
    if (rows, columns) != (height, width):
        # The gap: sides more than six times too long are first averaged in boxes, to three times the size.
        resized = Image.fromarray(grey).resize((width, height), Image.Resampling.LANCZOS, reducing_gap=3.0)
        image = np.asarray(resized)
    square = np.full((size, size), grey.min(), dtype=np.float32)
    top, left = (size - height) // 2, (size - width) // 2
    square[top : top + height, left : left + width] = image
    return np.clip(np.rint(square), 0, 255).astype(np.uint8)
