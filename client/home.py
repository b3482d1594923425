"""A site's home folder: policy, key, data, ledger, journal, stored replies. Everything the agent owns.

    site.toml      where the images are and how they are labelled (the data engineer's file)
    policy.toml    what the site allows (the privacy officer's file)
    keys/site.json the site's identity key, mode 0600
    keys/node.*    the relay's key, federation.json what it trusts (client/joining)
    ledger/        every charge, signed and chained
    journal/       every release, signed and chained
    replies/       the last replies, so that a repeated request gets the same answer for the same charge
    dataset-*      the training set as imported, mode 0600

Out of scope: what the policy allows (client/policy), what an image is (client/intake).
"""

import fcntl
import json
import shlex
import tomllib
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import final

from pydantic import BaseModel, ConfigDict, ValidationError, ValidationInfo, field_validator

from client import journal
from client import policy as policies
from client.intake import Dataset, Form, IntakeRules, load, read, read_form, save, scan
from client.joining import make_node_key
from client.ledger import open_ledger
from client.paths import Home as Home
from client.policy import Policy
from common.config import GradientEngine
from common.crypto import SigningKey, load_key, save_key
from common.errors import ConfigError, IntakeError, StorageError
from common.files import make_folder, write_atomic

_MAX_FORMS = 8
"""Imported data sets that a refusal names."""


