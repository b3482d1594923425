import pytest
from pydicom.uid import ExplicitVRLittleEndian, JPEG2000Lossless, JPEGLSLossless

from simulations.benchmark import intake, vault


@pytest.mark.slow
def test_rows_and_ratios(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a few small files: every encoding has a row, and every image was read both ways."""
    monkeypatch.setattr(intake, "SIDE", 96)
    monkeypatch.setattr(intake, "REPEATS", 1)
    monkeypatch.setattr(vault, "FILES", 50)
    monkeypatch.setattr(intake, "FILES", {ExplicitVRLittleEndian: 6, JPEG2000Lossless: 2, JPEGLSLossless: 2})
    result = intake.measure()
    assert [row["files"] for row in result.rows] == [10, 6, 2, 2]
    assert all(row["ratio"] > 0 for row in result.rows)
    assert set(result.ratios) == {
        "import_over_bare_loop",
        "import_over_bare_loop_on_one_core",
        "cpu_of_the_loop_over_import",
        "peak_memory_of_4_times_the_files_over_once",
        "peak_memory_mib",
        "vault_read_over_decode",
        "vault_read_without_cache_over_decode",
        "vault_read_images_s",
        "import_of_10000_small_files_s",
        "import_of_10000_unchanged_files_s",
    }


def test_a_refused_image_is_an_error(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    monkeypatch.setattr(intake, "SIDE", 16)
    intake._write(tmp_path / "a", ExplicitVRLittleEndian, 1)
    path = next((tmp_path / "a").iterdir())
    path.write_bytes(path.read_bytes()[:-50])
    with pytest.raises(RuntimeError, match="Expected 1 images, got 0"):
        intake._import(tmp_path)
