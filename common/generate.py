"""The generator as a thing to keep and to draw from: images, sheets to look at, weights on disk, files of images.

Everything here is post-processing of what was released, so none of it costs privacy. Out of scope: training.
"""

import csv
import difflib
import hashlib
import io
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, final, get_args

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Int64, UInt8
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo
from pydantic import Field, ValidationError
from safetensors import SafetensorError
from safetensors.numpy import load as load_tensors
from safetensors.numpy import save as save_tensors
from torch import Tensor, nn

from common.config import Config, ImageConfig, ModelConfig, Section
from common.errors import ConfigError, ResumeError, StorageError, WireError
from common.files import make_folder, write_atomic
from common.models import build
from common.weights import check_arrays

Form = Literal["png", "npz"]
FORMS: tuple[Form, ...] = get_args(Form)
MAX_INFO_BYTES = 4 * 1024**2
MARK = "fedmedgan: synthetic image, drawn by a generator; not a recording of a patient"
"""What every PNG says of itself in its text chunk `Description`."""

_SHEET_SEED = 20_180_207
_COLUMNS = 8
_CELL_PX = 128
_GAP_PX = 4
_MAX_LABEL_PX = 160
_LABEL_FONT_PX = 15
_HEADER_BYTES = 65_536


@final
class GeneratorInfo(Section):
    """What generator.json says of the weights beside it."""

    version: Literal[1] = 1
    model: ModelConfig
    image: ImageConfig
    value_range: tuple[float, float] = (-1.0, 1.0)
    run_id: str
    config_digest: str
    rounds: int = Field(ge=0)
    epsilon_by_site: dict[str, float]
    delta: float
    sha256: str
    license: str | None = None


