"""Draw a chest as a radiograph shows it: add up what attenuates the beam, then expose the film.

Coordinates are the body's: x to the right of the image, y downwards, both about -1 to 1; `u` is the distance from the
midline towards the side that is drawn. The patient's right lung is on the left of the image (side -1). Brightness grows
with attenuation. Out of scope: who the patients are (cohort) and files (dicom).
"""

import math
from dataclasses import dataclass
from typing import Final, final

import numpy as np
from jaxtyping import Float
from scipy import ndimage

from simulations.phantoms.chest import HILUM, SIDES, Chest, Finding, draw_chest, draw_finding
from simulations.phantoms.cohort import CLASSES, PhantomPatient, Scanner

_Plane = Float[np.ndarray, "size size"]
_REFERENCE_SIZE: Final = 128
_ANATOMY_STREAM, _POSE_STREAM = range(2)


@final
@dataclass(frozen=True)
class _Pose:
    """Where the patient stands in one image: body = matrix @ image + shift."""

    matrix: Float[np.ndarray, "2 2"]
    shift: Float[np.ndarray, "2"]
    inspiration: float
    exposure: float
    collimation: Float[np.ndarray, "4"]


@final
@dataclass(frozen=True)
class _View:
    """The fields that several organs need, for one image."""

    x: _Plane
    y: _Plane
    texture: _Plane
    air: Float[np.ndarray, "2 size size"]
    """Air along the beam in the lung of each side, 0 to 1."""


def render(patient: PhantomPatient, image: int, scanner: Scanner, size: int = 128) -> Float[np.ndarray, "size size"]:
    """Draw one image of a patient as a hospital's scanner shows it.

    Args:
        patient: The patient.
        image: Number of the image, from 0; another number is another pose and exposure of the same chest.
        scanner: Decides exposure, contrast, noise, blur and collimation.
        size: Width and height, pixels.

    Returns:
        Brightness in [0, 1], bright where the body attenuates.

    Guarantees:
        - deterministic: The same arguments give the same array on the same machine.
    """
    anatomy = np.random.default_rng([patient.seed, _ANATOMY_STREAM])
    chest = draw_chest(anatomy)
    finding = draw_finding(CLASSES[patient.label], anatomy)
    generator = np.random.default_rng([patient.seed, _POSE_STREAM, image])
    pose = _draw_pose(scanner.collimation, generator)
    view = _look(chest, pose, size)
    attenuation = _soft_tissue(chest, view) + _bones(chest, view, pose.inspiration)
    attenuation += _vessels(chest, pose, view) + _disease(finding, view)
    return _expose(attenuation, scanner, pose, generator)


def _draw_pose(collimation: float, generator: np.random.Generator) -> _Pose:
    angle, scale = generator.normal(0.0, 0.02), generator.normal(0.92, 0.015)
    cosine, sine = math.cos(angle) * scale, math.sin(angle) * scale
    return _Pose(
        matrix=np.array([[cosine, -sine], [sine, cosine]]),
        shift=generator.normal(0.0, 0.015, 2),
        inspiration=generator.normal(0.0, 0.02),
        exposure=generator.normal(0.0, 0.12),
        collimation=collimation * generator.uniform(0.5, 1.5, 4),
    )


def _look(chest: Chest, pose: _Pose, size: int) -> _View:
    steps = (np.arange(size) + 0.5) * 2.0 / size - 1.0
    (xx, xy), (yx, yy) = pose.matrix
    x = (xx * steps[None, :] + xy * steps[:, None] + pose.shift[0]).astype(np.float32)
    y = (yx * steps[None, :] + yy * steps[:, None] + pose.shift[1]).astype(np.float32)
    air = np.stack([_lung(chest, side, x, y, pose.inspiration) for side in SIDES])
    air *= 1.0 - 0.92 * _heart_and_aorta(chest, x, y)
    return _View(x, y, _texture(chest, pose, steps), air)


def _texture(chest: Chest, pose: _Pose, steps: Float[np.ndarray, "size"]) -> _Plane:
    """Sum the waves: each splits into products of a row and a column, so that few cosines are needed."""
    frequency, phase, weight = chest.waves[:2], chest.waves[2], chest.waves[3]
    columns, rows = pose.matrix.T @ frequency
    down = steps[:, None] * rows + phase + pose.shift @ frequency
    across = steps[:, None] * columns
    left = np.concatenate([weight * np.cos(down), -weight * np.sin(down)], axis=1).astype(np.float32)
    right = np.concatenate([np.cos(across), np.sin(across)], axis=1).astype(np.float32)
    # Not a matrix product: its threads cost more than they bring, and its sums depend on their number.
    return np.einsum("ik,jk->ij", left, right)


