"""The configuration as text: TOML in a file, JSON in a message, and errors that a person understands.

Out of scope: what the keys mean and what may stand in them (common/config).
"""

import difflib
import json
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from pydantic import BaseModel, ValidationError

from common.config import MAX_ERRORS, MAX_PROPOSAL_BYTES, Config, Proposal, Section
from common.errors import ConfigError, StorageError


def read_config(path: Path) -> dict[str, Any]:
    """Read a TOML file into a tree of plain values; checking is `build_config`'s work.

    Raises:
        ConfigError: It is not TOML.
        StorageError: The file is missing or unreadable.

    """
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise StorageError(f"Could not read {path}: {error.strerror}. Name another file.") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"{path} is not TOML: {error}. `fedmedgan-simulate --print-config` shows the form."
        ) from error


def build_config(tree: dict[str, Any], changes: dict[str, Any] | None = None) -> Config:
    """Check a tree of plain values and freeze it.

    Args:
        tree: Sections with their keys, as read from TOML.
        changes: Values by dotted key ("privacy.epsilon"), as the flags give; they win over the tree.

    Raises:
        ConfigError: A key is unknown (the nearest is named) or a value is out of bounds.

    >>> build_config({"privacy": {"epsilon": 3.0}}, {"federation.rounds": 2}).federation.rounds
    2

    """
    try:
        return Config.model_validate(with_changes(tree, changes or {}))
    except ValidationError as error:
        raise ConfigError(_explain(error)) from error


def with_changes(tree: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Return a copy of a tree in which values by dotted key stand too; checking is `build_config`'s work.

    Raises:
        ConfigError: A section is no table.
    """
    merged = {name: dict(value) if isinstance(value, dict) else value for name, value in tree.items()}
    for key, value in changes.items():
        section, _, name = key.partition(".")
        if not isinstance(merged.setdefault(section, {}), dict):
            raise ConfigError(f"Expected {section} as a table of keys, got {merged[section]!r}. Write [{section}].")
        merged[section][name] = value
    return merged


def parse_changes(texts: Sequence[str]) -> dict[str, Any]:
    """Read the texts of `--set`: a dotted key, =, and a TOML value, or a text that needs no quotes.

    Raises:
        ConfigError: One of them has no dotted key or no value.

    >>> parse_changes(["simulation.sites=20", "simulation.partition=iid"])
    {'simulation.sites': 20, 'simulation.partition': 'iid'}

    """
    changes: dict[str, Any] = {}
    for text in texts:
        key, _, value = (part.strip() for part in text.partition("="))
        if "." not in key or not value:
            raise ConfigError(f"Expected --set SECTION.KEY=VALUE, as in --set simulation.sites=20, got {text!r}.")
        try:
            changes[key] = tomllib.loads(f"value = {value}")["value"]
        except tomllib.TOMLDecodeError:
            changes[key] = value
    return changes


def parse_proposal(text: str) -> Proposal:
    """Check a proposal that came over the wire.

    Raises:
        ConfigError: It is too long, not JSON, has unknown keys or values out of bounds.

    """
    if len(text) > MAX_PROPOSAL_BYTES:
        raise ConfigError(f"Expected a proposal of at most {MAX_PROPOSAL_BYTES} characters, got {len(text)}.")
    try:
        return Proposal.model_validate_json(text)
    except ValidationError as error:
        raise ConfigError(_explain(error)) from error


def known_keys() -> tuple[str, ...]:
    """Return every dotted key of the tree, sorted."""
    return tuple(sorted(f"{name}.{key}" for name, section in _sections().items() for key in section.model_fields))


def to_toml(config: Config) -> str:
    """Write the whole effective configuration as TOML that `read_config` reads back."""
    lines: list[str] = []
    for name in Config.model_fields:
        lines.append(f"[{name}]")
        values = getattr(config, name).model_dump(mode="json")
        lines += [f"{key} = {json.dumps(value, ensure_ascii=False)}" for key, value in values.items()]
        lines.append("")
    return "\n".join(lines)


def _sections() -> dict[str, type[Section]]:
    return {name: cast("type[Section]", info.annotation) for name, info in Config.model_fields.items()}


def _printable(text: str) -> str:
    return "".join(character if character.isprintable() else "?" for character in text[:100])


def _explain(error: ValidationError) -> str:
    told = error.errors()[:MAX_ERRORS]
    return "\n".join(_explain_one([str(part) for part in item["loc"]], dict(item)) for item in told)


def _explain_one(location: list[str], item: dict[str, Any]) -> str:
    key = ".".join(location[:2]) or "configuration"
    if item["type"] == "extra_forbidden":
        choices = known_keys() if len(location) > 1 else tuple(_sections())
        near = difflib.get_close_matches(key, choices, n=1, cutoff=0.0)
        nearest = f"The nearest known key is {near[0]}; `fedmedgan-simulate --print-config` lists all."
        return f"Unknown key {_printable(key)}. {nearest}"
    message = item["msg"].removeprefix("Value error, ")
    given = "" if isinstance(item.get("input"), dict | BaseModel) else f"={item.get('input')!r}"
    return f"Expected another value for {key}{given}: {message[:1].lower()}{message[1:]}."
