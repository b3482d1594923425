"""Nearly the same picture under two patients: somebody may be there under two ids, so that the promise does not hold.

Two pictures are twins when few bits of their difference hashes differ and their thumbnails are alike too. This
compares patients, so what comes of it stays at the site, and nothing of it reaches a pixel that is trained on.

Out of scope: turned, mirrored or cropped copies.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import final

import numpy as np
from jaxtyping import Int64, UInt8
from PIL import Image

SIDE = 16
MAX_BITS = 8
"""Of 256 bits that may differ."""
MAX_LEVELS = 4.0
"""Mean difference of the thumbnails."""
MIN_SPREAD = 4.0
"""Standard deviation of a picture that is compared: below, it shows nothing."""
MAX_PAIRS = 1000

_BANDS, _BAND_BITS = MAX_BITS + 1, 28  # two hashes that differ in MAX_BITS bits agree in one band at least
_WINDOW = 32
_ORDER = np.random.default_rng(0).permutation(SIDE * SIDE)  # neighbouring bits are alike: spread them over the bands


@final
@dataclass(eq=False)
class Twins:
    """Collects pictures, and finds pairs of different patients. Its repr shows nothing.

    Guarantees:
        - twins_are_found: A copy with other brightness, noise of a level or lossy encoding is found.
        - others_are_not: Pictures of one kind from different patients are not taken for twins.
    """

    _thumbnails: list[UInt8[np.ndarray, "side side"]] = field(default_factory=list[UInt8[np.ndarray, "side side"]])
    _hashes: list[UInt8[np.ndarray, " bytes"]] = field(default_factory=list[UInt8[np.ndarray, " bytes"]])
    _patients: list[int] = field(default_factory=list[int])
    _names: list[int] = field(default_factory=list[int])

    def add(self, square: UInt8[np.ndarray, "channels size size"], patient: int, name: int) -> None:
        """Take a picture with the number of its patient and a number of its own."""
        grey = Image.fromarray(square.mean(axis=0).astype(np.uint8))
        small = np.asarray(grey.resize((SIDE + 1, SIDE), Image.Resampling.BOX), np.int16)
        if small.std() < MIN_SPREAD:
            return
        bits = (small[:, 1:] > small[:, :-1]).reshape(-1)[_ORDER]
        self._thumbnails.append(small[:, :SIDE].astype(np.uint8))
        self._hashes.append(np.packbits(bits))
        self._patients.append(patient)
        self._names.append(name)

    def pairs(self) -> list[tuple[int, int]]:
        """Return the names of pictures that are twins, at most `MAX_PAIRS` pairs."""
        if len(self._names) < 2:
            return []
        hashes, patients = np.stack(self._hashes), np.array(self._patients)
        found: dict[tuple[int, int], None] = {}
        for one, other in _candidates(hashes):
            near = patients[one] != patients[other]
            near &= np.bitwise_count(hashes[one] ^ hashes[other]).sum(1) <= MAX_BITS
            for first, second in zip(one[near].tolist(), other[near].tolist(), strict=True):
                if self._alike(first, second):
                    found[min(first, second), max(first, second)] = None
                if len(found) >= MAX_PAIRS:
                    return self._named(found)
        return self._named(found)

    def _alike(self, one: int, other: int) -> bool:
        first, second = (self._thumbnails[place].astype(np.float64) for place in (one, other))
        return float(np.abs(first - first.mean() - second + second.mean()).mean()) <= MAX_LEVELS

    def _named(self, found: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
        return sorted((self._names[one], self._names[other]) for one, other in found)


def counted_pairs(pairs: int) -> str:
    """Return how many pairs were found: where there are `MAX_PAIRS`, no more were looked for.

    >>> counted_pairs(1), counted_pairs(1000)
    ('1 pair', '1000 or more pairs')
    """
    return f"{pairs}{' or more' if pairs >= MAX_PAIRS else ''} {'pair' if pairs == 1 else 'pairs'}"


def _candidates(
    hashes: UInt8[np.ndarray, "images bytes"],
) -> Iterator[tuple[Int64[np.ndarray, " pairs"], Int64[np.ndarray, " pairs"]]]:
    """Yield pairs that agree in a band; of many that do, those that stand near each other in the order of all bits."""
    bits = np.unpackbits(hashes, axis=1)
    weights = 2 ** np.arange(_BAND_BITS, dtype=np.int64)
    for band in range(_BANDS):
        keys = bits[:, band * _BAND_BITS : (band + 1) * _BAND_BITS].astype(np.int64) @ weights
        order = np.lexsort((*hashes.T, keys))
        for step in range(1, min(_WINDOW, len(order))):
            same = keys[order[step:]] == keys[order[:-step]]
            if not same.any():
                break
            yield order[:-step][same], order[step:][same]
