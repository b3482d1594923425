import pytest

from tests.client.intake import golden

MISSING = golden.missing_tools()


@pytest.mark.slow
@pytest.mark.skipif(not golden.SHARED.exists(), reason="the shared test data are not on this machine")
@pytest.mark.skipif(bool(MISSING), reason=f"needs {', '.join(MISSING)} (Debian: dcmtk, zstd)")
def test_every_file_is_read_as_an_independent_decoder_reads_it_or_refused() -> None:
    """Raises where no decoder agrees; the table of docs/dicom.md is what comes out."""
    text = golden.DOCUMENT.read_text()
    stated = text[text.index(golden.BEGIN) + len(golden.BEGIN) + 1 : text.index(golden.END)]
    assert stated == golden.table()
    assert f"Together {len(golden.files())} files" in stated
