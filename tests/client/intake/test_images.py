import io
import os
import struct
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from client.intake import Reason, Refused, scan
from client.intake.images import decode
from common.errors import IntakeError
from tests.client.intake.pictures import read

SHARED = Path(__file__).resolve().parents[3].parent / "shared" / "data"
RAMP = np.linspace(0, 255, 32 * 32).reshape(32, 32).round().astype(np.uint8)


def index(folder: Path, *lines: str, header: str = "file,patient,label", name: str = "index.csv") -> Path:
    (folder / name).write_text("\n".join([header, *lines]) + "\n", encoding="utf-8-sig")
    return folder


def png(path: Path, values: np.ndarray = RAMP, mode: str | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(values)
    (image.convert(mode) if mode else image).save(path)
    return path


def test_folder_with_an_index(tmp_path: Path) -> None:
    png(tmp_path / "a.png")
    png(tmp_path / "deep" / "b.jpg")
    folder = index(
        tmp_path, " a.png ,p2,sick,north,i", "deep/b.jpg,p1,well,,", header="FILE,Patient_ID,Label,site,Issuer"
    )
    found = scan(folder)
    assert [record.site for record in found.records] == ["north", None]
    assert [record.patient for record in found.records] == [("i", "p2"), ("", "p1")]
    dataset, refused = read(found, ["sick", "well"], 32)
    assert dataset.labels.tolist() == [1, 0]
    assert np.array_equal(dataset.images[1, 0], RAMP)
    assert not refused


@pytest.mark.parametrize("mode", ["L", "LA", "RGB", "RGBA", "P", "I;16", "1", "CMYK"])
def test_modes(tmp_path: Path, mode: str) -> None:
    name = "a.jpg" if mode == "CMYK" else "a.png"
    board = np.where(RAMP > 127, 255, 0).astype(np.uint8)
    if mode == "I;16":
        png(tmp_path / name, board.astype(np.uint16) * 16)
    else:
        png(tmp_path / name, board, mode)
    dataset, _ = read(scan(index(tmp_path, f"{name},p,x")), ["x"], 32)
    assert np.abs(dataset.images[0, 0].astype(int) - board).max() <= (40 if mode == "CMYK" else 1)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P", "L"])
def test_colour(tmp_path: Path, mode: str) -> None:
    colour = np.stack([RAMP, 255 - RAMP, np.full_like(RAMP, 40)], axis=2)
    image = Image.fromarray(RAMP if mode == "L" else colour)
    (image if mode in ("RGB", "L") else image.convert(mode)).save(tmp_path / "a.png")
    found = scan(index(tmp_path, "a.png,p,x"))
    seen, _ = read(found, ["x"], 32, 3)
    expected = np.repeat(RAMP[..., None], 3, axis=2) if mode == "L" else colour
    off = np.abs(seen.images[0].astype(int) - np.moveaxis(expected, 2, 0))
    assert off.max() <= (60 if mode == "P" else 0)
    grey, _ = read(found, ["x"], 32)
    assert np.abs(grey.images[0, 0] - np.moveaxis(seen.images[0], 0, 2) @ [0.299, 0.587, 0.114]).max() <= 0.51


def test_every_unusable_file_is_counted(tmp_path: Path) -> None:
    folder, outside = tmp_path / "in", tmp_path / "out"
    png(folder / "good.png")
    png(outside / "secret.png")
    (folder / "link.png").symlink_to(outside / "secret.png")
    (folder / "way").symlink_to(outside)
    (folder / "circle").symlink_to(folder / "circle")
    (folder / "text.png").write_text("no image")
    (folder / "cut.png").write_bytes((folder / "good.png").read_bytes()[:80])
    os.mkfifo(folder / "pipe.png")
    frames = [Image.fromarray(RAMP), Image.fromarray(255 - RAMP)]
    frames[0].save(folder / "film.png", save_all=True, append_images=frames[1:])
    Image.new("1", (9000, 9000)).save(folder / "large.png")
    Image.new("1", (14_000, 14_000)).save(folder / "bomb.png")
    names = [
        *("good.png", "good.png", "link.png"),  # duplicates are kept, a file may be a link
        *("../out/secret.png", str(outside / "secret.png"), "way/secret.png", "a\0b"),
        *("none.png", "", "circle/x.png", "x" * 300),
        *("text.png", "pipe.png", "in", "film.png", "cut.png", "large.png", "bomb.png"),
    ]
    index(folder, *(f"{name},p,x" for name in names), "good.png,,x", "good.png,p,", "good.png,p,y", "good.png")
    dataset, refused = read(scan(folder), ["x"], 32)
    assert len(dataset.images) == 3
    assert refused == {
        Reason.OUTSIDE: 4,
        Reason.MISSING: 5,
        Reason.NOT_PNG_JPEG: 1,
        Reason.NOT_A_FILE: 3,  # two links that the index does not name
        Reason.MULTI_FRAME: 1,
        Reason.PIXELS: 1,
        Reason.TOO_LARGE: 2,
        Reason.NO_PATIENT: 2,
        Reason.NO_LABEL: 1,
        Reason.OTHER_LABEL: 1,
    }


def test_which_index(tmp_path: Path) -> None:
    png(tmp_path / "a.png")
    index(tmp_path, "a.png,p,x", name="list.CSV")
    assert len(scan(tmp_path).records) == 1
    index(tmp_path, "a.png,p,x", name="more.csv")
    with pytest.raises(IntakeError, match="several CSV files"):
        scan(tmp_path)
    assert [record.label for record in scan(index(tmp_path, "a.png,p,y")).records] == ["y"]


def test_labels(tmp_path: Path) -> None:
    png(tmp_path / "a.png")
    folder = index(tmp_path, "a.png,p,1", header="file,patient,Finding")
    assert scan(folder, "column:finding").records[0].label == "1"
    assert scan(folder, "none").records[0].label == "all"
    with pytest.raises(IntakeError, match="'label'"):
        scan(folder)
    with pytest.raises(IntakeError, match="--label none"):
        scan(index(tmp_path, "a.png,p,"))


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (b"file,label\na.png,x\n", "no column patient"),
        (b"patient,label\np,x\n", "'file'"),
        (b"file,patient,label,FILE\na,b,c,d\n", "two columns"),
        (b"file,patient,label\n\xff,p,x\n", "UTF-8"),
        (b'file,patient,label\n"a.png,p,x\n', "CSV"),
        (b"", "'file'"),
    ],
)
def test_a_bad_index_is_explained(tmp_path: Path, content: bytes, match: str) -> None:
    (tmp_path / "index.csv").write_bytes(content)
    with pytest.raises(IntakeError, match=match):
        scan(tmp_path)


