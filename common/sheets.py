"""Sheets of images to look at, as PNG. Out of scope: where the images come from (common/artefact)."""

import io
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from jaxtyping import UInt8
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo
from torch import nn

from common.artefact import draw
from common.config import Config
from common.files import write_atomic

MARK = "fedmedgan: synthetic image, drawn by a generator; not a recording of a patient"
"""What every PNG says of itself in its text chunk `Description`."""

_SHEET_SEED = 20_180_207
COLUMNS = 8
_CELL_PX = 128
_GAP_PX = 4
_MAX_LABEL_PX = 160
_LABEL_FONT_PX = 15


def save_sheet(path: Path, generator: nn.Module, config: Config) -> None:
    """Write a PNG with eight images of each class, one row a class, its name at the left.

    Guarantees:
        - same_latents: Two sheets of one run show the same latents, so that only the weights differ.

    Raises:
        StorageError: The file could not be written.
    """
    classes = config.image.classes
    labels = torch.arange(len(classes)).repeat_interleave(COLUMNS)
    images = draw(generator, labels, config.model.latent_dim, torch.Generator().manual_seed(_SHEET_SEED))
    save_rows(path, classes, images.reshape(len(classes), COLUMNS, *images.shape[1:]))


def save_rows(path: Path, names: Sequence[str], rows: UInt8[np.ndarray, "rows columns size size *colours"]) -> None:
    """Write a PNG of rows of images, each row's name at its left.

    Raises:
        StorageError: The file could not be written.
    """
    margin, step = label_width(names), _CELL_PX + _GAP_PX
    cells = [[Image.fromarray(pixels) for pixels in row] for row in rows]
    sheet = Image.new(cells[0][0].mode, (margin + rows.shape[1] * step, len(names) * step), "white")
    for top, (name, row) in enumerate(zip(names, cells, strict=True)):
        for column, image in enumerate(row):
            cell = image.resize((_CELL_PX, _CELL_PX), Image.Resampling.BICUBIC)
            sheet.paste(cell, (margin + column * step, top * step))
        write_label(sheet, name, top * step, step)
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
    ImageDraw.Draw(sheet).text((8, top + height // 2), name, fill="black", font=font, anchor="lm")


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