def _lung(chest: Chest, side: int, x: _Plane, y: _Plane, inspiration: float) -> _Plane:
    u = side * x
    down = np.clip((y - chest.lung_top) / (0.75 - chest.lung_top), 0.0, 1.0)
    half_width = chest.lung_width * (1.0 - (1.0 - down) ** 2.9) ** 0.55
    centre = 0.31 + (chest.lung_width - 0.24) * down
    beside = np.abs(u - centre)
    depth = _step((half_width - beside) / 0.018) * (1.0 - 0.2 * np.minimum(beside / (half_width + 0.05), 1.0) ** 2)
    # The liver lifts the right dome.
    base = chest.lung_base + inspiration - (0.05 if side < 0 else 0.0)
    diaphragm = base - chest.dome * (1.0 - ((u - 0.3) / 0.42) ** 2)
    return depth * _step((diaphragm - y) / 0.016) * _step((y - chest.lung_top) / 0.02)


def _heart_and_aorta(chest: Chest, x: _Plane, y: _Plane) -> _Plane:
    centre_x, centre_y, long, short, tilt = chest.heart
    across = ((x - centre_x) * math.cos(tilt) + (y - centre_y) * math.sin(tilt)) / long
    along = ((y - centre_y) * math.cos(tilt) - (x - centre_x) * math.sin(tilt)) / short
    aorta = np.hypot(x - 0.06, (y + 0.2) * 0.5) / chest.aorta
    return _step((1.0 - np.minimum(np.hypot(across, along), aorta)) / 0.06)


def _soft_tissue(chest: Chest, view: _View) -> _Plane:
    x, y = view.x, view.y
    beside = np.abs(x)
    shoulder = -0.98 - chest.shoulder + 0.5 * np.maximum(beside - 0.2, 0.0) ** 1.5
    trunk = np.minimum(chest.width - beside, y - shoulder)
    inside = np.maximum(trunk, 0.27 - beside)
    body = 1.0 - np.exp(-np.maximum(inside, 0.0) / 0.12)
    body *= 0.8 + chest.fat * 0.6
    middle = np.exp(-((x / chest.mediastinum) ** 2)) * (0.12 + 0.16 * _step((y + 0.45) / 0.2))
    trachea = np.exp(-(((x + 0.01) / 0.05) ** 2)) * _step((-0.33 - y) / 0.06) * 0.3
    breast = sum(_chord(np.hypot((s * x - 0.45) / 0.36, (y - 0.28) / 0.3), 0.6) for s in SIDES) * chest.breast
    stomach_x, stomach_depth, gas = chest.stomach
    bubble = np.exp(-(((x - stomach_x) / 0.16) ** 2) - ((y - chest.lung_base - stomach_depth) / 0.07) ** 2) * gas
    lungs = view.air.sum(axis=0)
    # Higher lung holds more air and less blood.
    aeration = 0.7 - 0.06 * y - 0.04 * view.texture
    return body + middle - trachea + breast - bubble - lungs * aeration


def _bones(chest: Chest, view: _View, inspiration: float) -> _Plane:
    x, y = view.x, view.y
    u = np.abs(x)
    down = np.clip((y - chest.lung_top) / (0.75 - chest.lung_top), 0.0, 1.0)
    wall = 0.33 + (2.0 * chest.lung_width - 0.22) * (1.0 - (1.0 - down) ** 2.9) ** 0.55 - u
    cage = _step(wall / 0.015) * _step((y - chest.lung_top + 0.06) / 0.03) * _step((chest.lung_base + 0.05 - y) / 0.15)
    behind = (y - inspiration - chest.rib_drop * u**2 + 0.1 * u) / chest.rib_spacing + chest.rib_phase
    front = (y - inspiration + chest.rib_drop * u + 0.2 * u**2) / chest.rib_spacing * 0.9 + chest.rib_phase
    ribs = _rib(behind) * _step((u - 0.06) / 0.02) + 0.45 * _rib(front) * _step((u - 0.42) / 0.06)
    ribs *= cage * (0.75 + 0.5 * np.exp(-((wall / 0.08) ** 2)))
    spine = _chord(x / 0.1, 0.5) * (0.12 + 0.05 * np.cos(y * 38.0 + chest.rib_phase)) * _step((0.95 - y) / 0.5)
    clavicle_y = -0.6 + chest.clavicle - 0.22 * u + 0.1 * np.sin(u * 6.0)
    clavicle = _chord((y - clavicle_y) / 0.035, 0.5) * _step((u - 0.09) / 0.02) * _step((0.78 - u) / 0.03)
    blade = np.exp(-(((u - 0.74 + 0.25 * (y + 0.4)) / 0.03) ** 2)) * np.exp(-(((y + 0.4) / 0.2) ** 2))
    return chest.bone * (0.2 * ribs + spine + 0.24 * clavicle + 0.1 * blade)


