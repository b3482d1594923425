"""The table `[quality]`: seeds, baselines, who is held out, and variants of the run that become rows beside it.

Out of scope: running and judging them (simulations/benchmark/quality).
"""

import json
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, final

from pydantic import Field, ValidationError, field_validator

from common.config import Config, Proposal, Section
from common.config_text import build_config, known_keys
from common.errors import ConfigError

BASE = "federation"
"""The row of the run without changes."""

SINGLE_SITES = ("single-site mean", "single-site best")
CENTRALISED = "centralised"
"""The row of one holder of all patients: no federation."""
_OF_THE_SITES = frozenset(
    {"simulation.missing_share", "simulation.poor_site_budget", "simulation.one_class_site", "simulation.start"}
)
"""What a variant may change of `[simulation]`: the faults, and what the generator learned before."""
_NAMES_IN_USE = frozenset({"real", "warmup only", BASE, CENTRALISED, *SINGLE_SITES})

Seed = Annotated[int, Field(ge=0, lt=2**63)]


@final
class QualityConfig(Section):
    """The table `[quality]` of a configuration for this benchmark; it never reaches the run."""

    seeds: Annotated[tuple[Seed, ...], Field(min_length=1)] = (0, 1, 2)
    baselines: tuple[Literal["real", "centralised", "single-site"], ...] = ("real", "centralised", "single-site")
    test: Literal["holdout", "x_test"] = "holdout"
    """Held-out patients: those of simulation.holdout, or the NPZ's own `x_test` with `y_test` (each a person)."""
    variants: Mapping[str, Mapping[str, Any]] = {}
    """Changes by dotted key, by the name of the row that they give."""

    @field_validator("seeds")
    @classmethod
    def _each_once(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        if len(set(value)) < len(value):
            raise ValueError("expected seeds that differ, for equal ones give equal figures")
        return value

    @field_validator("variants")
    @classmethod
    def _rows_of_one_table(cls, value: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
        """Write nested tables as dotted keys, and refuse what would make a row that compares with no other."""
        variants = {name: _dotted(changes) for name, changes in value.items()}
        for name, changes in variants.items():
            if name in _NAMES_IN_USE or not name.isprintable() or not name.strip():
                raise ValueError(f"variant {name!r} needs another name: a printable one that no other row has")
            if not changes:
                raise ValueError(f'variant {name!r} changes nothing; give it a key, as in "train.ema_decay" = 0.0')
            fixed = [key for key in changes if key in known_keys() and not _may_vary(key)]
            if fixed:
                raise ValueError(
                    f"variant {name!r} changes {fixed[0]}, but all rows have the same patients, images and seeds; "
                    f"of [simulation] it may change {', '.join(sorted(_OF_THE_SITES))}. Use --set for others"
                )
        return variants


def split_settings(tree: Mapping[str, Any]) -> tuple[QualityConfig, dict[str, Any]]:
    """Take the table `[quality]` out of a configuration.

    Raises:
        ConfigError: A key of it is unknown or a value out of bounds.
    """
    rest = dict(tree)
    try:
        return QualityConfig.model_validate(rest.pop("quality", {})), rest
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(["quality", *map(str, first["loc"])])
        given = "" if isinstance(first.get("input"), dict) else f"={first.get('input')!r}"
        raise ConfigError(
            f"Expected another {key}{given}: {first['msg'].removeprefix('Value error, ')}. "
            f"Known keys of [quality]: {', '.join(QualityConfig.model_fields)}."
        ) from error


def configurations(tree: dict[str, Any], settings: QualityConfig, changes: Mapping[str, Any]) -> dict[str, Config]:
    """Build the configuration of the run and of each variant, by the name of the row.

    Args:
        tree: The file without `[quality]`.
        settings: From `[quality]`.
        changes: By dotted key, of all rows alike; a variant's own win over them.

    Raises:
        ConfigError: A key is unknown (the nearest is named) or a value wrong; the variant is named.
    """
    configs = {BASE: build_config(tree, dict(changes))}
    for name, of_variant in settings.variants.items():
        try:
            configs[name] = build_config(tree, {**changes, **of_variant})
        except ConfigError as error:
            raise ConfigError(f"[quality.variants.{json.dumps(name, ensure_ascii=False)}]: {error}") from error
    return configs


def row_names(settings: QualityConfig, configs: Mapping[str, Config]) -> Sequence[str]:
    """Return the rows of one seed in the order in which they are made."""
    config = configs[BASE]
    names = ["real"] if "real" in settings.baselines else []
    names += ["warmup only"] if config.warmup.share > 0 else []
    names += configs
    if config.simulation.sites > 1:
        names += [CENTRALISED] if CENTRALISED in settings.baselines else []
        names += SINGLE_SITES if "single-site" in settings.baselines else ()
    return names


def _may_vary(key: str) -> bool:
    section, _, _ = key.partition(".")
    return key in _OF_THE_SITES or (
        section in Proposal.model_fields and section != "image" and key != "federation.seed"
    )


def _dotted(changes: Mapping[str, Any]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in changes.items():
        flat |= (
            {f"{key}.{name}": inner for name, inner in value.items()} if isinstance(value, Mapping) else {key: value}
        )
    return flat
