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
from pydicom.pixels import get_decoder
from pydicom.uid import (
    UID,
    JPEG2000TransferSyntaxes,
    JPEGBaseline8Bit,
    JPEGExtended12Bit,
    JPEGLSTransferSyntaxes,
    RLELossless,
)

from client.intake.codestream import depth_of, has_signs, rounds, shape_of
from client.intake.headers import DAMAGED_DICOM, damaged, parse, syntax_name
from client.intake.memory import header_bytes, within
from client.intake.palettes import from_palette
from client.intake.pixels import Levels
from client.intake.refusals import Reason, Refused
from client.intake.rules import IntakeRules
from client.intake.stages import FLOATS, bits_of, stages, stored_range
from client.intake.windows import show

_COLOURS = ("RGB", "YBR_FULL", "YBR_FULL_422", "YBR_ICT", "YBR_RCT")
"""What pydicom hands over as red, green and blue, as its decoders or itself convert it."""


@final
class DicomImage:
    """A DICOM file in memory, of which frames are decoded one by one.

    Attributes:
        digest: Of its header, as the scan takes it.

    Guarantees:
        - frame_groups_win: Rescale and window of a frame's functional groups win over shared ones and the top level.
        - codestreams_have_the_headers_shape: A compressed frame of other rows, columns or samples is not decoded.
        - codestreams_have_the_headers_sign: Nor is one with signs where the header knows none.
        - high_bits_are_cleared: What stands beside the stored bits changes nothing, in a compressed frame neither.
    """

    def __init__(self, data: bytes, rules: IntakeRules) -> None:
        """Parse the file.

        Raises:
            Refused: Damaged, too large, without an image, or without its decoder.
        """
        self._rules = rules
        try:
            self._dataset, self.digest = parse(data, rules)
            if not any(name in self._dataset for name in ("PixelData", *FLOATS)):
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
            codestream = _codestream(dataset, frame)
            # A view, where nothing is compressed: it is read once and never written to.
            options: Any = {"view_only": True, **_bits(dataset, codestream)}
            decoder = get_decoder(dataset.file_meta.TransferSyntaxUID)
            stored, _ = decoder.as_array(dataset, index=frame, decoding_plugin=self._plugin, **options)
            photometric = str(dataset.get("PhotometricInterpretation", ""))
            if stored.ndim == 2 and photometric.startswith("MONOCHROME"):
                with within(header_bytes(self._rules)):
                    said = stages(dataset, frame, self._rules)
                return show(_stored_bits(stored, dataset, codestream, said.padding), said)
            levels = _colours(stored, dataset, codestream, photometric)
        except DAMAGED_DICOM as error:
            raise damaged(error, Reason.PIXELS) from error
        if levels.shape[2:] != (3,):  # such as a palette for pixels that are colours already
            raise Refused(Reason.PIXELS)
        return levels


def _codestream(dataset: Dataset, frame: int) -> bytes | None:
    """Return the codestream of a frame, if it has one (RLE is none), and refuse one of another form than the header's.

    Decoders allocate its shape, and pydicom would shear it. Values below zero would be taken for the highest where the
    header knows no sign; the reverse is known: words that have signs by the header, packed as if they had none.
    """
    syntax: UID = dataset.file_meta.TransferSyntaxUID
    if not syntax.is_encapsulated or syntax == RLELossless:
        return None
    offsets = dataset.get("ExtendedOffsetTable"), dataset.get("ExtendedOffsetTableLengths")
    data = get_frame(
        dataset.PixelData,
        frame,
        number_of_frames=int(dataset.get("NumberOfFrames") or 1),
        extended_offsets=None if None in offsets else offsets,
    )
    if shape_of(data) != (dataset.Rows, dataset.Columns, dataset.get("SamplesPerPixel", 1)):
        raise Refused(Reason.PIXELS)
    if has_signs(data) and not dataset.PixelRepresentation:
        raise Refused(Reason.PIXELS)
    return data


def _bits(dataset: Dataset, codestream: bytes | None) -> dict[str, Any]:
    """Return what a decoder is told of the bits: to leave words as they are, also in a codestream of more bits.

    Unused bits are cleared here: pydicom looks at neither HighBit nor padding, and GDCM keeps no more than are stored.
    """
    if not _in_words(dataset):
        return {"correct_unused_bits": True}
    depth = 0 if codestream is None else depth_of(codestream)
    deeper = {"bits_stored": depth} if dataset.get("BitsStored", depth) < depth <= dataset.BitsAllocated else {}
    return {"correct_unused_bits": False, **deeper}


def _stored_bits(
    values: Num[np.ndarray, "rows columns *samples"],
    dataset: Dataset,
    codestream: bytes | None,
    padding: tuple[float, float] | None = None,
) -> Num[np.ndarray, "rows columns *samples"]:
    """Clear what stands beside the stored bits, in words of the file or of a codestream of more bits.

    A whole word that is padding stays: in the stored bits alone it could be a pixel's value.
    """
    if values.dtype.kind not in "iu" or not _in_words(dataset):
        return values
    bits, shift = bits_of(dataset)
    if codestream is not None and depth_of(codestream) < bits + shift:  # no words: the stored bits alone
        shift = 0
    low, high = stored_range(dataset)
    width = values.itemsize * 8
    if shift == 0 and (bits >= width or not values.size or (values.min() >= low and values.max() <= high)):
        return values
    if codestream is not None and shift == 0 and low == 0 and rounds(codestream):
        cleared = np.minimum(values, values.dtype.type(high))  # white, and a little more
    else:
        cleared = _clear(values >> shift, dataset, width)
    if padding is None or shift:
        return cleared
    return np.where((values >= padding[0]) & (values <= padding[1]), values, cleared)


def _in_words(dataset: Dataset) -> bool:
    """Return whether pydicom hands over grey values, places in a palette or RGB bit by bit: it converts no colours."""
    syntax: UID = dataset.file_meta.TransferSyntaxUID
    packed = syntax.is_compressed and syntax != RLELossless
    grey = dataset.get("SamplesPerPixel", 1) == 1
    return grey or (dataset.get("PhotometricInterpretation") == "RGB" and not packed)


def _clear(values: Num[np.ndarray, "..."], dataset: Dataset, width: int) -> Num[np.ndarray, "..."]:
    """Keep the lowest BitsStored bits of values of `width` bits and, where they are signed, extend the sign."""
    stored = int(dataset.BitsStored)
    if dataset.PixelRepresentation:
        signed = values.view(f"i{width // 8}")
        return (signed << (width - stored)) >> (width - stored)
    return values & values.dtype.type(2**stored - 1)


def _colours(stored: Num[np.ndarray, "..."], dataset: Dataset, codestream: bytes | None, photometric: str) -> Levels:
    if photometric == "PALETTE COLOR":
        return from_palette(_stored_bits(stored, dataset, codestream), dataset)
    bits, shift = bits_of(dataset)
    if stored.ndim != 3 or photometric not in _COLOURS or (photometric != "RGB" and (bits, shift) != (8, 0)):
        raise Refused(Reason.PIXELS)  # pydicom knows no other as colours
    if dataset.PixelRepresentation:  # no colour is below zero
        raise Refused(Reason.PIXELS)
    return _stored_bits(stored, dataset, codestream).astype(np.float32) * np.float32(255 / (2**bits - 1))


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
