"""A site's home folder: policy, key, data, ledger, journal, stored replies. Everything the agent owns.

    site.toml      where the images are and how they are labelled (the data engineer's file)
    policy.toml    what the site allows (the privacy officer's file)
    keys/site.json the site's identity key, mode 0600, under a passphrase if the site wants one (client/passphrase)
    keys/vault.json the key that seals imported images, mode 0600
    keys/node.*    the relay's key, federation.json what it trusts (client/joining)
    ledger/        every charge, signed and chained
    journal/       every release, signed and chained
    replies/       the last replies, so that a repeated request gets the same answer for the same charge
    vault-*        the training sets as imported, sealed: client/intake/vault

Out of scope: what the policy allows (client/policy), what an image is (client/intake).
"""

import fcntl
import json
import shlex
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from pathlib import Path

from client import journal
from client import policy as policies
from client.intake import Dataset, Form
from client.intake.deidentify import BlankRules, read_blank_rules
from client.intake.forgetting import Forgotten, forget
from client.intake.importing import Imported, Progress, import_source
from client.intake.patients import PatientTable, read_patient_table
from client.intake.sealed import open_dataset
from client.intake.selection import Practice
from client.intake.vault import MAX_CLASSES, read_manifest
from client.joining import make_node_key
from client.ledger import open_ledger
from client.paths import Home as Home
from client.policy import Policy
from client.site_config import SiteConfig, head_copy, read_site_config, require_copy_outside, require_place
from common.config import IMAGE_CHANNELS, IMAGE_SIZES
from common.crypto import SigningKey, is_sealed, load_key, save_key
from common.errors import ConfigError, IntakeError, StorageError
from common.files import make_folder, make_own_folder, write_atomic
from common.passphrase import Passphrase
from common.sealing import SealingKey, load_sealing_key, save_sealing_key

_MAX_FORMS = 8
"""Imported data sets that a refusal names."""


def create_home(folder: Path, site: SiteConfig, policy: Policy, passphrase: Passphrase | None = None) -> Home:
    """Make a site's home: folders, configuration, policy and a new identity key, under a passphrase if one is given.

    The policy is written last: a home without one was never used, and is taken up where it was left.

    Raises:
        StorageError: The folder cannot be written, or a home stands there already.
        ConfigError: The copy of the ledger's head would stand inside the home, or cannot be kept where it shall.

    Guarantees:
        - refused_before_made: Where the copy of the ledger's head cannot be kept, nothing is made.
    """
    if Home(folder).policy.exists():
        raise StorageError(f"A home stands in {folder} already. Choose another folder; its policy is mended by hand.")
    require_copy_outside(folder, site)
    require_place(Home(folder), site)
    home = Home(make_own_folder(folder))
    for part in (home.key.parent, home.ledger, home.journal, home.replies, home.log.parent):
        make_folder(part, 0o700)
    values = site.model_dump(exclude_none=True, exclude={"intake"})
    rules = site.intake.model_dump(exclude_none=True, exclude_defaults=True)
    lines = [f"{key} = {json.dumps(value, ensure_ascii=False)}" for key, value in values.items()]
    lines += ["[intake]", *(f"{key} = {json.dumps(value)}" for key, value in rules.items())] if rules else []
    write_atomic(folder / "site.toml", ("\n".join(lines) + "\n").encode(), 0o600)
    if not home.key.exists():
        save_key(home.key, SigningKey.generate(), passphrase)
    vault_key(home)
    make_node_key(folder)
    key = load_key(home.key, None if passphrase is None else lambda: passphrase)
    if passphrase is not None and not is_sealed(home.key):
        save_key(home.key, key, passphrase)
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


def require_images(home: Home, classes: Sequence[str], size: int, channels: int = 1) -> None:
    """Refuse classes, sizes and channels that were never imported, before anything is charged.

    Which of the classes have patients here is no ground for a refusal: it would tell the coordinator.

    Raises:
        IntakeError: No training set is imported for them; the message says what is, and how to import what is asked.
    """
    vault = home.vault(classes, size, channels)
    if (vault / "manifest").exists() and read_manifest(vault, vault_key(home)).current().any():
        return
    there = imported_forms(home)
    names = shlex.quote(",".join(classes))  # may come from a message and end in a shell
    raise IntakeError(
        f"Expected imported images of {_described(Form(tuple(classes), size, channels))}, this site has "
        f"{'; '.join(map(_described, there[:_MAX_FORMS])) or 'none'}. If they can be had, import them: fedmedgan-site "
        f"import {shlex.quote(str(home.folder))} --classes {names} --size {size} --channels {channels}"
    )


def imported_forms(home: Home) -> list[Form]:
    """Return of which forms images are imported.

    Raises:
        StorageError: A vault is damaged, or sealed with another key.
    """
    vaults = [path.parent for path in sorted(home.folder.glob("vault-*/manifest"))]
    manifests = [read_manifest(vault, vault_key(home)) for vault in vaults]
    return [manifest.form for manifest in manifests if manifest.current().any()]


