"""Labels by rules: a TOML file of the site says which words in which DICOM attribute mean which class.

    [[label]]
    class = "effusion"
    tag = "StudyDescription"       # a DICOM keyword
    matches = "(?i)effusion"       # a regular expression that is searched in the value

    [[label]]
    class = "other"                # without tag and matches: every image that no rule above took

The first rule that matches gives the class; an image that none matches has no label. Out of scope: how a header is
read (client/intake/headers).
"""

import re
import tomllib
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Annotated, TypeVar, final

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, model_validator

from common.errors import ConfigError
from common.files import read_bounded
from common.wording import wrong_values

MAX_RULES_BYTES = 1024**2

Rules = TypeVar("Rules", bound=BaseModel)
_MAX_SEARCHED = 1024
"""Characters of a value that an expression is tried on. That does not bound its time: one with nested repetitions takes
twice as long for each character more, so that rules are applied in the decoders' processes, which have a time limit."""


@final
class LabelRule(BaseModel):
    """One rule; without tag and expression it takes every image."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    name: Annotated[str, Field(alias="class", min_length=1, max_length=64)]
    tag: str = ""
    matches: str = ""

    @model_validator(mode="after")
    def _both_or_none(self) -> "LabelRule":
        if bool(self.tag) != bool(self.matches):
            raise ValueError("expected both tag and matches, or neither")
        try:
            re.compile(self.matches)
        except (re.error, RecursionError) as error:
            raise ValueError(f"matches is no regular expression: {error}") from error
        return self

    def takes(self, values: Mapping[str, str]) -> bool:
        """Return whether a header with these values has this class."""
        return not self.tag or re.search(self.matches, values.get(self.tag, "")[:_MAX_SEARCHED]) is not None


@final
class LabelRules(BaseModel):
    """The rules of a file, in its order.

    Guarantees:
        - first_match: The first rule that takes an image gives its class; none: it has no label.
        - strict_labels: An unknown key, half a rule or a broken expression is an error.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    label: Annotated[list[LabelRule], Field(min_length=1, max_length=1000)]

    def tags(self) -> tuple[str, ...]:
        """Return the DICOM keywords that are looked at."""
        return tuple(dict.fromkeys(rule.tag for rule in self.label if rule.tag))

    def class_of(self, values: Mapping[str, str]) -> str | None:
        """Return the class of a header with these values."""
        return next((rule.name for rule in self.label if rule.takes(values)), None)


@final
class TagLabel(BaseModel):
    """Labels that are the values of one attribute, by its DICOM keyword; without one, none."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    tag: str

    def tags(self) -> tuple[str, ...]:
        """Return the DICOM keywords that are looked at."""
        return (self.tag,) if self.tag else ()

    def class_of(self, values: Mapping[str, str]) -> str | None:
        """Return the label of a header with these values."""
        return values.get(self.tag) or None


Labelling = LabelRules | TagLabel
"""What gives a header its label."""
_LABELLING: TypeAdapter[Labelling] = TypeAdapter(Labelling)


@lru_cache(maxsize=2)
def parse_labelling(text: str) -> Labelling:
    """Read the JSON of a labelling, as `model_dump_json(by_alias=True)` writes it."""
    return _LABELLING.validate_json(text)


def read_label_rules(path: Path) -> LabelRules:
    """Read a file of rules.

    Raises:
        ConfigError: It is not TOML, or a rule in it is wrong.
        StorageError, WireError: It cannot be read, or is too long.
    """
    return read_rule_file(path, LabelRules, "rules of labels")


def read_rule_file(path: Path, form: type[Rules], what: str) -> Rules:
    """Read a TOML file strictly.

    Raises:
        ConfigError: It is not TOML, or not of this form; the message says where.
        StorageError, WireError: It cannot be read, or is too long.
    """
    try:
        return form.model_validate(tomllib.loads(read_bounded(path, MAX_RULES_BYTES).decode()))
    except ValidationError as error:
        raise ConfigError(f"Expected other {what} in {path}: {wrong_values(error.errors())}.") from error
    except ValueError as error:  # TOMLDecodeError and UnicodeDecodeError
        raise ConfigError(f"{path} is not TOML: {error}.") from error
