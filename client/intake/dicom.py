"""One DICOM image: from a file in memory to grey or colour levels. Runs in the decoders' processes.

Of each frame: stored values as stated (bits above BitsStored, which may hold overlays, are cleared; signs are
extended), then modality, window and presentation (client/intake/windows). Functional groups, the frame's own before
the shared ones, win over the header's top level. Colours (RGB, YBR, a palette) become red, green and blue, from none
to full; windows are for grey images.

Source: DICOM PS3.3 C.7.6.3 (image pixel), C.7.6.16 (functional groups), PS3.5 8 (encoding of pixels).
Out of scope: finding files (client/intake/folders), who may be used.
"""

from typing import Any, final

import numpy as np
from jaxtyping import Num
from pydicom import Dataset
from pydicom.encaps import get_frame
from pydicom.pixels import apply_color_lut, get_decoder
from pydicom.uid import (
    UID,
    JPEG2000TransferSyntaxes,
    JPEGBaseline8Bit,
    JPEGExtended12Bit,
    JPEGLSTransferSyntaxes,
    RLELossless,
)

from client.intake.codestream import shape_of
from client.intake.headers import DAMAGED_DICOM, damaged, parse, syntax_name
from client.intake.memory import header_bytes, within
from client.intake.pixels import Levels
from client.intake.refusals import Reason, Refused
from client.intake.rules import IntakeRules
from client.intake.windows import Lut, Stages, Window, show

_COLOURS = ("RGB", "YBR_FULL", "YBR_FULL_422", "YBR_ICT", "YBR_RCT")
"""What pydicom hands over as red, green and blue, as its decoders or itself convert it."""

_FLOATS = ("FloatPixelData", "DoubleFloatPixelData")


@final
class DicomImage:
    """A DICOM file in memory, of which frames are decoded one by one.

    Attributes:
        digest: Of its header, as the scan takes it.

    Guarantees:
        - frame_groups_win: Rescale and window of a frame's functional groups win over shared ones and the top level.
        - codestreams_have_the_headers_shape: A compressed frame of other rows, columns or samples is not decoded.
        - high_bits_are_cleared: What stands beside the stored bits changes nothing.
    """

    def __init__(self, data: bytes, rules: IntakeRules) -> None:
        """Parse the file.

        Raises:
            Refused: Damaged, too large, without an image, or without its decoder.
        """
        self._rules = rules
        try:
            self._dataset, self.digest = parse(data, rules)
            if not any(name in self._dataset for name in ("PixelData", *_FLOATS)):
                raise Refused(Reason.NO_IMAGE)
            self._plugin = _plugin(self._dataset)
        except DAMAGED_DICOM as error:
            raise damaged(error, Reason.PIXELS) from error

    def levels(self, frame: int) -> Levels:
        """Decode a frame, from 0.

        Raises:
            Refused: Damaged, or of a form that nobody converts.
        """
        dataset = self._dataset
        try:
            _check_shape(dataset, frame)
            # Unused bits are cleared here: pydicom does not look at HighBit.
            # A view, where nothing is compressed: it is read once and never written to.
            options: Any = {"correct_unused_bits": not _as_it_is(dataset), "view_only": True}
            decoder = get_decoder(dataset.file_meta.TransferSyntaxUID)
            stored, _ = decoder.as_array(dataset, index=frame, decoding_plugin=self._plugin, **options)
            photometric = str(dataset.get("PhotometricInterpretation", ""))
            if stored.ndim == 2 and photometric.startswith("MONOCHROME"):
                with within(header_bytes(self._rules)):
                    said = stages(dataset, frame, self._rules)
                return show(_stored_bits(stored, dataset, said.padding), said)
            levels = _colours(stored, dataset, photometric)
        except DAMAGED_DICOM as error:
            raise damaged(error, Reason.PIXELS) from error
        if levels.shape[2:] != (3,):  # such as a palette for pixels that are colours already
            raise Refused(Reason.PIXELS)
        return levels