def _rib(turns: _Plane) -> _Plane:
    """Draw a band at every whole number, its borders denser than its middle."""
    band = _step((np.cos(2.0 * np.pi * turns) - 0.3) / 0.18)
    return band * (0.65 + 1.4 * (1.0 - band))


def _vessels(chest: Chest, pose: _Pose, view: _View) -> _Plane:
    size = len(view.x)
    points = np.linalg.inv(pose.matrix) @ (chest.vessels[:2] - pose.shift[:, None])
    column, row = np.clip((points + 1.0) * size / 2.0, 0, size - 1).astype(np.intp)
    drawn = np.bincount(row * size + column, chest.vessels[2], size * size).reshape(size, size).astype(np.float32)
    scale = size / _REFERENCE_SIZE
    drawn = ndimage.gaussian_filter(drawn * scale**2, 0.9 * scale)
    x, y = np.abs(view.x) - HILUM[0], view.y - HILUM[1]
    hilum = np.exp(-((x / 0.1) ** 2) - (y / 0.16) ** 2) * 0.16
    return np.tanh(drawn * 2.0) * 0.36 * view.air.sum(axis=0) + hilum


def _disease(finding: Finding, view: _View) -> _Plane:
    u, y = finding.side * view.x, view.y
    air = view.air[SIDES.index(finding.side)]
    away = np.hypot(u - finding.x, y - finding.y)
    match finding.kind:
        case "opacity":
            cloud = np.exp(-((away / finding.extent) ** 2)) * (1.0 + 0.4 * view.texture)
            return finding.strength * air * np.clip(cloud, 0.0, 1.2)
        case "nodule":
            return finding.strength * air * _chord(away / finding.extent, 0.5)
        case "effusion":
            # A meniscus: the fluid climbs along the chest wall.
            level = finding.y - finding.extent * ((u - 0.3) / 0.4) ** 2 * np.sign(u - 0.3)
            return finding.strength * air * _step((y - level) / 0.03)
        case _:
            return np.zeros_like(y)


def _expose(attenuation: _Plane, scanner: Scanner, pose: _Pose, generator: np.random.Generator) -> _Plane:
    size = len(attenuation)
    film = _step((attenuation - 0.74) * 1.75 * scanner.contrast + scanner.exposure + pose.exposure)
    film = ndimage.gaussian_filter(film, scanner.blur * size)
    noise = generator.standard_normal((size, size), dtype=np.float32)
    # Where the body lets little through, few photons are counted.
    film += noise * scanner.noise * (0.4 + 1.2 * film)
    steps = (np.arange(size, dtype=np.float32) + 0.5) / size
    left, right, top, bottom = (float(border) for border in pose.collimation)
    across = _step((steps - left) / 0.006) * _step((1.0 - right - steps) / 0.006)
    down = _step((steps - top) / 0.006) * _step((1.0 - bottom - steps) / 0.006)
    return np.clip(film * down[:, None] * across, 0.0, 1.0)


def _step(value: Float[np.ndarray, "..."]) -> Float[np.ndarray, "..."]:
    """Rise softly from 0 to 1 around 0."""
    return 0.5 + 0.5 * np.tanh(value)


def _chord(radius: Float[np.ndarray, "..."], power: float) -> Float[np.ndarray, "..."]:
    """Give the depth of a round body at a distance from its axis: 1 on the axis, 0 from radius 1 on."""
    return np.maximum(1.0 - radius**2, 0.0) ** power