@settings(deadline=None, derandomize=True, max_examples=150)
@given(st.data())
def test_mutated_bytes_give_an_intake_error_or_a_count(data: st.DataObject) -> None:
    suffix = data.draw(st.sampled_from(["png", "jpg"]))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        mutated = bytearray(png(folder / f"a.{suffix}").read_bytes())
        for _ in range(data.draw(st.integers(1, 8))):
            mutated[data.draw(st.integers(8, len(mutated) - 1))] = data.draw(st.integers(0, 255))
        end = data.draw(st.one_of(st.just(len(mutated)), st.integers(0, len(mutated))))
        (folder / f"b.{suffix}").write_bytes(mutated[:end])
        index(folder, f"a.{suffix},p,x", f"b.{suffix},p,x")
        dataset, refused = read(scan(folder), ["x"], 28)
        assert len(dataset.images) + sum(refused.values()) == 2


@settings(deadline=None, derandomize=True, max_examples=100)
@given(st.binary(max_size=200))
def test_any_index_gives_an_intake_error_or_a_count(content: bytes) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        png(folder / "a.png")
        (folder / "index.csv").write_bytes(b"file,patient,label\na.png,p,x\n" + content)
        try:
            found = scan(folder)
        except IntakeError:
            return
        assert len(found.records) >= 1


