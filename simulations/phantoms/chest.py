"""Draw what the chest of a made-up patient is like: its shape, and what is wrong with it. Out of scope: its image.

Coordinates are the body's: x to the right of the image, y downwards, both about -1 to 1.
"""

from dataclasses import dataclass
from typing import Final, final

import numpy as np
from jaxtyping import Float

SIDES: Final = (-1, 1)
"""The patient's right lung is on the left of the image."""
HILUM: Final = (0.17, -0.02)
"""Where the vessels enter a lung: distance from the midline, and y."""


@final
@dataclass(frozen=True)
class Chest:
    """The anatomy of one patient, in body coordinates."""

    width: float
    """Half the width of the trunk."""
    shoulder: float
    """How much higher than usual the shoulders stand."""
    fat: float
    breast: float
    lung_width: float
    lung_top: float
    lung_base: float
    dome: float
    heart: tuple[float, float, float, float, float]
    """Centre x and y, half axes, tilt in radians."""
    mediastinum: float
    aorta: float
    bone: float
    rib_spacing: float
    rib_phase: float
    rib_drop: float
    """How steeply the ribs fall towards the side."""
    clavicle: float
    stomach: tuple[float, float, float]
    """x, depth below the lung, gas."""
    vessels: Float[np.ndarray, "3 points"]
    """x, y and weight of points on the vessels."""
    waves: Float[np.ndarray, "4 waves"]
    """Frequency in x and y, phase and weight of the waves that make the texture."""


@final
@dataclass(frozen=True)
class Finding:
    """What is wrong with one lung."""

    kind: str
    side: int
    x: float
    y: float
    extent: float
    strength: float


def draw_chest(generator: np.random.Generator) -> Chest:
    """Draw one patient's anatomy.

    Args:
        generator: Advanced by a fixed number of draws.

    Returns:
        The anatomy.
    """
    between = generator.uniform
    base = between(0.5, 0.66)
    return Chest(
        width=between(0.84, 0.98),
        shoulder=between(0.0, 0.12),
        fat=between(0.0, 0.25),
        breast=float(generator.choice([0.0, between(0.08, 0.2)])),
        lung_width=between(0.315, 0.375),
        lung_top=between(-0.82, -0.7),
        lung_base=base,
        dome=between(0.14, 0.24),
        heart=(
            between(0.1, 0.17),
            base - between(0.25, 0.31),
            between(0.34, 0.45),
            between(0.25, 0.32),
            between(0.4, 0.9),
        ),
        mediastinum=between(0.1, 0.15),
        aorta=between(0.07, 0.12),
        bone=between(0.75, 1.2),
        rib_spacing=between(0.15, 0.175),
        rib_phase=between(0.0, 1.0),
        rib_drop=between(0.45, 0.8),
        clavicle=between(-0.08, 0.08),
        stomach=(between(0.3, 0.5), between(0.03, 0.09), between(0.0, 0.35)),
        vessels=_draw_vessels(generator),
        waves=_draw_waves(generator),
    )


def _draw_vessels(generator: np.random.Generator, branches: int = 30, steps: int = 48) -> Float[np.ndarray, "3 points"]:
    """Grow branches out of both hila, thinning as they go."""
    side = generator.choice(SIDES, (branches, 1))
    angle = generator.uniform(-1.35, 1.5, (branches, 1))
    bend = generator.normal(0.0, 1.0, (branches, 1))
    reach = generator.uniform(0.25, 0.6, (branches, 1))
    along = np.linspace(0.0, 1.0, steps)
    direction = angle + bend * along * 0.4
    u = HILUM[0] + np.cumsum(np.cos(direction), axis=1) * reach / steps
    y = HILUM[1] + np.cumsum(np.sin(direction), axis=1) * reach / steps
    weight = reach * (1.0 - along) ** 1.3
    return np.stack([side * u, y, weight]).reshape(3, -1)


def _draw_waves(generator: np.random.Generator, count: int = 48) -> Float[np.ndarray, "4 waves"]:
    """Draw random waves whose amplitude falls with frequency, as in natural textures."""
    frequency = np.exp(generator.uniform(np.log(4.0), np.log(30.0), count))
    direction = generator.uniform(0.0, 2.0 * np.pi, count)
    phase = generator.uniform(0.0, 2.0 * np.pi, count)
    weight = frequency**-0.8
    weight /= np.sqrt((weight**2).sum() / 2.0)
    return np.stack([frequency * np.cos(direction), frequency * np.sin(direction), phase, weight])


def draw_finding(kind: str, generator: np.random.Generator) -> Finding:
    """Draw where a finding is, how large and how dense.

    Args:
        kind: One of the classes; "clear" gives a finding that is not drawn.
        generator: Advanced by a fixed number of draws.

    Returns:
        The finding.
    """
    between = generator.uniform
    side = int(generator.choice(SIDES))
    # The heart covers much of the left lung's lower half: findings there stand further out.
    x = between(0.34, 0.52) if side < 0 else between(0.42, 0.54)
    if kind == "nodule":
        return Finding(kind, side, x, between(-0.45, 0.12), between(0.095, 0.125), between(0.42, 0.56))
    if kind == "effusion":
        return Finding(kind, side, x, between(0.05, 0.38), between(0.12, 0.3), between(0.45, 0.62))
    return Finding(kind, side, x, between(-0.35, 0.3), between(0.2, 0.3), between(0.34, 0.5))
