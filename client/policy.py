"""What the site allows: `policy.toml`, written by the privacy officer. The coordinator proposes, this disposes.

Out of scope: what is spent already (client/ledger).
"""

import difflib
import json
import logging
import textwrap
import tomllib
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, final

from pydantic import ConfigDict, Field, StringConstraints, ValidationError, model_validator

from common.config import Epsilon, ModelName, Positive, Proposal, Section
from common.enrolment import SITE_NAME
from common.errors import ConfigError, PolicyRefusal, RefusalCode
from common.files import open_regular, write_atomic

if TYPE_CHECKING:  # its accountant takes seconds to import
    from common.plan import Plan

LOG = logging.getLogger("fedmedgan.agent")
MAX_POLICY_BYTES = 65_536
MAX_REPLY_BYTES = 33_554_432
_WIDTH = 118

Doubtful = Literal["burned-in", "secondary-capture", "ultrasound"]
"""Kinds of images that often show text about the patient."""

_HEADING = (
    "What this site allows. Every request is held against this file before anything is charged or read, and no message "
    "can change it. A key that does not stand here has the default of the release, which is strict."
)


@final
class Policy(Section):
    """The bounds of one site for one data set; the text below a key is also its comment in the file."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    version: Literal[1] = 1
    """The form of this file."""
    site: Annotated[str, StringConstraints(pattern=SITE_NAME)]
    """The site's name in every run. Public, if may_declare says so."""
    declared_patients: Annotated[int, Field(ge=2)]
    """The cohort size that sample rate, noise and divisor are computed from: rounded, never the exact count, since the
    exact count would tell whether one patient is in it. Public, if may_declare says so."""
    may_declare: tuple[Literal["name", "patients"], ...] = ("name", "patients")
    """What the site says of itself without noise and without a charge: its name and declared_patients, and there is
    nothing else that could be listed. No run can be planned without both: without one of them the site takes part in
    nothing."""
    max_epsilon: Epsilon
    """Bound on everything ever charged to this data set, over all runs together: the patients' guarantee. Raising it
    weakens what they were told. At most 1,000,000: more says nothing."""
    delta: Annotated[float, Field(gt=0, lt=1)]
    """The delta of the guarantee; a request with another is refused, since all charges must add up at one. Should be
    well below one over the declared patients (`fedmedgan-site init` warns)."""
    min_noise_multiplier: Positive = 0.3
    """Least noise of a private step or of the warm-up, in clip norms. Below, one release alone tells much of a patient,
    whatever the account says."""
    max_sample_rate: Annotated[float, Field(gt=0, le=1)] = 0.5
    """Highest probability of a patient in a private step of training. Near 1 everybody is in nearly every step: the
    account knows that and asks for more noise, but nothing is left of the doubt who was drawn. 1 allows it. The warm-up
    takes every patient, once, and is not bounded by this."""
    min_patients: Annotated[int, Field(ge=2)] = 20
    """With fewer declared patients the site takes no part: few patients drown in the noise and gain nothing."""
    max_rounds: Annotated[int, Field(ge=0)] = 1000
    """Most rounds of one run, so that no run goes on without end."""
    max_steps_per_round: Annotated[int, Field(ge=1)] = 1000
    """Most private steps in one request, which is one round: bounds the time that a request takes."""
    max_reply_bytes: Annotated[int, Field(ge=0)] = MAX_REPLY_BYTES
    """Most bytes of arrays in one reply, 32 MiB by default: bounds what one release can carry out. Checked from the
    shapes before anything is charged, and again on the reply itself."""
    min_grad_norm: Annotated[float, Field(ge=1e-6, allow_inf_nan=False)] = 1e-3
    """Least clip norm: no matter of privacy, but nonsense below it."""
    max_grad_norm: Positive = 100.0
    """Largest clip norm: no matter of privacy, for the noise grows with it, but nonsense above it."""
    allow_unmasked_shares: bool = False
    """For simulation only. With train.algorithm = "secure-sum" and a number as privacy.colluding_sites each site adds
    only its part of the noise, which is enough only if nobody, the coordinator included, sees the share of a single
    site. Nothing hides single shares in this release: an agent that answers a coordinator refuses them all the same."""
    allowed_models: tuple[ModelName, ...] = ("mlp", "dcgan", "resnet", "unet", "vae")
    """The architectures that this site trains; no other code than this release's is ever run."""
    allowed_image_sizes: tuple[Literal[28, 32, 64, 128], ...] = (28, 32, 64)
    """Sides of an image in pixels; larger images show more of a patient. The images must be imported at that size too.
    """

    allowed_channels: tuple[Literal[1, 3], ...] = (1, 3)
    """1: grey images, 3: colour, which shows more of a patient. The images must be imported like that too."""

    allow_doubtful_images: tuple[Doubtful, ...] = ()
    """Kinds of images that may be used although text about the patient often stands in their pixels: "burned-in" (the
    header says so), "secondary-capture" (and screen saves), "ultrasound". Whoever adds one has looked at the images, or
    has blank_rules for them."""
    blank_rules: str = ""
    """File of regions that are made black in images of certain devices, in the style of RSNA CTP
    (client/intake/deidentify); "" for none. Relative paths start at the home folder."""

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
        with open_regular(path) as handle:
            content = handle.read(MAX_POLICY_BYTES + 1)
        if len(content) > MAX_POLICY_BYTES:
            raise ConfigError(f"Expected {path} of at most {MAX_POLICY_BYTES} bytes. Shorten it.")
        tree = json.dumps(tomllib.loads(content.decode()), default=str)
        return Policy.model_validate_json(tree, strict=True)  # neither true nor "9" is a number
    except OSError as error:
        raise ConfigError(
            f"Could not read the policy {path}: {error.strerror}. `fedmedgan-site init` makes one."
        ) from error
    except ValidationError as error:
        raise ConfigError("\n".join(_explain(path, *_first(item)) for item in map(dict, error.errors()))) from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not TOML: {error}. Save it as UTF-8.") from error
    except ValueError as error:  # TOMLDecodeError
        raise ConfigError(f"{path} is not TOML: {error}. Mend that line.") from error


