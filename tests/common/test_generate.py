"""Images, sheets, weights on disk and files of images."""

import csv
import hashlib
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.numpy import save as save_tensors
from torch import nn

from common.artefact import draw, load_generator, save_generator
from common.config import Config
from common.config_text import build_config
from common.errors import ConfigError, ResumeError, StorageError, WireError
from common.generate import file_names, generate_images, parse_labels, spread_labels, write_images
from common.models import build
from common.sheets import MARK, class_row, save_sheet

CLASSES = ("clear", "nodule", "mass")


def _config(**changes: object) -> Config:
    model = {"model.name": "mlp", "model.latent_dim": 3, "model.generator_width": 8, "model.discriminator_width": 8}
    return build_config({}, {"image.classes": CLASSES, "image.size": 28, **model, **changes})


def _generator(config: Config, seed: int = 0) -> nn.Module:
    rng = torch.Generator().manual_seed(seed)
    return build(config.model, config.image, len(config.image.classes), rng).generator


class _Constant(nn.Module):
    """Gives every pixel the value of its label's place in `values`."""

    def __init__(self, *values: float) -> None:
        super().__init__()
        self.values = torch.tensor(values)

    def forward(self, latent: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return self.values[labels].view(-1, 1, 1, 1).expand(-1, 1, 4, 4)


class _Coloured(nn.Module):
    """Gives every pixel red, green and blue of its label's place in `colours`."""

    def __init__(self, *colours: tuple[float, float, float]) -> None:
        super().__init__()
        self.colours = torch.tensor(colours)

    def forward(self, latent: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return self.colours[labels].view(-1, 3, 1, 1).expand(-1, 3, 4, 4)


def _saved(folder: Path, config: Config | None = None) -> nn.Module:
    config = config or _config()
    generator = _generator(config)
    save_generator(folder, generator, config, "0123abcd", 3, {"a": 1.5})
    return generator


def _edit(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


# --- draw


def test_draw_maps_minus_one_to_black_and_one_to_white_and_rounds() -> None:
    generator = _Constant(-1.0, 0.0, 1.0, -1 + 0.6 / 127.5)
    images = draw(generator, torch.arange(4), 2, torch.Generator())
    assert images.dtype == np.uint8
    assert images[:, 0, 0].tolist() == [0, 128, 255, 1]


def test_draw_in_colour_puts_red_green_and_blue_last() -> None:
    images = draw(_Coloured((1.0, -1.0, 0.0)), torch.zeros(2, dtype=torch.int64), 2, torch.Generator())
    assert images.shape == (2, 4, 4, 3)
    assert (images == [255, 0, 128]).all()


def test_draw_same_again() -> None:
    config, labels = _config(), torch.arange(3).repeat(4)
    first, second, other = (
        draw(_generator(config), labels, 3, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)
    )
    np.testing.assert_array_equal(first, second)
    assert (first != other).any()


@pytest.mark.parametrize("training", [True, False])
def test_draw_leaves_no_trace(training: bool) -> None:
    generator = _generator(_config()).train(training)
    state = torch.random.get_rng_state()
    images = draw(generator, torch.zeros(5, dtype=torch.int64), 3, torch.Generator(), batch=2)
    assert images.shape == (5, 28, 28)
    assert generator.training is training
    assert all(parameter.grad is None for parameter in generator.parameters())
    assert torch.equal(state, torch.random.get_rng_state())


# --- sheets


def test_sheet_same_latents_and_only_the_weights_differ(tmp_path: Path) -> None:
    config = _config()
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        save_sheet(tmp_path / f"{name}.png", _generator(config, seed), config)
    first, second, other = ((tmp_path / f"{name}.png").read_bytes() for name in "abc")
    assert first == second
    assert first != other


def test_sheet_has_a_row_for_each_class_and_says_that_it_is_synthetic(tmp_path: Path) -> None:
    config = _config()
    save_sheet(tmp_path / "s.png", _Constant(-1.0, 0.0, 0.9), config)
    with Image.open(tmp_path / "s.png") as sheet:
        assert sheet.text["Description"] == MARK  # pyright: ignore[reportAttributeAccessIssue]
        for number, grey in enumerate((0, 128, 242)):
            row = class_row(sheet, number, CLASSES)
            assert row.height > 100
            pixels = np.asarray(row.convert("L"))
            assert set(np.unique(pixels)) == {grey, 255}
            assert (pixels == grey).sum() == 8 * 128 * 128


def test_sheet_in_colour(tmp_path: Path) -> None:
    config = _config(**{"image.channels": 3})
    save_sheet(tmp_path / "s.png", _Coloured((1.0, -1.0, -1.0), (-1.0, 1.0, -1.0), (0.0, 0.0, 1.0)), config)
    with Image.open(tmp_path / "s.png") as sheet:
        assert sheet.mode == "RGB"
        assert sheet.getpixel((0, 0)) == (255, 255, 255)
        for number, colour in enumerate([(255, 0, 0), (0, 255, 0), (128, 128, 255)]):
            pixels = np.asarray(class_row(sheet, number, CLASSES)).reshape(-1, 3)
            assert (pixels == colour).all(axis=1).sum() == 8 * 128 * 128


def test_sheet_cuts_a_long_class_name(tmp_path: Path) -> None:
    config = _config(**{"image.classes": ("short", "an endless name of a class that fills every margin and more")})
    save_sheet(tmp_path / "s.png", _generator(config), config)
    with Image.open(tmp_path / "s.png") as sheet:
        assert sheet.width == 160 + 8 * 132


# --- the generator on disk


def test_generator_survives_the_disk(tmp_path: Path) -> None:
    config = _config()
    generator = _saved(tmp_path, config)
    loaded, info = load_generator(tmp_path)
    assert (info.model, info.image, info.value_range) == (config.model, config.image, (-1.0, 1.0))
    assert (info.run_id, info.rounds, info.epsilon_by_site, info.delta) == ("0123abcd", 3, {"a": 1.5}, 1e-5)
    assert info.config_digest == config.digest()
    labels = torch.arange(3)
    seeds = (torch.Generator().manual_seed(7), torch.Generator().manual_seed(7))
    np.testing.assert_array_equal(draw(generator, labels, 3, seeds[0]), draw(loaded, labels, 3, seeds[1]))


def test_load_belongs_to_its_description(tmp_path: Path) -> None:
    _saved(tmp_path)
    path = tmp_path / "generator.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(WireError, match="SHA-256"):
        load_generator(tmp_path)


def test_load_bounded(tmp_path: Path) -> None:
    _saved(tmp_path)
    with (tmp_path / "generator.safetensors").open("r+b") as handle:
        handle.truncate(2**40)
    with pytest.raises(WireError, match="at most"):
        load_generator(tmp_path)
    with (tmp_path / "generator.json").open("r+b") as handle:
        handle.truncate(2**40)
    with pytest.raises(WireError, match="at most"):
        load_generator(tmp_path)


def test_load_from_a_folder_without_a_generator(tmp_path: Path) -> None:
    with pytest.raises(ResumeError, match="No generator stands"):
        load_generator(tmp_path)
    _saved(tmp_path)
    (tmp_path / "generator.safetensors").unlink()
    with pytest.raises(ResumeError, match="No generator stands"):
        load_generator(tmp_path)


@pytest.mark.parametrize(
    "changes",
    [
        {"version": 2},
        {"surprise": 1},
        {"image": {"size": 28, "classes": []}},
        {"image": {"size": 33, "classes": ["a"]}},
        {"model": {"name": "other"}},
        {"model": {"generator_width": 100_000}},
        {"rounds": -1},
        {"sha256": None},
    ],
)
def test_load_refuses_a_description_that_is_not_strict(tmp_path: Path, changes: dict[str, object]) -> None:
    _saved(tmp_path)
    _edit(tmp_path / "generator.json", **changes)
    with pytest.raises(WireError, match=r"generator\.json"):
        load_generator(tmp_path)


@pytest.mark.parametrize("damage", ["shape", "missing", "extra", "nan", "dtype", "garbage"])
def test_load_refuses_weights_that_do_not_fit(tmp_path: Path, damage: str) -> None:
    generator = _saved(tmp_path)
    arrays = {name: parameter.detach().numpy().copy() for name, parameter in generator.named_parameters()}
    name = next(iter(arrays))
    if damage == "shape":
        arrays[name] = arrays[name].T.copy()
    elif damage == "missing":
        del arrays[name]
    elif damage == "extra":
        arrays["more"] = np.zeros(1, np.float32)
    elif damage == "nan":
        arrays[name][0] = np.nan
    elif damage == "dtype":
        arrays[name] = arrays[name].astype(np.float16)
    content = b"garbage" if damage == "garbage" else save_tensors(arrays)
    (tmp_path / "generator.safetensors").write_bytes(content)
    _edit(tmp_path / "generator.json", sha256=hashlib.sha256(content).hexdigest())
    with pytest.raises(WireError):
        load_generator(tmp_path)


# --- labels


@pytest.mark.parametrize(
    ("text", "shares"),
    [
        ("all", (1 / 3, 1 / 3, 1 / 3)),
        ("nodule", (0, 1, 0)),
        ("nodule, clear", (0.5, 0.5, 0)),
        ("clear=0.5,mass=1.5", (0.25, 0, 0.75)),
        ("clear = 1 , mass", (0.5, 0, 0.5)),
    ],
)
def test_parse_labels(text: str, shares: tuple[float, ...]) -> None:
    assert parse_labels(text, CLASSES) == pytest.approx(shares)


def test_parse_labels_takes_names_that_hold_signs() -> None:
    assert parse_labels("a=1,b", ["a=1,b", "c"]) == (1.0, 0.0)
    assert parse_labels("a=b,c=3", ["a=b", "c"]) == (0.25, 0.75)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("nodul", "nearest of 3 is 'nodule'"),
        ("nodul=2", "nearest of 3 is 'nodule'"),
        ("", "Unknown class ''"),
        ("clear,clear", "twice"),
        ("clear=0", "positive"),
        ("clear=-1", "positive"),
        ("clear=nan", "positive"),
        ("clear=inf", "positive"),
        ("clear=much", "positive"),
    ],
)
def test_parse_labels_refuses(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_labels(text, CLASSES)


_SHARES = st.lists(st.integers(0, 50), min_size=1, max_size=9).filter(any)


@settings(deadline=None, derandomize=True)
@given(_SHARES, st.integers(1, 400))
def test_spread_labels_nearest_counts(weights: list[int], count: int) -> None:
    shares = [weight / sum(weights) for weight in weights]
    labels = spread_labels(shares, count)
    assert labels.dtype == torch.int64
    counts = Counter(labels.tolist())
    assert counts.total() == count
    for number, share in enumerate(shares):
        assert abs(counts[number] - share * count) < 1 + 1e-6


@settings(deadline=None, derandomize=True)
@given(_SHARES, st.integers(1, 400))
def test_spread_labels_mixed(weights: list[int], count: int) -> None:
    labels = spread_labels([weight / sum(weights) for weight in weights], count).numpy()
    for number in range(len(weights)):
        share = (labels == number).mean()
        seen = np.cumsum(labels == number)
        # Within one image of each class, whatever stretch from the start is looked at.
        assert np.abs(seen - share * np.arange(1, count + 1)).max() <= len(weights)


def test_spread_labels_cycles_when_the_shares_are_equal() -> None:
    assert spread_labels([1 / 3] * 3, 9).tolist() == [0, 1, 2] * 3


# --- files of images


def test_write_png_files_with_index_and_mark(tmp_path: Path) -> None:
    images = np.arange(4 * 16, dtype=np.uint8).reshape(4, 4, 4)
    write_images(tmp_path / "out", images, torch.tensor([0, 2, 0, 1]), CLASSES, "png")
    rows = list(csv.reader((tmp_path / "out" / "index.csv").read_text().splitlines()))
    assert rows == [
        ["file", "label"],
        ["clear/clear-000001.png", "clear"],
        ["mass/mass-000001.png", "mass"],
        ["clear/clear-000002.png", "clear"],
        ["nodule/nodule-000001.png", "nodule"],
    ]
    for (file, label), pixels in zip(rows[1:], images, strict=True):
        with Image.open(tmp_path / "out" / file) as image:
            np.testing.assert_array_equal(np.asarray(image), pixels)
            text: str = image.text["Description"]  # pyright: ignore[reportAttributeAccessIssue]
            assert text.startswith("fedmedgan: synthetic image")
            assert text.endswith(f"class: {label}")


def test_write_colour(tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (2, 4, 4, 3)).astype(np.uint8)
    write_images(tmp_path / "png", images, torch.tensor([0, 2]), CLASSES, "png")
    write_images(tmp_path / "npz", images, torch.tensor([0, 2]), CLASSES, "npz")
    for name, pixels in zip(("clear", "mass"), images, strict=True):
        with Image.open(tmp_path / "png" / name / f"{name}-000001.png") as image:
            assert image.mode == "RGB"
            np.testing.assert_array_equal(np.asarray(image), pixels)
    with np.load(tmp_path / "npz" / "samples.npz", allow_pickle=False) as archive:
        np.testing.assert_array_equal(archive["images"], images)


def test_write_npz_is_the_same_again_and_needs_no_pickle(tmp_path: Path) -> None:
    images, labels = np.full((2, 4, 4), 9, np.uint8), torch.tensor([1, 0])
    for name in ("a", "b"):
        write_images(tmp_path / name, images, labels, ("clair", "n\u00f3dulo"), "npz")
    assert (tmp_path / "a" / "samples.npz").read_bytes() == (tmp_path / "b" / "samples.npz").read_bytes()
    with np.load(tmp_path / "a" / "samples.npz", allow_pickle=False) as archive:
        assert sorted(archive) == ["classes", "images", "labels"]
        np.testing.assert_array_equal(archive["images"], images)
        assert archive["images"].dtype == np.uint8
        assert archive["labels"].dtype == np.int64
        assert archive["classes"].tolist() == ["clair", "n\u00f3dulo"]


@pytest.mark.parametrize("form", ["png", "npz"])
def test_write_images_refuses_a_folder_that_holds_some(tmp_path: Path, form: str) -> None:
    images, labels = np.zeros((1, 4, 4), np.uint8), torch.tensor([0])
    write_images(tmp_path, images, labels, CLASSES, form)  # pyright: ignore[reportArgumentType]
    with pytest.raises(StorageError, match="exists already"):
        write_images(tmp_path, images, labels, CLASSES, form)  # pyright: ignore[reportArgumentType]


def test_write_images_inside_the_folder(tmp_path: Path) -> None:
    classes = ("../../evil", "/etc/passwd", "..", "a/b", "\u80ba\x00")
    write_images(tmp_path / "in" / "out", np.zeros((5, 4, 4), np.uint8), torch.arange(5), classes, "png")
    assert [path.name for path in tmp_path.iterdir()] == ["in"]
    assert [path.name for path in (tmp_path / "in").iterdir()] == ["out"]
    assert len(list((tmp_path / "in" / "out").rglob("*.png"))) == 5


@settings(deadline=None, derandomize=True)
@given(st.lists(st.text(max_size=80), max_size=12))
def test_file_names_are_safe_and_different(classes: list[str]) -> None:
    names = file_names(classes)
    assert len({name.casefold() for name in names}) == len(classes)
    for name in names:
        assert name == Path(name).name
        assert name not in ("", ".", "..")
        assert "\x00" not in name
        assert len(name.encode()) <= 180


def test_generate_images_same_seed_same_images(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    _saved(tmp_path / "run")
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        out = generate_images(tmp_path / "run", tmp_path / name, 5, "nodule", seed, "npz")
        assert out == tmp_path / name
    first, second, other = ((tmp_path / name / "samples.npz").read_bytes() for name in "abc")
    assert first == second
    assert first != other
    with np.load(tmp_path / "a" / "samples.npz", allow_pickle=False) as archive:
        assert archive["labels"].tolist() == [1] * 5


@pytest.mark.parametrize(("form", "seed"), [("gif", 0), ("png", -1), ("png", 2**63)])
def test_generate_images_refuses(tmp_path: Path, form: str, seed: int) -> None:
    with pytest.raises(ConfigError, match="Expected --"):
        generate_images(tmp_path, tmp_path / "out", 1, "all", seed, form)
