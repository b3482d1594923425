"""What a source has sent so far, so that a half-finished pull goes on. Holds keyed names and counts, no identifier.

The name of a series is another one in each inbox: what one inbox has received is not taken for here in another.
"""

import json
import time
from pathlib import Path
from typing import Final, final

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from common.errors import FedmedganError, StorageError
from common.files import make_folder, read_bounded, write_atomic

VERSION: Final = 1
MAX_STATE_BYTES: Final = 256 << 20
SAVE_EVERY_S: Final = 2.0
"""Between two writes of the file. What is lost by a crash is seen by the files in the inbox."""


@final
class Count(BaseModel):
    """How much of a series is here."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    expected: int = Field(ge=0)
    received: int = Field(ge=0)

    @property
    def whole(self) -> bool:
        """Return whether all of it is here; nothing is never all of a series."""
        return self.received >= self.expected > 0


@final
class _File(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    version: int
    series: dict[str, Count]


@final
class State:
    """The series of one source by keyed name; written at most every `SAVE_EVERY_S`, and by `save`."""

    def __init__(self, path: Path) -> None:
        """Read the file, or begin without.

        Raises:
            StorageError: It cannot be read, is damaged, or another release wrote it.
        """
        make_folder(path.parent, 0o700)
        self._path, self._saved = path, time.monotonic()
        self._series = _read(path) if path.exists() else {}

    def is_whole(self, series: str, stated: int) -> bool:
        """Return whether all of a series came before, so that it need not be asked for again.

        Args:
            series: The series' keyed name.
            stated: How many instances the archive has now.
        """
        count = self._series.get(series)
        return count is not None and count.whole and count.expected == stated

    def count(self, series: str) -> Count | None:
        """Return what is known of a series."""
        return self._series.get(series)

    def put(self, series: str, count: Count) -> None:
        """Note how much of a series is here.

        Raises:
            StorageError: The disk is full.
        """
        self._series[series] = count
        if time.monotonic() - self._saved >= SAVE_EVERY_S:
            self.save()

    def save(self) -> None:
        """Write the file.

        Raises:
            StorageError: The disk is full.

        Guarantees:
            - old_or_new: After a crash the file is the one before or this one, whole.
        """
        content = _File(version=VERSION, series=self._series).model_dump_json(indent=None)
        write_atomic(self._path, content.encode() + b"\n", 0o600)
        self._saved = time.monotonic()


def _read(path: Path) -> dict[str, Count]:
    try:
        values = json.loads(read_bounded(path, MAX_STATE_BYTES))
        if isinstance(values, dict) and values.get("version") != VERSION:
            raise StorageError(
                f"Expected version {VERSION} in {path}: another release wrote it. Use that one, or remove the file: "
                "what stands in the inbox is not asked for again."
            )
        return dict(_File.model_validate(values).series)
    except StorageError:
        raise
    except (ValueError, ValidationError, RecursionError, FedmedganError):
        raise StorageError(f"{path} is damaged. Remove it: what stands in the inbox is not asked for again.") from None