def draw(
    generator: nn.Module, labels: Int64[Tensor, " count"], latent_dim: int, rng: torch.Generator, batch: int = 256
) -> UInt8[np.ndarray, "count size size"]:
    """Draw one image for each label.

    Args:
        generator: Maps (latent, labels) to images in [-1, 1].
        labels: Class numbers, at least one.
        latent_dim: Length of a latent vector.
        rng: The only source of randomness.
        batch: Images computed at a time.

    Returns:
        Grey pixels from 0 (for -1) to 255 (for 1), rounded.

    Guarantees:
        - same_again: Equal weights, labels and generator states give equal images.
        - leaves_no_trace: The generator is in the same mode afterwards, and holds no gradients.
    """
    was_training = generator.training
    generator.eval()
    parts: list[npt.NDArray[np.uint8]] = []
    with torch.no_grad():
        for chunk in labels.split(batch):
            images = generator(torch.randn(len(chunk), latent_dim, generator=rng), chunk).squeeze(1)
            parts.append(((images + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).numpy())
    generator.train(was_training)
    return np.concatenate(parts)


def save_sheet(path: Path, generator: nn.Module, config: Config) -> None:
    """Write a PNG with eight images of each class, one row a class, its name at the left.

    Guarantees:
        - same_latents: Two sheets of one run show the same latents, so that only the weights differ.

    Raises:
        StorageError: The file could not be written.
    """
    classes = config.image.classes
    labels = torch.arange(len(classes)).repeat_interleave(_COLUMNS)
    images = draw(generator, labels, config.model.latent_dim, torch.Generator().manual_seed(_SHEET_SEED))
    margin, step = label_width(classes), _CELL_PX + _GAP_PX
    sheet = Image.new("L", (margin + _COLUMNS * step, len(classes) * step), 255)
    for number, pixels in enumerate(images):
        row, column = divmod(number, _COLUMNS)
        cell = Image.fromarray(pixels).resize((_CELL_PX, _CELL_PX), Image.Resampling.BICUBIC)
        sheet.paste(cell, (margin + column * step, row * step))
    for row, name in enumerate(classes):
        write_label(sheet, name, row * step, step)
    write_png(path, sheet)


def class_row(sheet: Image.Image, number: int, classes: Sequence[str]) -> Image.Image:
    """Cut one class's images, without its name, from a sheet of `save_sheet`."""
    height = sheet.height // len(classes)
    return sheet.crop((label_width(classes), number * height, sheet.width, (number + 1) * height))


def label_width(names: Sequence[str]) -> int:
    """Return the pixels that the longest of some names needs at the left of a sheet."""
    font = ImageFont.load_default(_LABEL_FONT_PX)
    return min(_MAX_LABEL_PX, 8 + math.ceil(max((font.getlength(name) for name in names), default=0)) + 8)


def write_label(sheet: Image.Image, name: str, top: int, height: int) -> None:
    """Write a row's name at the left of a sheet, cut to the margin."""
    font = ImageFont.load_default(_LABEL_FONT_PX)
    while len(name) > 1 and font.getlength(name) > _MAX_LABEL_PX - 16:
        name = name.rstrip("…")[:-1] + "…"
    ImageDraw.Draw(sheet).text((8, top + height // 2), name, fill=0, font=font, anchor="lm")


def write_png(path: Path, image: Image.Image, text: str = MARK) -> None:
    """Write a PNG that says in its text chunk what it is.

    Raises:
        StorageError: The file could not be written.
    """
    info = PngInfo()
    info.add_text("Software", "fedmedgan")
    info.add_text("Description", text)
    content = io.BytesIO()
    image.save(content, "PNG", pnginfo=info)
    write_atomic(path, content.getvalue())


def save_generator(
    folder: Path,
    generator: nn.Module,
    config: Config,
    run_id: str,
    rounds: int,
    epsilon_by_site: Mapping[str, float],
) -> GeneratorInfo:
    """Write generator.safetensors, and generator.json that says what is in it.

    Args:
        folder: A run folder.
        generator: The result.
        config: The run's configuration, with its classes.
        run_id: The run.
        rounds: Finished rounds, the warm-up not counted.
        epsilon_by_site: What each site reported as spent.

    Raises:
        StorageError: A file could not be written.
    """
    weights = {name: parameter.detach().numpy() for name, parameter in generator.named_parameters()}
    content = save_tensors({name: np.ascontiguousarray(array) for name, array in weights.items()})
    info = GeneratorInfo(
        model=config.model,
        image=config.image,
        run_id=run_id,
        config_digest=config.digest(),
        rounds=rounds,
        epsilon_by_site=dict(epsilon_by_site),
        delta=config.privacy.delta,
        sha256=hashlib.sha256(content).hexdigest(),
    )
    write_atomic(folder / "generator.safetensors", content)
    write_atomic(folder / "generator.json", info.model_dump_json(indent=2).encode())
    return info


def load_generator(folder: Path) -> tuple[nn.Module, GeneratorInfo]:
    """Load the generator that a run left.

    Raises:
        ResumeError: No generator stands in the folder.
        WireError: A file is damaged, too large, of another version, or the two do not belong together.

    Guarantees:
        - bounded: No more is read than the described model needs.
        - belongs: Weights whose SHA-256 is not the one in generator.json are refused.
    """
    info = load_info(folder)
    rng = torch.Generator().manual_seed(0)
    generator = build(info.model, info.image, len(info.image.classes), rng).generator
    expected = {name: tuple(parameter.shape) for name, parameter in generator.named_parameters()}
    limit = sum(4 * math.prod(shape) for shape in expected.values()) + _HEADER_BYTES
    content = _read_bounded(folder / "generator.safetensors", limit)
    if hashlib.sha256(content).hexdigest() != info.sha256:
        raise WireError(
            f"Expected generator.safetensors with the SHA-256 that generator.json in {folder} states, got another. "
            "Copy both files again from the run that made them."
        )
    arrays = _decode(content)
    check_arrays(arrays, expected)
    with torch.no_grad():
        for name, parameter in generator.named_parameters():
            parameter.copy_(torch.from_numpy(arrays[name].copy()))
    return generator, info


def load_info(folder: Path) -> GeneratorInfo:
    """Read generator.json.

    Raises:
        ResumeError: No generator stands in the folder.
        WireError: The file does not decode strictly.
    """
    content = _read_bounded(folder / "generator.json", MAX_INFO_BYTES)
    try:
        info = GeneratorInfo.model_validate_json(content)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "the file"
        raise WireError(
            f"generator.json in {folder} does not decode: {where}: {first['msg']}. "
            "Copy it again from the run that made it, or use the release that wrote it."
        ) from error
    if not info.image.classes:
        raise WireError(f"generator.json in {folder} names no classes. Copy it again from the run that made it.")
    return info


def generate_images(run: Path, out: Path, count: int, labels: str, seed: int, form: str) -> Path:
    """Draw images from a finished run into a new folder, and return that folder.

    Args:
        run: A run folder.
        out: Where the images go.
        count: How many, at least 1.
        labels: What `parse_labels` reads.
        seed: The same seed draws the same images.
        form: "png" or "npz".

    Raises:
        ConfigError: A label, the seed or the form is wrong.
        ResumeError: No generator stands in the run folder.
        WireError: The generator does not decode.
        StorageError: The images could not be written.
    """
    if form not in FORMS:
        raise ConfigError(f"Expected --format png or npz, got {form!r}.")
    if not 0 <= seed < 2**63:
        raise ConfigError(f"Expected --seed={seed} in [0, 2^63).")
    generator, info = load_generator(run)
    classes = info.image.classes
    wanted = spread_labels(parse_labels(labels, classes), count)
    images = draw(generator, wanted, info.model.latent_dim, torch.Generator().manual_seed(seed))
    write_images(out, images, wanted, classes, form)
    return out


def parse_labels(text: str, classes: Sequence[str]) -> tuple[float, ...]:
    """Read which classes are wanted: "all", a name, "nodule,clear", or weights "clear=0.2,nodule=0.8".

    Returns:
        The share of each class; the shares add up to 1.

    Raises:
        ConfigError: A class is unknown (the nearest is named) or named twice, or a weight is no positive number.

    >>> parse_labels("clear=1,nodule=3", ["clear", "nodule", "mass"])
    (0.25, 0.75, 0.0)
    """
    if text == "all":
        return (1 / len(classes),) * len(classes)
    parts = [text] if text in classes else [part.strip() for part in text.split(",")]
    weights: dict[str, float] = {}
    for part in parts:
        name, equals, weight = (part, "", "") if part in classes else part.rpartition("=")
        name = name.strip() if equals else part
        if name not in classes:
            near = difflib.get_close_matches(name, classes, n=1, cutoff=0.0)[0]
            raise ConfigError(f"Unknown class {name!r} in --labels. The nearest of {len(classes)} is {near!r}.")
        if name in weights:
            raise ConfigError(f"Class {name!r} stands twice in --labels. Name each class once.")
        weights[name] = _weight(weight, name) if equals else 1.0
    total = sum(weights.values())
    return tuple(weights.get(name, 0.0) / total for name in classes)


def spread_labels(shares: Sequence[float], count: int) -> Int64[Tensor, " count"]:
    """Spread class numbers evenly over `count` images.

    Args:
        shares: The share of each class, adding up to 1.
        count: How many images.

    Guarantees:
        - nearest_counts: Each class gets its share of the count, rounded up or down.
        - mixed: Every stretch of the labels holds the classes about in their shares.
    """
    exact = np.asarray(shares) * count
    counts = np.floor(exact + 1e-9).astype(np.int64)
    left = np.argsort(counts - exact, kind="stable")[: count - counts.sum()]
    counts[left] += 1
    places = np.concatenate([(np.arange(number) + 0.5) / number for number in counts if number] or [np.empty(0)])
    labels = np.repeat(np.arange(len(counts)), counts)
    return torch.from_numpy(labels[np.argsort(places, kind="stable")])


def write_images(
    folder: Path,
    images: UInt8[np.ndarray, "count size size"],
    labels: Int64[Tensor, " count"],
    classes: Sequence[str],
    form: Form,
) -> None:
    """Write images as CLASS/CLASS-000001.png with index.csv (written last), or as one samples.npz.

    Args:
        folder: Made when it does not exist.
        images: Grey pixels.
        labels: Their class numbers.
        classes: Names in the order of their numbers.
        form: "png" marks every image as synthetic in its text chunk; "npz" holds `images`, `labels` and `classes`.

    Raises:
        StorageError: The folder holds images of an earlier call, or a file could not be written.

    Guarantees:
        - inside_the_folder: No class name leads to a file outside the folder.
    """
    target = make_folder(folder) / ("index.csv" if form == "png" else "samples.npz")
    if target.exists():
        raise StorageError(f"{target} exists already. Choose another folder, or delete this one.")
    if form == "png":
        write_atomic(target, _write_pngs(folder, images, labels, classes).encode())
        return
    content = io.BytesIO()
    np.savez_compressed(content, images=images, labels=labels.numpy(), classes=np.array(classes))
    write_atomic(target, content.getvalue())


def file_names(classes: Sequence[str]) -> tuple[str, ...]:
    """Turn class names into names that are safe as files and folders, all different even where case does not count."""
    names = [re.sub(r"[^\w.-]+", "_", name).strip("._")[:40] for name in classes]
    if all(names) and len({name.casefold() for name in names}) == len(names):
        return tuple(names)
    return tuple(f"{number:02d}-{name or 'class'}" for number, name in enumerate(names))


def _write_pngs(
    folder: Path, images: npt.NDArray[np.uint8], labels: Int64[Tensor, " count"], classes: Sequence[str]
) -> str:
    names = file_names(classes)
    index = io.StringIO()
    rows = csv.writer(index, lineterminator="\n")
    rows.writerow(("file", "label"))
    written = [0] * len(classes)
    for pixels, label in zip(images, labels.tolist(), strict=True):
        written[label] += 1
        file = make_folder(folder / names[label]) / f"{names[label]}-{written[label]:06d}.png"
        write_png(file, Image.fromarray(pixels), f"{MARK}; class: {classes[label]}")
        rows.writerow((file.relative_to(folder).as_posix(), classes[label]))
    return index.getvalue()


def _weight(text: str, name: str) -> float:
    try:
        weight = float(text)
    except ValueError:
        weight = math.nan
    if not 0 < weight < math.inf:
        raise ConfigError(f"Expected a positive number for class {name!r} in --labels, got {text!r}.")
    return weight


def _read_bounded(path: Path, limit: int) -> bytes:
    try:
        with path.open("rb") as handle:
            content = handle.read(limit + 1)
    except OSError as error:
        raise ResumeError(
            f"No generator stands in {path.parent} ({path.name}: {error.strerror}). "
            "Name the folder of a finished run, or finish the run with --resume."
        ) from error
    if len(content) > limit:
        raise WireError(f"Expected {path.name} of at most {limit} bytes, got more. Copy it again from its run.")
    return content


def _decode(content: bytes) -> dict[str, npt.NDArray[Any]]:
    try:
        return load_tensors(content)
    except (SafetensorError, ValueError, KeyError, TypeError) as error:
        raise WireError(
            f"generator.safetensors does not decode ({type(error).__name__}). Copy it again from the run that made it."
        ) from error
