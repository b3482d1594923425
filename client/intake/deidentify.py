"""Text in pictures: which images may show who the patient is, and which parts of an image are made black.

A header can say that text is burned in and cannot prove that none is. So what often carries text is refused unless the
privacy officer allows it: images that say so, secondary captures and screen saves, ultrasound.

Parts are made black by rules in the style of RSNA CTP, a TOML file of the site:

    [[blank]]
    modality = "US"                  # as it stands in the header; every condition of a rule has to hold
    manufacturer = "acme"            # a part of it; capitals do not count
    model = "scan 3"                 # likewise
    rows = 480                       # of the image
    columns = 640
    regions = [[0, 0, 640, 40]]      # left, top, width, height in pixels of the image

Every rule that fits an image is applied. Source: DICOM PS3.3 C.7.6.1.1.1 (Image Type), C.8.6.1 (Conversion Type).
Out of scope: finding text (client/intake/screening).
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, final

from pydantic import BaseModel, ConfigDict, Field, model_validator

from client.intake.labels import read_rule_file
from client.intake.records import Record, Region
from client.intake.refusals import Reason
from client.policy import Doubtful

_SECONDARY_CAPTURE = "1.2.840.10008.5.1.4.1.1.7"
_ULTRASOUND = ("1.2.840.10008.5.1.4.1.1.3", "1.2.840.10008.5.1.4.1.1.6")
_SCREEN = ("SCREEN SAVE", "SCREENSAVE", "SCREENSHOT", "SCREEN SHOT", "SCREEN CAPTURE")
_REASONS = {
    "burned-in": Reason.BURNED_IN,
    "secondary-capture": Reason.SECONDARY_CAPTURE,
    "ultrasound": Reason.ULTRASOUND,
}

_Pixel = Annotated[int, Field(ge=0, le=65_535)]
_Length = Annotated[int, Field(ge=1, le=65_535)]


@final
class BlankRule(BaseModel):
    """Which images, and which parts of them."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    modality: str = ""
    manufacturer: str = ""
    model: str = ""
    rows: _Length | None = None
    columns: _Length | None = None
    regions: Annotated[list[Annotated[list[_Pixel], Field(min_length=4, max_length=4)]], Field(min_length=1)]

    @model_validator(mode="after")
    def _some_condition(self) -> "BlankRule":
        if not (self.modality or self.manufacturer or self.model or self.rows or self.columns):
            raise ValueError("expected a condition: modality, manufacturer, model, rows or columns")
        if any(width < 1 or height < 1 for _, _, width, height in self.regions):
            raise ValueError("expected regions as [left, top, width, height] of a pixel or more")
        return self

    def fits(self, record: Record) -> bool:
        """Return whether an image is one of these."""
        header = record.header
        return (
            self.modality.upper() in ("", header.get("Modality", "").upper())
            and self.manufacturer.casefold() in header.get("Manufacturer", "").casefold()
            and self.model.casefold() in header.get("ManufacturerModelName", "").casefold()
            and (self.rows is None or str(self.rows) == header.get("Rows"))
            and (self.columns is None or str(self.columns) == header.get("Columns"))
        )


@final
class BlankRules(BaseModel):
    """The rules of a file.

    Guarantees:
        - all_that_fit: The regions of every rule that fits are made black.
        - strict_regions: An unknown key, a rule without condition or a region that is none is an error.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    blank: list[BlankRule] = []

    def regions(self, record: Record) -> tuple[Region, ...]:
        """Return the parts of an image to make black."""
        found = [region for rule in self.blank if rule.fits(record) for region in rule.regions]
        return tuple((left, top, width, height) for left, top, width, height in found)


def read_blank_rules(path: Path) -> BlankRules:
    """Read a file of rules.

    Raises:
        ConfigError: It is not TOML, or a rule in it is wrong.
        StorageError, WireError: It cannot be read, or is too long.
    """
    return read_rule_file(path, BlankRules, "rules of regions")


def doubt(record: Record, allowed: tuple[Doubtful, ...]) -> Reason | None:
    """Return why an image may show text about the patient, unless that kind is allowed.

    Guarantees:
        - doubtful_is_refused: Each kind, by any one value of an attribute, is refused by default and used where it is
          allowed.
    """
    header = record.header
    image_type = header.get("ImageType", "").upper()
    kinds = {
        "burned-in": "YES" in _values(header, "BurnedInAnnotation"),
        "secondary-capture": _is(header, _SECONDARY_CAPTURE)
        or "ConversionType" in header
        or any(name in image_type.replace("_", " ") for name in _SCREEN),
        "ultrasound": bool({"US", "IVUS"} & _values(header, "Modality")) or _is(header, *_ULTRASOUND),
    }
    return next((_REASONS[kind] for kind, found in kinds.items() if found and kind not in allowed), None)


def _values(header: Mapping[str, str], keyword: str) -> set[str]:
    """Return the values of an attribute, which may state several where it should state one."""
    return {value.strip() for value in header.get(keyword, "").upper().split("\\")}


def _is(header: Mapping[str, str], *families: str) -> bool:
    return any(f"{sop}.".startswith(f"{family}.") for sop in _values(header, "SOPClassUID") for family in families)
