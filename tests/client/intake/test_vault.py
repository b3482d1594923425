"""The vault: what is written comes back, and nothing that was changed does."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from client.intake import chunks, sealed, vault
from client.intake.chunks import Appender
from client.intake.dataset import Form
from client.intake.sealed import SealedPixels
from client.intake.vault import ROW, Manifest, Seen
from common.errors import StorageError
from common.sealing import SealingKey

FORM = Form(("a", "b"), 28, 1)


def filled(folder: Path, key: SealingKey, count: int, form: Form = FORM) -> tuple[Manifest, np.ndarray]:
    """Make a vault of random images, one a file."""
    manifest = vault.create_vault(folder, key, form)
    rng = np.random.default_rng(count)
    pixels = rng.integers(0, 256, (count, form.channels, form.size, form.size), dtype=np.uint8)
    rows = np.zeros(count, ROW)
    rows["file"] = [number.to_bytes(16, "big") for number in range(count)]
    rows["stamp"] = rows["file"]
    appender = Appender(folder, key, manifest)
    for start in range(0, count, 50):
        appender.add(rows[start : start + 50], pixels[start : start + 50])
    manifest = appender.finish()
    seen = {bytes(row["file"]): Seen(bytes(row["stamp"]), {}) for row in rows}
    manifest = replace(manifest, seen=seen)
    vault.write_manifest(folder, key, manifest)
    return manifest, pixels


def opened(folder: Path, key: SealingKey) -> SealedPixels:
    """Open all images of a vault."""
    manifest = vault.read_manifest(folder, key)
    return SealedPixels(folder, key, manifest, np.flatnonzero(manifest.current()))


@given(count=st.integers(1, 400), seed=st.integers(0, 2**32), channels=st.sampled_from([1, 3]))
@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_what_is_written_comes_back(tmp_path_factory: pytest.TempPathFactory, count: int, seed: int, channels: int):
    folder, key = tmp_path_factory.mktemp("vault"), SealingKey.generate()
    _, pixels = filled(folder, key, count, Form(("a",), 28, channels))
    images = opened(folder, key)
    rows = np.random.default_rng(seed).integers(0, count, 40)
    assert images.shape == pixels.shape
    assert np.array_equal(images[rows], pixels[rows])
    assert np.array_equal(images[3:9], pixels[3:9])


def test_never_wrong_pixels(tmp_path: Path):
    key = SealingKey.generate()
    filled(tmp_path, key, 200)
    path = tmp_path / "pixels-00000"
    whole = path.read_bytes()
    lengths = (0, 1, 2, 3)  # of the first chunk, which says how far it goes
    for place in (*lengths, *np.random.default_rng(0).integers(0, len(whole), 60)):
        damaged = bytearray(whole)
        damaged[place] ^= 1 << int(place) % 8
        path.write_bytes(damaged)
        with pytest.raises(StorageError, match="damaged"):
            opened(tmp_path, key)[:]
    for longer in (whole + b"\0", whole[:-1]):
        path.write_bytes(longer)
        with pytest.raises(StorageError, match="damaged"):
            opened(tmp_path, key)
    path.write_bytes(whole)
    assert len(opened(tmp_path, key)[:]) == 200
    with pytest.raises(StorageError, match=r"another key"):
        opened(tmp_path, SealingKey.generate())


def test_the_length_of_a_chunk_is_checked_where_it_is_the_only_one(tmp_path: Path):
    """No byte stands behind it, so that a length which says too much would read the same."""
    key = SealingKey.generate()
    filled(tmp_path, key, 5)
    path = tmp_path / "pixels-00000"
    whole = path.read_bytes()
    for bit in range(32):
        length = (int.from_bytes(whole[:4], "little") ^ 1 << bit).to_bytes(4, "little")
        path.write_bytes(length + whole[4:])
        with pytest.raises(StorageError, match="damaged"):
            opened(tmp_path, key)[:]


def test_chunks_do_not_change_places(tmp_path: Path):
    key = SealingKey.generate()
    manifest, _ = filled(tmp_path, key, 166)  # two chunks of 83
    path = tmp_path / "pixels-00000"
    whole, half = path.read_bytes(), manifest.segments[0].size_bytes // 2
    path.write_bytes(whole[half:] + whole[:half])
    with pytest.raises(StorageError):
        opened(tmp_path, key)[:]


def test_another_vaults_chunks_do_not_open(tmp_path: Path):
    key = SealingKey.generate()
    for name in ("one", "two"):
        filled(tmp_path / name, key, 100)
    (tmp_path / "two" / "pixels-00000").replace(tmp_path / "one" / "pixels-00000")
    with pytest.raises(StorageError):
        opened(tmp_path / "one", key)[:]


@pytest.mark.parametrize("lost", [1, 20_000, 70_000])
def test_an_interrupted_import_is_taken_up(tmp_path: Path, lost: int):
    key = SealingKey.generate()
    manifest, pixels = filled(tmp_path, key, 200)
    empty = Manifest(manifest.id, FORM)
    vault.write_manifest(tmp_path, key, empty)  # as an import leaves it that was killed
    path = tmp_path / "pixels-00000"
    path.write_bytes(path.read_bytes()[:-lost])
    found = chunks.recover(tmp_path, key, empty)
    assert len(found.rows) == {1: 166, 20_000: 166, 70_000: 83}[lost]
    vault.write_manifest(tmp_path, key, replace(found, seen=manifest.seen))
    assert np.array_equal(opened(tmp_path, key)[:], pixels[: len(found.rows)])


def test_rows_of_changed_files_do_not_count(tmp_path: Path):
    key = SealingKey.generate()
    manifest, pixels = filled(tmp_path, key, 10)
    seen = dict(manifest.seen)
    seen[bytes(manifest.rows["file"][3])] = Seen(bytes(16), {})
    del seen[bytes(manifest.rows["file"][7])]
    vault.write_manifest(tmp_path, key, replace(manifest, seen=seen))
    assert np.array_equal(opened(tmp_path, key)[:], np.delete(pixels, [3, 7], axis=0))


def test_bounded_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    key = SealingKey.generate()
    monkeypatch.setattr(sealed, "CACHE_BYTES", 2 * vault.CHUNK_BYTES)
    _, pixels = filled(tmp_path, key, 700)
    images = opened(tmp_path, key)
    assert np.array_equal(images[:], pixels)
    assert len(images._cache) <= 2


def test_gone_order_stays(tmp_path: Path):
    """After compaction nothing of a row that does not count stands in any file, and the others keep their order."""
    key = SealingKey.generate()
    manifest, pixels = filled(tmp_path, key, 200)
    gone = {bytes(manifest.rows["file"][place]) for place in (0, 90, 199)}
    manifest = replace(manifest, seen={file: seen for file, seen in manifest.seen.items() if file not in gone})
    result = chunks.compact(tmp_path, key, manifest)
    vault.write_manifest(tmp_path, key, result)
    chunks.delete_unnamed(tmp_path, result)
    assert [path.name for path in tmp_path.glob("pixels-*")] == ["pixels-00001"]
    assert result.current().all()
    assert len(result.rows) == 197
    assert np.array_equal(opened(tmp_path, key)[:], np.delete(pixels, [0, 90, 199], axis=0))
    assert chunks.compact(tmp_path, key, result).segments == result.segments


def test_an_interrupted_compaction_doubles_nothing(tmp_path: Path):
    key = SealingKey.generate()
    manifest, pixels = filled(tmp_path, key, 200)
    gone = bytes(manifest.rows["file"][5])
    smaller = replace(manifest, seen={file: seen for file, seen in manifest.seen.items() if file != gone})
    chunks.compact(tmp_path, key, smaller)  # killed before the manifest is written
    found = chunks.recover(tmp_path, key, smaller)
    assert len(found.rows) == 399
    result = chunks.compact(tmp_path, key, found)
    vault.write_manifest(tmp_path, key, result)
    chunks.delete_unnamed(tmp_path, result)
    assert len(result.rows) == 199
    assert np.array_equal(opened(tmp_path, key)[:], np.delete(pixels, 5, axis=0))


def test_no_number_twice(tmp_path: Path):
    """What an older state of the vault named does not come back under the number of a newer file."""
    key = SealingKey.generate()
    manifest, _ = filled(tmp_path, key, 100)
    old = (tmp_path / "pixels-00000").read_bytes()
    empty = chunks.compact(tmp_path, key, replace(manifest, seen={}))
    vault.write_manifest(tmp_path, key, empty)
    (tmp_path / "pixels-00000").write_bytes(old)
    found = chunks.recover(tmp_path, key, vault.read_manifest(tmp_path, key))
    assert (len(found.rows), found.next) == (0, 1)
    assert not list(tmp_path.glob("pixels-*"))


def test_what_stands_beside_the_chunks_stays(tmp_path: Path):
    key = SealingKey.generate()
    filled(tmp_path, key, 60)
    strays = [tmp_path / name for name in ("pixels-00000.bak", "pixels-0", "pixels-", "pixels-000001", "pixels-\u0663")]
    for stray in strays:
        stray.write_bytes(b"x")
    manifest = chunks.recover(tmp_path, key, vault.read_manifest(tmp_path, key))
    chunks.delete_unnamed(tmp_path, manifest)
    assert all(stray.exists() for stray in strays)
    assert len(opened(tmp_path, key)) == 60
