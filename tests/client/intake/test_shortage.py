"""What is said where there are too few patients."""

from client.intake.refusals import DECODERS, Reason
from client.intake.shortage import STAYS, too_few
from common.errors import IntakeError, MissingExtra, TooFewPatients


def test_what_was_there_is_told_whatever_is_wrong() -> None:
    missing = f"{Reason.NO_DECODER} JPEG-LS Lossless Image Compression"
    for error, kind in (
        (too_few(2, 9, {}, "Others.", kept=True, there=True), TooFewPatients),
        (too_few(0, 9, {missing: 1}, there=True), MissingExtra),
        (too_few(0, 9, {Reason.NOT_DICOM: 1}, "Others.", there=True), IntakeError),
    ):
        assert type(error) is kind
        assert str(error).endswith(f". {STAYS}")
    assert DECODERS in str(too_few(0, 9, {missing: 1}, there=True))


def test_kept_only_where_it_is() -> None:
    assert "What was read is kept for then." in str(too_few(2, 9, {}, kept=True))
    assert "kept" not in str(too_few(2, 9, {}))
    assert STAYS not in str(too_few(2, 9, {}, kept=True))