def between_machines(policy: Policy) -> Policy:
    """Return the policy as it holds at a site that has joined: nothing lets unmasked shares out."""
    return policy.model_copy(update={"allow_unmasked_shares": False})


def save(path: Path, policy: Policy) -> None:
    """Write a policy as TOML that `load` reads back, with a comment above every key.

    Raises:
        StorageError: The file cannot be written.

    Guarantees:
        - explained: What a key bounds, and why, stands above it.
    """
    lines = _comment(_HEADING)
    for name, value in policy.model_dump(mode="json").items():
        lines += ["", *_comment(Policy.model_fields[name].description or ""), f"{name} = {json.dumps(value)}"]
    write_atomic(path, ("\n".join(lines) + "\n").encode())


@final
class PolicyFile:
    """A site's policy as its file says it, read anew for each request: a change counts at once.

    Guarantees:
        - as_it_stands: What was read before counts no longer, and a file that does not read allows nothing.
        - changes_are_told: The log says once what changed, from what to what.
    """

    def __init__(self, path: Path) -> None:
        """Read the policy for the first time.

        Raises:
            ConfigError: As `load`.
        """
        self._path, self._seen = path, load(path)

    @property
    def seen(self) -> Policy:
        """The policy as it was read last."""
        return self._seen

    def refresh(self) -> None:
        """Read the policy anew.

        Raises:
            PolicyRefusal: It does not read.
        """
        try:
            now = load(self._path)
        except ConfigError as error:
            reason = f"Nothing is allowed until policy.toml reads: {error}"
            raise PolicyRefusal(RefusalCode.INTERNAL, reason) from error
        before, after = self._seen.model_dump(mode="json"), now.model_dump(mode="json")
        changes = [f"{name}: {old} -> {after[name]}" for name, old in before.items() if after[name] != old]
        if changes:
            LOG.warning("policy.toml changed, and counts from this request on: %s", "; ".join(changes))
        self._seen = now


def check_hello(policy: Policy) -> None:
    """Refuse to say anything where the policy does not let the site declare what every run needs.

    Raises:
        PolicyRefusal: The name or the number of patients may not be declared.
    """
    for what in ("name", "patients"):
        if what not in policy.may_declare:
            raise _refusal("may_declare", ", ".join(policy.may_declare) or "nothing", f'to hold "{what}"')


