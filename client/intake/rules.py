"""The rules by which a site's images are read: the `[intake]` table of site.toml. Out of scope: who may be used.

    [intake]
    frames = "all"             # of a file of several images: "middle" (default), "all", or n for every n-th
    window = 1                 # which of several stated windows, from 0 (default), or "percentile": none of them
    ct_window = "lung"         # CT in Hounsfield units, instead of what is stated; a name or [centre, width]
    percentiles = [0.5, 99.5]  # of one image's own values, where it states no window; [0, 100] is its full range
    workers = 2                # processes that decode; default: one for each core
    decode_seconds = 60        # longest time for one image
    max_file_mb = 256          # of a file, a member of an archive, a decompressed data set
    max_frames = 4096          # of one file

An image's pixels depend on that image and on these rules, never on another image.
"""

import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Literal, final

from pydantic import BaseModel, ConfigDict, Field, field_validator

CT_WINDOWS: Mapping[str, tuple[float, float]] = MappingProxyType(
    {
        "lung": (-600.0, 1500.0),
        "mediastinum": (40.0, 400.0),
        "abdomen": (60.0, 400.0),
        "bone": (400.0, 1800.0),
        "brain": (40.0, 80.0),
    }
)
"""Centre and width in Hounsfield units, as radiology departments commonly set them."""


@final
class IntakeRules(BaseModel):
    """How the images of a site are read; every image by the same rules.

    Guarantees:
        - strict: An unknown key, a wrong type or a value out of bounds is an error that names it.
        - middle_all_nth: `chosen` gives the middle frame, all, or every n-th from the first.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    frames: Literal["middle", "all"] | int = "middle"
    window: Literal["percentile"] | int = 0
    ct_window: str | tuple[float, float] | None = None
    percentiles: tuple[float, float] = (0.5, 99.5)
    workers: int | None = Field(default=None, ge=1, le=64, strict=True)
    decode_seconds: float = Field(default=60.0, gt=0, le=3600)
    max_file_mb: int = Field(default=256, ge=1, le=4096, strict=True)
    max_frames: int = Field(default=4096, ge=1, le=65536, strict=True)

    @field_validator("frames", "window", mode="before")
    @classmethod
    def _whole(cls, value: object) -> object:
        if isinstance(value, bool | float):
            raise ValueError(f"expected a name or a whole number, got {value!r}")
        return value

    @field_validator("frames")
    @classmethod
    def _nth(cls, value: str | int) -> str | int:
        if isinstance(value, int) and value < 2:
            raise ValueError(f'expected "middle", "all" or n >= 2 for every n-th frame, got {value}')
        return value

    @field_validator("window")
    @classmethod
    def _index(cls, value: str | int) -> str | int:
        if isinstance(value, int) and value < 0:
            raise ValueError(f'expected "percentile" or the number of a window, from 0, got {value}')
        return value

    @field_validator("ct_window")
    @classmethod
    def _known(cls, value: str | tuple[float, float] | None) -> str | tuple[float, float] | None:
        if isinstance(value, str) and value not in CT_WINDOWS:
            raise ValueError(f"expected one of {', '.join(CT_WINDOWS)} or [centre, width], got {value!r}")
        if isinstance(value, tuple) and value[1] < 1:
            raise ValueError(f"expected a width >= 1 HU, got {value[1]}")
        return value

    @field_validator("percentiles")
    @classmethod
    def _ordered(cls, value: tuple[float, float]) -> tuple[float, float]:
        if not 0 <= value[0] < value[1] <= 100:
            raise ValueError(f"expected 0 <= low < high <= 100, got {value[0]}, {value[1]}")
        return value

    @property
    def max_bytes(self) -> int:
        """Return the most bytes of one file, member or decompressed data set."""
        return self.max_file_mb * 1024**2

    def hounsfield_window(self) -> tuple[float, float] | None:
        """Return centre and width for CT, or None where CT is shown as it states."""
        return CT_WINDOWS[self.ct_window] if isinstance(self.ct_window, str) else self.ct_window

    def chosen(self, frames: int) -> range:
        """Return which of so many frames are read, from 0.

        >>> [*IntakeRules(frames=4).chosen(10)], [*IntakeRules().chosen(10)]
        ([0, 4, 8], [5])
        """
        if self.frames == "middle":
            return range(frames // 2, frames // 2 + 1)
        return range(0, frames, 1 if self.frames == "all" else math.floor(self.frames))