def _check_shape(dataset: Dataset, frame: int) -> None:
    """Refuse a codestream of another shape than the header's: decoders allocate it, and pydicom would shear it."""
    syntax: UID = dataset.file_meta.TransferSyntaxUID
    if not syntax.is_encapsulated or syntax == RLELossless:
        return
    offsets = dataset.get("ExtendedOffsetTable"), dataset.get("ExtendedOffsetTableLengths")
    data = get_frame(
        dataset.PixelData,
        frame,
        number_of_frames=int(dataset.get("NumberOfFrames") or 1),
        extended_offsets=None if None in offsets else offsets,
    )
    if shape_of(data) != (dataset.Rows, dataset.Columns, dataset.get("SamplesPerPixel", 1)):
        raise Refused(Reason.PIXELS)


def stages(dataset: Dataset, frame: int, rules: IntakeRules) -> Stages:
    """Read what a header says about a frame's values.

    Raises:
        Exception: One of `DAMAGED_DICOM`, where a value is not what it should be.
    """
    modality = _group(dataset, frame, "PixelValueTransformationSequence")
    slope, intercept = modality.get("RescaleSlope"), modality.get("RescaleIntercept")
    scale = None if slope is None or intercept is None else (float(slope), float(intercept))
    table = dataset.get("ModalityLUTSequence")
    hounsfield = scale is not None and not table and modality.get("RescaleType", "HU") in ("HU", "", None)
    shape = str(dataset.get("PresentationLUTShape", ""))
    return Stages(
        *(scale or (1.0, 0.0)),
        modality=_lut(table[0], dataset) if table else None,
        view=_view(dataset, frame, rules, hounsfield),
        percentiles=rules.percentiles,
        inverse=dataset.PhotometricInterpretation == "MONOCHROME1" or shape == "INVERSE",
        padding=_padding(dataset),
    )


def _view(dataset: Dataset, frame: int, rules: IntakeRules, hounsfield: bool) -> Lut | Window | None:
    preset = rules.hounsfield_window()
    if preset is not None and hounsfield and dataset.get("Modality") == "CT":
        return Window(*preset)
    if isinstance(rules.window, str):
        return None
    if luts := dataset.get("VOILUTSequence"):
        return _lut(luts[min(rules.window, len(luts) - 1)], dataset)
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


def _lut(item: Dataset, dataset: Dataset) -> Lut:
    """Read a table of 16-bit words, or of bytes of which two are packed in a word, the lower one first.

    Source: DICOM PS3.3 C.11.1.1.1, C.11.2.1.1.
    """
    entries, first, bits = (int(number) for number in item.LUTDescriptor)
    entries = entries % 2**16 or 2**16  # of a descriptor in signed words too
    order = "<" if dataset.original_encoding[1] else ">"
    data = item.LUTData
    words = np.frombuffer(data, f"{order}u2") if isinstance(data, bytes) else np.atleast_1d(np.asarray(data))
    table = words.astype("<u2")
    if len(table) != entries and bits <= 8 and len(table) == (entries + 1) // 2:
        table = table.view(np.uint8)[:entries]
    if len(table) != entries or not 1 <= bits <= 16 or int(table.max()) >= 2**bits:
        raise Refused(Reason.PIXELS)
    return Lut(first, table.astype(np.float64), bits)


def _padding(dataset: Dataset) -> tuple[float, float] | None:
    """Return the range of stored values that mean "no image here"; beyond the stored bits, of words as they stand.

    Source: DICOM PS3.3 C.7.5.1.1.2: one value, or with PixelPaddingRangeLimit all between the two. It has 16 bits and
        the sign of the pixels, which the VR (US or SS) may contradict.
    """
    integer = "PixelData" in dataset
    name = "PixelPaddingValue" if integer else f"{next(n for n in _FLOATS if n in dataset)[:-4]}PaddingValue"
    value = dataset.get(name)
    if value is None:
        return None
    limit = dataset.get(name.replace("Value", "RangeLimit"))
    ends = [value, value if limit is None else limit]
    if integer:
        lowest = -(2**15) if dataset.PixelRepresentation else 0
        ends = [(int(end) - lowest) % 2**16 + lowest for end in ends]
    low, high = sorted(float(end) for end in ends)
    return low, high