@final
class SiteConfig(BaseModel):
    """Where a site's images are and where their labels come from."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    data: str
    """Folder or NPZ; relative paths start at the home folder."""
    label: str = "auto"
    gradients: GradientEngine = "fast"
    """How gradients of single patients are computed: `fast`, or `opacus`, the slower reference."""
    head_copy: str | None = None
    """File outside the home, better on another disk, that holds a copy of the ledger's signed head: with it an older
    ledger that is put back whole, with the whole home, is seen. Absolute."""
    extra_ca: str | None = None
    """File with the root certificate of a proxy that inspects TLS, which the relay then trusts beside the pinned one;
    what that gives away: client/trust. Absolute."""
    intake: IntakeRules = IntakeRules()
    """How images are read: client/intake/rules."""

    @field_validator("head_copy", "extra_ca")
    @classmethod
    def _absolute(cls, value: str | None, about: ValidationInfo) -> str | None:
        if value is not None and not Path(value).is_absolute():
            raise ValueError(f"expected an absolute path for {about.field_name}")
        return value


def create_home(folder: Path, site: SiteConfig, policy: Policy) -> Home:
    """Make a site's home: folders, configuration, policy and a new identity key.

    The policy is written last: a home without one was never used, and is taken up where it was left.

    Raises:
        StorageError: The folder cannot be written, or a home stands there already.
        ConfigError: The copy of the ledger's head would stand inside the home.
    """
    if Home(folder).policy.exists():
        raise StorageError(f"A home stands in {folder} already. Choose another folder; its policy is mended by hand.")
    _require_outside(folder, site)
    home = Home(make_folder(folder, 0o700))
    for part in (home.key.parent, home.ledger, home.journal, home.replies, home.log.parent):
        make_folder(part, 0o700)
    values = site.model_dump(exclude_none=True, exclude={"intake"})
    rules = site.intake.model_dump(exclude_none=True, exclude_defaults=True)
    lines = [f"{key} = {json.dumps(value, ensure_ascii=False)}" for key, value in values.items()]
    lines += ["[intake]", *(f"{key} = {json.dumps(value)}" for key, value in rules.items())] if rules else []
    write_atomic(folder / "site.toml", ("\n".join(lines) + "\n").encode(), 0o600)
    if not home.key.exists():
        save_key(home.key, SigningKey.generate())
    make_node_key(folder)
    key = load_key(home.key)
    open_ledger(home.ledger, key, head_copy(home))
    journal.start(home.journal, key)
    policies.save(home.policy, policy)
    return home


@contextmanager
def one_at_a_time(home: Home) -> Generator[None]:
    """Hold the home alone: two agents on one home answer one after the other.

    Raises:
        StorageError: The lock cannot be made.
    """
    try:
        handle = (home.folder / "agent.lock").open("w")
    except OSError as error:
        raise StorageError(f"Could not lock the home folder: {error.strerror}. Mend its permissions.") from error
    with handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def require_books(home: Home) -> None:
    """Refuse a home whose ledger or journal is gone: an empty one would forget what was spent, or what left.

    Raises:
        StorageError: The head of one of them is missing.
    """
    for book, held in (("ledger", "what was spent"), ("journal", "what left the site")):
        if not (home.folder / book / f"{book}.head.json").exists():
            raise StorageError(
                f"The {book} of this home is gone, and with it {held}. Restore the folder {book}/ from a backup; "
                "only a home that was never used may be deleted and made anew."
            )


def head_copy(home: Home) -> Path | None:
    """Return where the copy of the ledger's head is kept, or None where site.toml names none.

    Raises:
        ConfigError: site.toml is missing or wrong, or the copy would stand inside the home.
    """
    site = read_site_config(home)
    _require_outside(home.folder, site)
    return Path(site.head_copy) if site.head_copy is not None else None


def require_images(home: Home, classes: Sequence[str], size: int, channels: int = 1) -> None:
    """Refuse classes, sizes and channels that were never imported, before anything is charged.

    Which of the classes have patients here is no ground for a refusal: it would tell the coordinator.

    Raises:
        IntakeError: No training set is imported for them; the message says what is, and how to import what is asked.
    """
    if home.dataset(classes, size, channels).exists():
        return
    there = [form for path in sorted(home.folder.glob("dataset-*.safetensors")) if (form := read_form(path))]
    names = shlex.quote(",".join(classes))  # may come from a message and end in a shell
    raise IntakeError(
        f"Expected imported images of {_described(Form(tuple(classes), size, channels))}, this site has "
        f"{'; '.join(map(_described, there[:_MAX_FORMS])) or 'none'}. If they can be had, import them: fedmedgan-site "
        f"import {shlex.quote(str(home.folder))} --classes {names} --size {size} --channels {channels}"
    )


def import_images(
    home: Home, classes: Sequence[str], size: int, min_patients: int, channels: int = 1
) -> Mapping[str, int]:
    """Read the site's images once and keep them in the home, ready for training.

    Args:
        home: The site.
        classes: Class names in the order of their numbers.
        size: Side of an image in pixels.
        min_patients: Fewer usable patients are an error.
        channels: 1 for grey, 3 for colour; images that are the other are converted.

    Returns:
        How many files were refused, by reason. For the site's own eyes.

    Raises:
        IntakeError: Nothing is usable, or there are too few patients.
        ConfigError: site.toml is missing or wrong.
    """
    site = read_site_config(home)
    found = scan(home.folder / site.data, site.label, site.intake)
    dataset, refused = read(found, classes, size, channels, site.intake)
    if dataset.number_of_patients < min_patients:
        raise IntakeError(
            f"Expected at least min_patients={min_patients} usable patients at this site, found "
            f"{dataset.number_of_patients}. Add patients, or lower privacy.min_patients and the policy's min_patients."
        )
    save(dataset, home.dataset(classes, size, channels), classes)
    return refused


def load_images(home: Home, classes: Sequence[str], size: int, channels: int = 1) -> Dataset:
    """Load the imported training set.

    Raises:
        IntakeError: It was never imported for these classes, this size and these channels, or the file holds others.
    """
    require_images(home, classes, size, channels)
    dataset = load(home.dataset(classes, size, channels))
    if dataset.images.shape[1:] != (channels, size, size) or dataset.labels.max() >= len(classes):
        raise IntakeError(
            f"Expected images of {_described(Form(tuple(classes), size, channels))}, the file holds others: it was "
            "renamed or copied from elsewhere. Import the images again."
        )
    return dataset


def read_site_config(home: Home) -> SiteConfig:
    """Read site.toml.

    Raises:
        ConfigError: It is missing, not TOML or has unknown keys.
    """
    try:
        return SiteConfig.model_validate(tomllib.loads((home.folder / "site.toml").read_text(encoding="utf-8")))
    except ValidationError as error:
        wrong = "; ".join(f"{'.'.join(map(str, item['loc']))}: {item['msg']}" for item in error.errors())
        raise ConfigError(f"Expected other values in site.toml of the home folder: {wrong}.") from error
    except (OSError, tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"Could not read site.toml in the home folder: {type(error).__name__}. Write it anew: data = PATH"
        ) from error


def _described(form: Form) -> str:
    colour = {1: "grey", 3: "colour"}[form.channels]
    classes = "classes unknown" if form.classes is None else f"classes {', '.join(form.classes)}"
    return f"{form.size} px in {colour} ({classes})"


def _require_outside(folder: Path, site: SiteConfig) -> None:
    if site.head_copy is not None and Path(site.head_copy).resolve().is_relative_to(folder.resolve()):
        raise ConfigError(
            f"Expected head_copy={site.head_copy} outside the home {folder}: whoever puts an older home back would put "
            "the copy back with it. Name a file on another disk."
        )
