"""Reasons of refusal, and what helps."""

from pydicom.uid import HTJ2K, UID, JPEG2000Lossless, JPEGExtended12Bit, JPEGLosslessSV1, JPEGLSLossless

from client.intake.refusals import DECODERS, Reason, remedies
from client.intake.shortage import too_few
from common.errors import IntakeError, MissingExtra


def missing(syntax: str) -> str:
    return f"{Reason.NO_DECODER} {UID(syntax).name}"


def test_true_for_each_syntax() -> None:
    for syntax in (JPEGLosslessSV1, JPEGLSLossless, JPEG2000Lossless, HTJ2K):
        assert DECODERS in remedies([missing(syntax)])[0]
        assert isinstance(too_few(0, 2, {missing(syntax): 1}), MissingExtra)
    for reason in (missing(JPEGExtended12Bit), missing("1.2.840.10008.1.2.4.100"), f"{Reason.NO_DECODER} whatever"):
        assert len(remedies([reason])) == 1
        assert DECODERS not in remedies([reason])[0]
        assert isinstance(too_few(0, 2, {reason: 1}), IntakeError)
    assert "dcmdjpeg" in remedies([missing(JPEGExtended12Bit)])[0]
    assert remedies([Reason.PIXELS]) == []


def test_the_line_stands_in_the_error() -> None:
    assert DECODERS in str(too_few(0, 2, {missing(JPEGLSLossless): 3, Reason.NOT_DICOM: 9}))