def _stored_bits(
    values: Num[np.ndarray, "rows columns"], dataset: Dataset, padding: tuple[float, float] | None = None
) -> Num[np.ndarray, "rows columns"]:
    """Clear what stands beside the stored bits, where the file holds pixels as they are; decoders do it for others.

    A whole word that is padding stays: in the stored bits alone it could be a pixel's value.
    """
    if values.dtype.kind not in "iu" or not _as_it_is(dataset):
        return values
    bits, shift = _bits(dataset)
    low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if dataset.PixelRepresentation else (0, 2**bits - 1)
    if shift == 0 and values.size and values.min() >= low and values.max() <= high:
        return values
    cleared = _clear(values >> shift, dataset, values.itemsize * 8)
    if padding is None or shift:
        return cleared
    return np.where((values >= padding[0]) & (values <= padding[1]), values, cleared)


def _as_it_is(dataset: Dataset) -> bool:
    """Return whether the file holds grey values or places in a palette bit by bit, not as a codec made them."""
    syntax: UID = dataset.file_meta.TransferSyntaxUID
    return dataset.get("SamplesPerPixel", 1) == 1 and (not syntax.is_compressed or syntax == RLELossless)


def _bits(dataset: Dataset) -> tuple[int, int]:
    allocated, stored = int(dataset.BitsAllocated), int(dataset.BitsStored)
    shift = int(dataset.get("HighBit", stored - 1)) + 1 - stored
    if not 1 <= stored <= allocated:
        raise Refused(Reason.HEADER)
    return stored, shift if 0 <= shift <= allocated - stored else 0


def _clear(values: Num[np.ndarray, "..."], dataset: Dataset, width: int) -> Num[np.ndarray, "..."]:
    """Keep the lowest BitsStored bits of values of `width` bits and, where they are signed, extend the sign."""
    stored = int(dataset.BitsStored)
    if dataset.PixelRepresentation:
        signed = values.view(f"i{width // 8}")
        return (signed << (width - stored)) >> (width - stored)
    return values & values.dtype.type(2**stored - 1)


def _colours(stored: Num[np.ndarray, "..."], dataset: Dataset, photometric: str) -> Levels:
    if photometric == "PALETTE COLOR":
        colour = apply_color_lut(_stored_bits(stored, dataset), dataset)
        return colour[..., :3].astype(np.float32) * np.float32(255 / np.iinfo(colour.dtype).max)
    bits = int(dataset.BitsStored)
    if stored.ndim != 3 or photometric not in _COLOURS or (photometric != "RGB" and bits != 8):
        raise Refused(Reason.PIXELS)  # pydicom knows no other as colours
    return stored.astype(np.float32) * np.float32(255 / (2**bits - 1))


def _plugin(dataset: Dataset) -> str:
    """Return which decoder reads the pixels; "" where pydicom itself does.

    GDCM comes last: it is the one that ends its process on some damaged files.
    """
    syntax: UID = dataset.file_meta.TransferSyntaxUID
    # Only a registered name may be shown: a private UID is text of the file.
    name = syntax_name(syntax)
    try:
        decoder = get_decoder(syntax)
    except (NotImplementedError, ValueError) as error:  # ValueError: not the UID of a transfer syntax
        raise Refused(Reason.NO_DECODER, name) from error
    if not syntax.is_compressed:
        return ""
    twelve_bit = syntax == JPEGExtended12Bit and int(dataset.get("BitsStored", 0)) > 8
    for plugin in _preferred(syntax):
        # Of 12 bits, Pillow would read 8, and GDCM is refused by pydicom.
        if plugin in decoder.available_plugins and not (twelve_bit and plugin != "pylibjpeg"):
            return plugin
    raise Refused(Reason.NO_DECODER, name)


def _preferred(syntax: UID) -> tuple[str, ...]:
    if syntax in JPEG2000TransferSyntaxes:
        return ("pylibjpeg", "pillow", "gdcm")
    if syntax in JPEGLSTransferSyntaxes:
        return ("pyjpegls", "gdcm")
    if syntax in (JPEGBaseline8Bit, JPEGExtended12Bit):
        return ("pillow", "pylibjpeg", "gdcm")
    return ("pydicom", "pylibjpeg", "gdcm")


def _numbers(value: Any) -> list[float]:
    if value is None or isinstance(value, str):
        return []
    return [float(item) for item in (value if hasattr(value, "__getitem__") else [value])]