@pytest.mark.skipif(not SHARED.exists(), reason="the shared test data are not on this machine")
def test_real_png_agree_with_their_npz(tmp_path: Path) -> None:
    """The NIH set is there twice: as PNG (RGB and RGBA) and as one array."""
    source = np.load(SHARED / "nih_cxr14" / "nih64.npz", allow_pickle=False)
    names = source["filename"].tolist()
    for name in names:
        (tmp_path / name).symlink_to(SHARED / "nih_cxr14" / "png64" / name)
    lines = [f"{name},{patient},x" for name, patient in zip(names, source["patient_id"].tolist(), strict=True)]
    dataset, refused = read(scan(index(tmp_path, *lines)), ["x"], 64)
    order = np.argsort(source["patient_id"], kind="stable")
    assert np.abs(dataset.images[:, 0].astype(int) - source["images"][order]).max() <= 1
    assert dataset.number_of_patients == 147
    assert not refused


def tiff(pixels: np.ndarray, photometric: int, loop: bool = False) -> bytes:
    """Return a TIFF of one strip, written here: Pillow writes no picture of 16 bits whose white is 0."""
    data = pixels.tobytes()
    sizes = {256: pixels.shape[1], 257: pixels.shape[0], 258: pixels.itemsize * 8, 259: 1, 262: photometric}
    rest = {273: 8, 277: 1, 278: pixels.shape[0], 279: len(data), 339: 3 if pixels.dtype.kind == "f" else 1}
    tags = b"".join(struct.pack("<HHLL", tag, 4, 1, value) for tag, value in (sizes | rest).items())
    place = 8 + len(data)
    count = struct.pack("<H", len(sizes | rest))
    return b"II*\0" + struct.pack("<L", place) + data + count + tags + struct.pack("<L", place if loop else 0)


@pytest.mark.parametrize("kind", ["u1", "<u2", "<f4"])
def test_white_may_be_zero_in_a_tiff_of_any_depth(kind: str) -> None:
    ramp = np.tile(np.arange(64) * (1 if kind == "u1" else 500), (8, 1)).astype(kind)
    black, white = (decode(io.BytesIO(tiff(ramp, photometric))) for photometric in (1, 0))
    assert black[0, 0] < black[0, -1]
    assert np.allclose(white, 255 - black, atol=1e-3)


def test_a_tiff_of_one_value_is_black_whatever_its_white() -> None:
    assert decode(io.BytesIO(tiff(np.full((8, 8), 7, "<u2"), 0))).max() == 0


def test_a_tiff_whose_directory_goes_round_is_refused() -> None:
    ramp = np.arange(64, dtype=np.uint8).reshape(8, 8)
    assert decode(io.BytesIO(tiff(ramp, 1))).shape == (8, 8)
    with pytest.raises(Refused, match="pages"):
        decode(io.BytesIO(tiff(ramp, 1, loop=True)))


def test_the_slashes_of_windows(tmp_path: Path) -> None:
    """A name that is there as it stands is that file; another one is looked for with this system's slashes."""
    png(tmp_path / "deep" / "a.png")
    png(tmp_path / "deep\\b.png")
    found = scan(index(tmp_path, r"deep\a.png,p1,x", r"deep\b.png,p2,x", r"..\a.png,p3,x", r"\etc\a.png,p4,x"))
    assert [record.path.name for record in found.records] == ["a.png", r"deep\b.png"]
    assert [refusal.reason for refusal in found.refusals] == [Reason.OUTSIDE, Reason.OUTSIDE]


def test_names_from_another_folder_get_a_hint(tmp_path: Path) -> None:
    png(tmp_path / "deep" / "a.png")
    with pytest.raises(IntakeError, match="from its own folder"):
        scan(index(tmp_path, "a.png,p1,x"))
