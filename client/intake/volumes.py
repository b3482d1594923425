"""NIfTI volumes as axial slices, from the feet up: anterior above, the patient's right at the left, as in DICOM.

A NIfTI states no window, so the site's percentiles of each slice are black and white, after the file's scaling.

Source: NIfTI-1.1, nifti1.h (dim, datatype, vox_offset, scl_slope); NIfTI-2. nibabel reads the header, not the file:
it would take the sizes of extensions from it. Runs in the decoders' processes: a gzip header may have no end, and a
file any number of empty members. Out of scope: pairs of .hdr and .img, more than three axes.
"""

import gzip
import io
import math
import struct
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, final

import numpy as np

from client.intake.pixels import Levels, check_size
from client.intake.refusals import DAMAGED, Reason, Refused
from client.intake.rules import IntakeRules
from client.intake.windows import Stages, show

SUFFIXES = (".nii", ".nii.gz")
MAX_VOLUME_BYTES = 2 * 1024**3

_MAX_OFFSET = 1024**2
_MOST_INFLATED = 1032
"""Bytes that deflate makes of one, at most."""
_HEADER_BYTES = 540
_DAMAGED = (*DAMAGED, TypeError, ArithmeticError)


def is_volume(path: Path) -> bool:
    """Return whether a file is called like a NIfTI volume."""
    return path.name.lower().endswith(SUFFIXES)


@final
class Volume:
    """A NIfTI file's header, and its slices when they are asked for.

    Attributes:
        slices: How many axial slices there are.
        size: Columns and rows of each.

    Guarantees:
        - volume_is_bounded: No more is read or inflated than the header states, and that is within the limits.
        - slices_are_there: A file that is too short for what it states is refused, packed or not.
        - slices_are_axial: Whatever the order of the axes in the file, slices come from the feet up, in the same pose.
    """

    def __init__(self, source: BinaryIO, rules: IntakeRules) -> None:
        """Read the header of a file that stays open while slices are asked for.

        Raises:
            Refused: It is damaged, too large, not of real numbers, or has more than three axes.
        """
        self._source, self._rules = source, rules
        self._data: Any = None
        try:
            room = source.seek(0, io.SEEK_END)
            if room > rules.max_bytes:
                raise Refused(Reason.TOO_LARGE)
            with _unpacked(source) as handle:
                room *= _MOST_INFLATED if isinstance(handle, gzip.GzipFile) else 1
                self._read_header(handle.read(_HEADER_BYTES))
        except _DAMAGED as error:
            raise Refused(Reason.HEADER) from error
        columns, rows, self.slices = (self._shape[int(axis)] for axis in np.argsort(self._orientation[:, 0]))
        self.size = columns, rows
        check_size(rows, columns)
        size = math.prod(self._shape) * self._kind.itemsize
        if self.slices < 1 or size > MAX_VOLUME_BYTES:
            raise Refused(Reason.TOO_LARGE if self.slices > 0 else Reason.NO_IMAGE)
        if self.slices > rules.max_frames:
            raise Refused(Reason.TOO_MANY_FRAMES)
        if self._offset + size > room:
            raise Refused(Reason.PIXELS)

    def levels(self, number: int) -> Levels:
        """Return a slice, from 0 at the feet.

        Raises:
            Refused: The volume is damaged.
        """
        try:
            if self._data is None:
                self._data = self._read()
            picture = np.ascontiguousarray(self._data[::-1, ::-1, number].T)
            return show(picture, Stages(*self._scaling, percentiles=self._rules.percentiles))
        except _DAMAGED as error:
            raise Refused(Reason.PIXELS) from error

    def _read_header(self, data: bytes) -> None:
        # Not at the top: nibabel takes longer to load than all the rest, and few sites have volumes.
        import nibabel as nib
        from nibabel.spatialimages import HeaderDataError
        from nibabel.wrapstruct import WrapStructError

        second = struct.pack("<i", _HEADER_BYTES) == data[:4] or struct.pack(">i", _HEADER_BYTES) == data[:4]
        kind, size = (nib.Nifti2Header, _HEADER_BYTES) if second else (nib.Nifti1Header, 348)
        try:
            header = kind(data[:size])
            shape = header.get_data_shape()
            self._shape = tuple(int(length) for length in shape[:3])
            self._kind: np.dtype[Any] = header.get_data_dtype()
            self._offset = int(header["vox_offset"])
            slope, intercept = header.get_slope_inter()
            self._orientation: Any = nib.io_orientation(header.get_best_affine())
        except (HeaderDataError, WrapStructError, np.linalg.LinAlgError) as error:
            raise Refused(Reason.HEADER) from error
        if bytes(header["magic"])[:3] not in (b"n+1", b"n+2") or not size <= self._offset <= _MAX_OFFSET:
            raise Refused(Reason.HEADER)
        if self._kind.kind not in "iuf" or len(self._shape) != 3 or any(length != 1 for length in shape[3:]):
            raise Refused(Reason.HEADER)
        if np.isnan(self._orientation).any():
            raise Refused(Reason.HEADER)
        self._scaling = (1.0 if slope is None else float(slope), 0.0 if intercept is None else float(intercept))

    def _read(self) -> Any:
        import nibabel as nib

        count = math.prod(self._shape) * self._kind.itemsize
        with _unpacked(self._source) as handle:
            handle.read(self._offset)
            data = handle.read(count)
        if len(data) < count:
            raise Refused(Reason.PIXELS)
        stored = np.frombuffer(data, self._kind).reshape(self._shape, order="F")
        return nib.apply_orientation(stored, self._orientation)


@contextmanager
def _unpacked(source: BinaryIO) -> Generator[BinaryIO | gzip.GzipFile, None, None]:
    """Give a file from its start, unpacked; closed is what unpacks it."""
    source.seek(0)
    packed = source.read(2) == b"\x1f\x8b"  # no header begins so
    source.seek(0)
    if packed:
        with gzip.GzipFile(fileobj=source) as unpacked:
            yield unpacked
    else:
        yield source
