"""The command `generate`: which images are wanted, drawn and written as PNG or NPZ."""

import csv
import difflib
import io
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal, get_args

import numpy as np
import numpy.typing as npt
import torch
import typer
from jaxtyping import Int64, UInt8
from PIL import Image
from torch import Tensor

from common import generate_options as options
from common.artefact import draw, load_generator
from common.errors import ConfigError, StorageError
from common.files import make_folder, write_atomic
from common.sheets import MARK, write_png

Form = Literal["png", "npz"]
FORMS: tuple[Form, ...] = get_args(Form)


def generate(
    run: Annotated[Path, typer.Argument(help="A finished run folder.")],
    out: options.Out,
    count: options.Count = 64,
    labels: options.Labels = "all",
    seed: options.Seed = 0,
    format: options.Form = "png",
) -> None:
    """Draw synthetic images from a finished run."""
    written = generate_images(run, out, count, labels, seed, format)
    print(f"{count} synthetic images in {written}")


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
    images: UInt8[np.ndarray, "count size size *colours"],
    labels: Int64[Tensor, " count"],
    classes: Sequence[str],
    form: Form,
) -> None:
    """Write images as CLASS/CLASS-000001.png with index.csv (written last), or as one samples.npz.

    Args:
        folder: Made when it does not exist.
        images: Pixels, grey or in colour, as `draw` gives them.
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