def check_proposal(policy: Policy, proposal: Proposal) -> None:
    """Refuse a proposal that the policy does not allow, before anything is computed from it.

    Args:
        policy: The site's bounds.
        proposal: What the coordinator asks for.

    Raises:
        PolicyRefusal: A bound is crossed; the reason names field, value and bound and stays in the site's log.
    """
    check_hello(policy)
    privacy, train = proposal.privacy, proposal.train
    least = max(policy.min_patients, privacy.min_patients)
    _at_most("privacy.epsilon", privacy.epsilon, "max_epsilon", policy.max_epsilon)
    if privacy.delta != policy.delta:  # what was spent before, and what is released now, must add up at one delta
        raise _refusal("privacy.delta", privacy.delta, f"== {policy.delta} (delta)")
    _at_most("federation.rounds", proposal.federation.rounds, "max_rounds", policy.max_rounds)
    _at_most("train.steps_per_round", train.steps_per_round, "max_steps_per_round", policy.max_steps_per_round)
    _at_most("privacy.max_grad_norm", privacy.max_grad_norm, "max_grad_norm", policy.max_grad_norm)
    _at_least("privacy.max_grad_norm", privacy.max_grad_norm, "min_grad_norm", policy.min_grad_norm)
    _at_least("declared_patients", policy.declared_patients, "min_patients", least)
    _one_of("model.name", proposal.model.name, "allowed_models", policy.allowed_models)
    _one_of("image.size", proposal.image.size, "allowed_image_sizes", policy.allowed_image_sizes)
    _one_of("image.channels", proposal.image.channels, "allowed_channels", policy.allowed_channels)


def check_plan(policy: Policy, plan: "Plan") -> None:
    """Refuse what a proposal comes to at this site, before anything is charged.

    Args:
        policy: The site's bounds.
        plan: What the site computed from the proposal and its own declared patients.

    Raises:
        PolicyRefusal: A bound is crossed; the reason names field, value and bound and stays in the site's log.
    """
    _at_most("epsilon of the plan", plan.epsilon, "max_epsilon", policy.max_epsilon)
    for name, noise in (("warm-up", plan.warmup_noise_multiplier), ("training", plan.train_noise_multiplier)):
        if noise is not None:
            _at_least(f"noise multiplier of the {name}", noise, "min_noise_multiplier", policy.min_noise_multiplier)
    if plan.train_noise_multiplier is not None:
        _at_most("sample rate", plan.sample_rate, "max_sample_rate", policy.max_sample_rate)
    if plan.noise_shares > 1 and not policy.allow_unmasked_shares:
        expected = "<= 1 (allow_unmasked_shares holds in simulation alone: nothing would hide a single site's share)"
        raise _refusal("parts of the noise", plan.noise_shares, expected)
    if plan.declared_patients != policy.declared_patients:
        raise _refusal("declared_patients of the plan", plan.declared_patients, f"== {policy.declared_patients}")


def check_reply(policy: Policy, size_bytes: int) -> None:
    """Refuse a request whose reply would be too large; the size follows from public shapes.

    Raises:
        PolicyRefusal: The arrays of the reply hold more bytes than the policy lets out at once.
    """
    _at_most("bytes of the reply", size_bytes, "max_reply_bytes", policy.max_reply_bytes)


def _at_most(field: str, value: float, name: str, bound: float) -> None:
    if not value <= bound:
        raise _refusal(field, value, f"<= {bound} ({name})")


def _at_least(field: str, value: float, name: str, bound: float) -> None:
    if not value >= bound:
        raise _refusal(field, value, f">= {bound} ({name})")


def _one_of(field: str, value: int | str, name: str, allowed: Collection[int | str]) -> None:
    if value not in allowed:
        raise _refusal(field, value, f"in {', '.join(map(str, allowed)) or 'nothing'} ({name})")


def _refusal(field: str, value: float | str, expected: str) -> PolicyRefusal:
    return PolicyRefusal(
        RefusalCode.POLICY,
        f"Expected {field}={value} {expected} of policy.toml. Ask the coordinator for another proposal; "
        "only the privacy officer can change the policy.",
    )


def _comment(text: str) -> list[str]:
    return [f"# {line}" for line in textwrap.wrap(" ".join(text.split()), _WIDTH)]


def _first(item: dict[str, object]) -> tuple[str, str, str]:
    location = item.get("loc")
    key = str(location[0]) if isinstance(location, tuple) and location else "policy"
    return key, str(item.get("type")), str(item.get("msg")).removeprefix("Value error, ")


def _explain(path: Path, key: str, kind: str, message: str) -> str:
    if kind == "extra_forbidden":
        near = difflib.get_close_matches(key, Policy.model_fields, n=1, cutoff=0.0)[0]
        return f"Unknown key {key} in {path}. The nearest known key is {near}."
    return f"Expected another value for {key} in {path}: {message[:1].lower()}{message[1:]}."
