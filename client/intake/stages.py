"""What a DICOM header says of the values of a frame: their bits, padding, modality, window and presentation.

Source: DICOM PS3.3 C.7.6.3 (image pixel), C.7.6.16 (functional groups), C.11.1 and C.11.2 (modality and VOI LUT).
Out of scope: what is made of the values (client/intake/windows), decoding them (client/intake/dicom).
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import UInt16
from pydicom import DataElement, Dataset

from client.intake.refusals import Reason, Refused
from client.intake.rules import IntakeRules
from client.intake.windows import Lut, Stages, Window

FLOATS = ("FloatPixelData", "DoubleFloatPixelData")


def stages(dataset: Dataset, frame: int, rules: IntakeRules) -> Stages:
    """Read what a header says about a frame's values.

    Raises:
        Exception: One of `DAMAGED_DICOM`, where a value is not what it should be.
    """
    modality = _group(dataset, frame, "PixelValueTransformationSequence")
    slope, intercept = modality.get("RescaleSlope"), modality.get("RescaleIntercept")
    scale = None if slope is None or intercept is None else (float(slope), float(intercept))
    table = dataset.get("ModalityLUTSequence")
    if scale is not None and scale[0] == 0 and not table:  # every pixel would be one value
        raise Refused(Reason.HEADER)
    hounsfield = scale is not None and not table and modality.get("RescaleType", "HU") in ("HU", "", None)
    shape = str(dataset.get("PresentationLUTShape", ""))
    slope, intercept = scale or (1.0, 0.0)
    ends = [slope * end + intercept for end in stored_range(dataset)]
    return Stages(
        slope,
        intercept,
        modality=_lut(table[0], dataset, signed=min(stored_range(dataset)) < 0) if table else None,
        view=_view(dataset, frame, rules, hounsfield, signed=not table and min(ends) < 0),
        percentiles=rules.percentiles,
        inverse=dataset.PhotometricInterpretation == "MONOCHROME1" or shape == "INVERSE",
        padding=_padding(dataset),
    )


def _view(dataset: Dataset, frame: int, rules: IntakeRules, hounsfield: bool, signed: bool) -> Lut | Window | None:
    preset = rules.hounsfield_window()
    if preset is not None and hounsfield and dataset.get("Modality") == "CT":
        return Window(*preset)
    if isinstance(rules.window, str):
        return None
    if luts := dataset.get("VOILUTSequence"):
        return _lut(luts[min(rules.window, len(luts) - 1)], dataset, signed)
    group = _group(dataset, frame, "FrameVOILUTSequence")
    pairs = list(zip(_numbers(group.get("WindowCenter")), _numbers(group.get("WindowWidth")), strict=False))
    if not pairs:
        return None
    window = Window(*pairs[min(rules.window, len(pairs) - 1)], str(group.get("VOILUTFunction") or "LINEAR"))
    return window if window.makes_sense() else None


def _group(dataset: Dataset, frame: int, name: str) -> Dataset:
    """Return the item that holds attributes for a frame: its functional group, a shared one, or the top level."""
    frames = dataset.get("PerFrameFunctionalGroupsSequence") or []
    for groups in (frames[frame : frame + 1], dataset.get("SharedFunctionalGroupsSequence") or []):
        for group in groups:
            if items := group.get(name):
                return items[0]
    return dataset


def _lut(item: Dataset, dataset: Dataset, signed: bool) -> Lut:
    """Read a table of 16-bit words, or of bytes of which two are packed in a word, the lower one first.

    Its first value has the sign of the values that it is given (`signed`: they may be below zero), also where it is
    written without.

    Source: DICOM PS3.3 C.11.1.1.1, C.11.2.1.1.
    """
    entries, first, bits = descriptor_of(item.LUTDescriptor, signed)
    table = words_of(item.LUTData, dataset)
    if len(table) != entries and bits <= 8 and len(table) == (entries + 1) // 2:
        table = table.view(np.uint8)[:entries]
    if len(table) != entries or not 1 <= bits <= 16 or int(table.max()) >= 2**bits:
        raise Refused(Reason.PIXELS)
    return Lut(first, table.astype(np.float64), bits)


def descriptor_of(numbers: Sequence[int], signed: bool) -> tuple[int, int, int]:
    """Return how many entries a table has, its first value and the bits of an entry."""
    entries, first, bits = (int(number) for number in numbers)
    first -= 2**16 if signed and first >= 2**15 else 0
    return entries % 2**16 or 2**16, first, bits  # of a descriptor in signed words too


def words_of(data: Any, dataset: Dataset) -> UInt16[np.ndarray, " words"]:
    """Return the 16-bit words of a table, as pydicom read it; two packed bytes stand in a word the lower one first."""
    order = "<" if dataset.original_encoding[1] else ">"
    words = np.frombuffer(data, f"{order}u2") if isinstance(data, bytes) else np.atleast_1d(np.asarray(data))
    return words.astype("<u2")


def _padding(dataset: Dataset) -> tuple[float, float] | None:
    """Return the range of stored values that mean "no image here"; beyond the stored bits, of words as they stand.

    Source: DICOM PS3.3 C.7.5.1.1.2: one value, or with PixelPaddingRangeLimit all between the two. It has 16 bits
        (some write 32, for pixels of 32) and the sign of the pixels, which the VR (US or SS) may contradict.
    """
    integer = "PixelData" in dataset
    name = "PixelPaddingValue" if integer else f"{next(n for n in FLOATS if n in dataset)[:-4]}PaddingValue"
    if dataset.get(name) is None:
        return None
    limit = name.replace("Value", "RangeLimit")
    elements = [dataset[one] for one in (name, limit) if dataset.get(one) is not None]
    ends = [_padding_word(element, dataset) if integer else float(element.value) for element in elements]
    return min(ends), max(ends)


def _padding_word(element: DataElement, dataset: Dataset) -> float:
    """Return an end of the padding with the sign of the pixels, and as it stands where it is longer than they are."""
    value, bits = int(element.value), 16 if element.VR in ("US", "SS") else int(dataset.BitsAllocated)
    if not -(2 ** (bits - 1)) <= value < 2**bits:
        return float(value)
    lowest = -(2 ** (bits - 1)) if dataset.PixelRepresentation else 0
    return float((value - lowest) % 2**bits + lowest)


def _numbers(value: Any) -> list[float]:
    if value is None or isinstance(value, str):
        return []
    return [float(item) for item in (value if hasattr(value, "__getitem__") else [value])]


def stored_range(dataset: Dataset) -> tuple[float, float]:
    """Return the lowest and the highest value that the stored bits can hold."""
    if "PixelData" not in dataset:
        return -np.inf, np.inf
    bits, _ = bits_of(dataset)
    return (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if dataset.PixelRepresentation else (0, 2**bits - 1)


def bits_of(dataset: Dataset) -> tuple[int, int]:
    """Return how many bits are stored, and how many stand below them in their word.

    Raises:
        Refused: More than there are.
    """
    allocated, stored = int(dataset.BitsAllocated), int(dataset.BitsStored)
    shift = int(dataset.get("HighBit", stored - 1)) + 1 - stored
    if not 1 <= stored <= allocated:
        raise Refused(Reason.HEADER)
    return stored, shift if 0 <= shift <= allocated - stored else 0
