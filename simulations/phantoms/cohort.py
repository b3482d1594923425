"""Who the made-up patients are and what each hospital's scanner is like. Out of scope: pixels and files."""

from dataclasses import dataclass
from itertools import product
from typing import Final, Literal, final

import numpy as np

CLASSES: Final[tuple[str, ...]] = ("clear", "opacity", "nodule", "effusion")
MAX_IMAGES: Final = 8
Bits = Literal[8, 12, 16]

_BITS: Final[tuple[Bits, ...]] = (8, 12, 16)
# A geometric law cut at MAX_IMAGES with this ratio has mean 2.2: most patients come once, a few come often.
_IMAGES_RATIO: Final = 0.56
# Every generator is seeded by [seed, stream, index], so that one seed never gives two draws the same numbers.
_ISSUER_STREAM, _BLOCK_STREAM, _PATIENT_STREAM, _LOOK_STREAM, _ENCODING_STREAM = range(5)


@final
@dataclass(frozen=True)
class PhantomPatient:
    """A patient who never lived.

    Args:
        patient_id: Identifier within the issuer; other issuers use the same identifiers.
        issuer: Who gave the identifier.
        label: Index into `CLASSES`, the same for all images of the patient.
        images: Number of images, 1 to 8.
        seed: What the anatomy, the poses and the noise are drawn from.
    """

    patient_id: str
    issuer: str
    label: int
    images: int
    seed: int


@final
@dataclass(frozen=True)
class Encoding:
    """How one file stores its pixels.

    Args:
        bits: Bits stored: 8 in bytes, 12 and 16 in words.
        inverted: MONOCHROME1 (a low value is bright) instead of MONOCHROME2.
        rescaled: Whether stored values go through a rescale slope and intercept.
        windowed: Whether a window picks the part of the range that is shown; without it all of the range is.
        compressed: RLE Lossless instead of Explicit VR Little Endian.
    """

    bits: Bits
    inverted: bool
    rescaled: bool
    windowed: bool
    compressed: bool


ENCODINGS: Final[tuple[Encoding, ...]] = tuple(
    Encoding(bits, *switches) for bits in _BITS for switches in product((False, True), repeat=4)
)
_SITES_PER_ROUND_OF_ENCODINGS: Final = 4


@final
@dataclass(frozen=True)
class Scanner:
    """The look of one hospital's images.

    Args:
        name: Name of the device.
        exposure: Shift of the brightness, around 0.
        contrast: Factor on the contrast, around 1.
        noise: Standard deviation of the noise in mid-grey, images being in [0, 1].
        blur: Standard deviation of the unsharpness, as a fraction of the image's width.
        collimation: Width of the black border, as a fraction of the image's width.
        encodings: How its files are stored, in turn.
    """

    name: str
    exposure: float
    contrast: float
    noise: float
    blur: float
    collimation: float
    encodings: tuple[Encoding, ...]


def draw_patients(count: int, seed: int) -> tuple[PhantomPatient, ...]:
    """Draw the patients of one hospital.

    Args:
        count: Number of patients.
        seed: Not negative; another seed gives other patients of another issuer.

    Returns:
        Patients with distinct identifiers.

    Guarantees:
        - prefix_stable: The first patients of a larger hospital of the same seed are those of the smaller.
        - classes_balanced: The numbers of patients of two classes differ by at most one.
        - images_skewed: A patient has 1 to 8 images, 2.2 on average, one being the commonest number.
    """
    issuer = f"PHANTOM-{np.random.default_rng([seed, _ISSUER_STREAM]).integers(2**32):08X}"
    return tuple(_draw_patient(index, issuer, seed) for index in range(count))


def _draw_patient(index: int, issuer: str, seed: int) -> PhantomPatient:
    block, place = divmod(index, len(CLASSES))
    labels = np.random.default_rng([seed, _BLOCK_STREAM, block]).permutation(len(CLASSES))
    generator = np.random.default_rng([seed, _PATIENT_STREAM, index])
    weights = _IMAGES_RATIO ** np.arange(MAX_IMAGES)
    return PhantomPatient(
        patient_id=f"PH{index:06d}",
        issuer=issuer,
        label=int(labels[place]),
        images=1 + int(generator.choice(MAX_IMAGES, p=weights / weights.sum())),
        seed=int(generator.integers(2**62)),
    )


def draw_scanner(site: int, seed: int) -> Scanner:
    """Draw the scanner of one hospital.

    Args:
        site: Number of the hospital, from 0.
        seed: Not negative; the federation's.

    Returns:
        A scanner with a look of its own and twelve of the 48 encodings.

    Guarantees:
        - all_encodings_in_four_sites: Sites 4n to 4n + 3 have all 48 encodings, each at one site.
    """
    generator = np.random.default_rng([seed, _LOOK_STREAM, site])
    turn, place = divmod(site, _SITES_PER_ROUND_OF_ENCODINGS)
    order = np.random.default_rng([seed, _ENCODING_STREAM, turn]).permutation(len(ENCODINGS))
    return Scanner(
        name=f"PHANTOM-SCANNER-{site}",
        exposure=float(generator.uniform(-0.35, 0.35)),
        contrast=float(generator.uniform(0.8, 1.3)),
        noise=float(generator.uniform(0.004, 0.022)),
        blur=float(generator.uniform(0.003, 0.008)),
        collimation=float(generator.uniform(0.0, 0.05)),
        encodings=tuple(ENCODINGS[number] for number in order[place::_SITES_PER_ROUND_OF_ENCODINGS]),
    )