def check_imported(home: Home) -> None:
    """Look whether the imported images are there whole; their content shows when it is opened.

    Raises:
        StorageError: A vault is damaged, or sealed with another key.
    """
    for form in imported_forms(home):
        open_dataset(home.vault(form.classes, form.size, form.channels), vault_key(home))


def vault_key(home: Home) -> SealingKey:
    """Return the key that seals images, and make it where none was ever needed.

    Raises:
        StorageError: It is gone while images are there that it sealed, or cannot be read or written.
    """
    if not home.vault_key.exists() and not any(home.folder.glob("vault-*/manifest")):
        make_folder(home.vault_key.parent, 0o700)
        save_sealing_key(home.vault_key, SealingKey.generate())
    return load_sealing_key(home.vault_key)


def practice_of(home: Home) -> Practice:
    """Return how this site reads its images, by site.toml and policy.toml.

    Raises:
        ConfigError: One of them, or a file of rules that it names, is missing or wrong.
        IntakeError: The table of patients is wrong.
    """
    site, rules = read_site_config(home), policies.load(home.policy) if home.policy.exists() else None
    blank = (
        BlankRules() if rules is None or not rules.blank_rules else read_blank_rules(home.folder / rules.blank_rules)
    )
    table = PatientTable() if site.patients is None else read_patient_table(home.folder / site.patients)
    allowed = () if rules is None else rules.allow_doubtful_images
    return Practice(home.folder / site.data, site.label, site.intake, allowed, blank, table)


def import_images(
    home: Home,
    classes: Sequence[str],
    size: int,
    min_patients: int,
    channels: int = 1,
    progress: Progress | None = None,
    name_labels: bool = False,
) -> Imported:
    """Bring the home's training set up to the state of the site's images.

    Args:
        home: The site.
        classes: Class names in the order of their numbers.
        size: Side of an image in pixels.
        min_patients: Fewer usable patients are an error.
        channels: 1 for grey, 3 for colour; images that are the other are converted.
        progress: Told how many of the images that are new or changed are decoded.
        name_labels: Errors may name labels, which may be values of headers.

    Returns:
        What was found, used and refused. For the site's own eyes.

    Raises:
        IntakeError, TooFewPatients, MissingExtra, UnreadableSource: The images cannot be used.
        ConfigError: site.toml is missing or wrong, or size, channels or classes are out of bounds.
        StorageError: The vault cannot be written, or is damaged.
    """
    if size not in IMAGE_SIZES:
        raise ConfigError(f"Expected size={size} as one of {', '.join(map(str, IMAGE_SIZES))} pixels.")
    if not 1 <= len(classes) <= MAX_CLASSES or len(set(classes)) != len(classes):
        raise ConfigError(f"Expected 1 to {MAX_CLASSES} classes, each named once, got {len(classes)}.")
    if channels not in IMAGE_CHANNELS:
        raise ConfigError(f"Expected channels={channels} as 1 (grey) or 3 (red, green and blue).")
    vault, form = home.vault(classes, size, channels), Form(tuple(classes), size, channels)
    key = vault_key(home)
    alone, practice = one_at_a_time(home), practice_of(home)
    return import_source(vault, key, form, practice, min_patients, progress, alone, name_labels)


def forget_elsewhere(home: Home, done: Imported, imported: Path, min_patients: int) -> list[Forgotten]:
    """Delete what an import no longer found from the other training sets of the home.

    Args:
        home: The site.
        done: What the import did.
        imported: Its vault.
        min_patients: A set with fewer gives no images until it is imported again.

    Raises:
        StorageError: A vault cannot be written, or is damaged.
    """
    others = [path.parent for path in sorted(home.folder.glob("vault-*/manifest")) if path.parent != imported]
    key = vault_key(home)
    forgotten = [forget(vault, key, done.states, min_patients, one_at_a_time(home)) for vault in others]
    return [one for one in forgotten if one is not None]


def load_images(home: Home, classes: Sequence[str], size: int, channels: int = 1) -> Dataset:
    """Open the imported training set.

    Raises:
        IntakeError: It was never imported for these classes, this size and these channels, or the vault holds others.
        StorageError: The vault is damaged, or sealed with another key.
    """
    require_images(home, classes, size, channels)
    vault, key, form = home.vault(classes, size, channels), vault_key(home), Form(tuple(classes), size, channels)
    if read_manifest(vault, key).form != form:
        raise IntakeError(
            f"Expected images of {_described(form)}, the vault holds others: it was renamed or copied from elsewhere. "
            "Import the images again."
        )
    return open_dataset(vault, key)


def _described(form: Form) -> str:
    colour = {1: "grey", 3: "colour"}[form.channels]
    return f"{form.size} px in {colour} (classes {', '.join(form.classes)})"
