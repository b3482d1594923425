"""What the site allows: `policy.toml`, written by the privacy officer. The coordinator proposes, this disposes.

Out of scope: what is spent already (client/ledger).
"""

import difflib
import json
import tomllib
from pathlib import Path
from typing import Annotated, Literal, final

from pydantic import Field, StringConstraints, ValidationError, model_validator

from common.config import Positive, Proposal, Section
from common.errors import ConfigError, PolicyRefusal, RefusalCode
from common.files import write_atomic
from common.privacy import Plan

SITE_NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$"
MAX_POLICY_BYTES = 65_536


@final
class Policy(Section):
    """The bounds of one site for one data set."""

    version: Literal[1] = 1
    site: Annotated[str, StringConstraints(pattern=SITE_NAME)]
    """The public name of the site."""
    declared_patients: Annotated[int, Field(ge=2)]
    """The cohort size that the site makes public: rounded, never the exact count."""
    max_epsilon: Positive
    """Bound on everything ever charged to this data set."""
    delta: Annotated[float, Field(gt=0, lt=1)]
    """Should be well below one over the declared patients (`fedmedgan-site init` warns)."""
    min_noise_multiplier: Positive = 0.3
    """Least noise of a private step or of the warm-up, in clip norms."""
    min_patients: Annotated[int, Field(ge=2)] = 20
    """Fewer declared patients than this take no part."""
    max_rounds: Annotated[int, Field(ge=0)] = 1000
    max_steps_per_round: Annotated[int, Field(ge=1)] = 1000
    """Bounds the time that one request takes."""
    min_grad_norm: Positive = 1e-3
    max_grad_norm: Positive = 100.0
    """Range of the clip norm: no matter of privacy, but nonsense outside it."""
    allowed_models: tuple[Literal["mlp", "dcgan"], ...] = ("mlp", "dcgan")

    @model_validator(mode="after")
    def _pairs_that_cannot_both_hold(self) -> "Policy":
        if self.min_grad_norm > self.max_grad_norm:
            raise ValueError(f"min_grad_norm = {self.min_grad_norm:g} exceeds max_grad_norm = {self.max_grad_norm:g}")
        return self


def load(path: Path) -> Policy:
    """Read a site's policy.

    Raises:
        ConfigError: It is missing, too long or not TOML, has an unknown key (the nearest is named) or a bad value.
    """
    try:
        with path.open("rb") as handle:
            content = handle.read(MAX_POLICY_BYTES + 1)
        if len(content) > MAX_POLICY_BYTES:
            raise ConfigError(f"Expected {path} of at most {MAX_POLICY_BYTES} bytes. Make it anew with `init`.")
        return Policy.model_validate(tomllib.loads(content.decode()))
    except OSError as error:
        raise ConfigError(
            f"Could not read the policy {path}: {error.strerror}. `fedmedgan-site init` makes one."
        ) from error
    except ValidationError as error:
        raise ConfigError("\n".join(_explain(path, *_first(item)) for item in map(dict, error.errors()))) from error
    except ValueError as error:  # TOMLDecodeError and UnicodeDecodeError
        raise ConfigError(f"{path} is not TOML: {error}. `fedmedgan-site init` makes a new one.") from error


def save(path: Path, policy: Policy) -> None:
    """Write a policy as TOML that `load` reads back.

    Raises:
        StorageError: The file cannot be written.
    """
    values = policy.model_dump(mode="json")
    lines = [f"{name} = {json.dumps(value)}" for name, value in values.items()]
    write_atomic(path, ("\n".join(lines) + "\n").encode())


def check(policy: Policy, proposal: Proposal, plan: Plan) -> None:
    """Refuse a proposal that the policy does not allow.

    Args:
        policy: The site's bounds.
        proposal: What the coordinator asks for.
        plan: What the site computed from the proposal and its own declared patients.

    Raises:
        PolicyRefusal: A bound is crossed; the reason names field, value and bound and stays in the site's log.
    """
    privacy, train = proposal.privacy, proposal.train
    least = max(policy.min_patients, privacy.min_patients)
    _at_most("privacy.epsilon", privacy.epsilon, "max_epsilon", policy.max_epsilon)
    if privacy.delta != policy.delta:  # what was spent before, and what is released now, must add up at one delta
        raise _refusal("privacy.delta", privacy.delta, f"== {policy.delta} (delta)")
    _at_most("epsilon of the plan", plan.epsilon, "max_epsilon", policy.max_epsilon)
    _at_most("federation.rounds", proposal.federation.rounds, "max_rounds", policy.max_rounds)
    _at_most("train.steps_per_round", train.steps_per_round, "max_steps_per_round", policy.max_steps_per_round)
    _at_most("privacy.max_grad_norm", privacy.max_grad_norm, "max_grad_norm", policy.max_grad_norm)
    _at_least("privacy.max_grad_norm", privacy.max_grad_norm, "min_grad_norm", policy.min_grad_norm)
    _at_least("declared_patients", policy.declared_patients, "min_patients", least)
    for name, noise in (("warm-up", plan.warmup_noise_multiplier), ("training", plan.train_noise_multiplier)):
        if noise is not None:
            _at_least(f"noise multiplier of the {name}", noise, "min_noise_multiplier", policy.min_noise_multiplier)
    if plan.declared_patients != policy.declared_patients:
        raise _refusal("declared_patients of the plan", plan.declared_patients, f"== {policy.declared_patients}")
    if proposal.model.name not in policy.allowed_models:
        raise _refusal("model.name", proposal.model.name, f"in {', '.join(policy.allowed_models)} (allowed_models)")


def _at_most(field: str, value: float, name: str, bound: float) -> None:
    if not value <= bound:
        raise _refusal(field, value, f"<= {bound} ({name})")


def _at_least(field: str, value: float, name: str, bound: float) -> None:
    if not value >= bound:
        raise _refusal(field, value, f">= {bound} ({name})")


def _refusal(field: str, value: float | str, expected: str) -> PolicyRefusal:
    return PolicyRefusal(
        RefusalCode.POLICY,
        f"Expected {field}={value} {expected} of policy.toml. Ask the coordinator for another proposal; "
        "only the privacy officer can change the policy.",
    )


def _first(item: dict[str, object]) -> tuple[str, str, str]:
    location = item.get("loc")
    key = str(location[0]) if isinstance(location, tuple) and location else "policy"
    return key, str(item.get("type")), str(item.get("msg")).removeprefix("Value error, ")


def _explain(path: Path, key: str, kind: str, message: str) -> str:
    if kind == "extra_forbidden":
        near = difflib.get_close_matches(key, Policy.model_fields, n=1, cutoff=0.0)[0]
        return f"Unknown key {key} in {path}. The nearest known key is {near}."
    return f"Expected another value for {key} in {path}: {message[:1].lower()}{message[1:]}."
