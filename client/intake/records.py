"""What a scan finds, before any pixel is decoded. Out of scope: how each kind of source is read."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, final

from common.errors import ConfigError

ALL = "all"
"""The one class of every image when labels are switched off."""


@final
@dataclass(frozen=True, slots=True)
class Record:
    """One image that was found and not yet decoded. Its repr shows nothing.

    Attributes:
        path: The file.
        row: The image's place in an NPZ; None for a file of its own.
        patient: (issuer, id), together the unit of privacy; the issuer may be empty.
        label: The class name; None where the source gives none.
        site: The value of the site column or array; None where there is none.
    """

    path: Path = field(repr=False)
    row: int | None = field(repr=False)
    patient: tuple[str, str] = field(repr=False)
    label: str | None = field(repr=False)
    site: str | None = field(repr=False)


@final
@dataclass(frozen=True)
class Scan:
    """All images of a source and the count of what was refused, by reason. Its repr shows nothing."""

    records: tuple[Record, ...] = field(repr=False)
    refused: Mapping[str, int] = field(repr=False)


@final
@dataclass(frozen=True)
class LabelSource:
    """Where labels are: `auto`, `none`, a DICOM keyword (`tag`), a CSV column or NPZ array (`column`)."""

    kind: Literal["auto", "none", "tag", "column"]
    name: str = ""


def parse_label(text: str) -> LabelSource:
    """Read the value of `--label`.

    Raises:
        ConfigError: It has none of the four forms.

    >>> parse_label("column:finding").name
    'finding'
    """
    kind, _, name = text.partition(":")
    if text in ("auto", "none"):
        return LabelSource("auto" if text == "auto" else "none")
    if kind in ("tag", "column") and name.strip():
        return LabelSource("tag" if kind == "tag" else "column", name.strip())
    raise ConfigError(f"Expected --label auto, none, tag:KEYWORD or column:NAME, got {text!r}.")


def refuse_tag(label: LabelSource) -> None:
    """Say that a source without DICOM tags cannot take labels from one.

    Raises:
        ConfigError: The labels are asked of a tag.
    """
    if label.kind == "tag":
        raise ConfigError(f"--label tag:{label.name} reads DICOM, and this source is not DICOM. Use column:NAME.")
