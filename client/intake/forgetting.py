"""Taking out of a vault what an import of another one no longer found: a patient who was taken out leaves all of them.

Out of scope: finding it (client/intake/importing).
"""

from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import final

import numpy as np

from client.intake.chunks import compact, delete_unnamed, recover
from client.intake.dataset import Form
from client.intake.importing import alone_in
from client.intake.pseudonyms import Names
from client.intake.vault import read_manifest, write_manifest
from common.sealing import SealingKey


@final
@dataclass(frozen=True)
class Forgotten:
    """What was taken out of a vault.

    Attributes:
        form: Of its images.
        images: How many are gone.
        usable: Whether enough patients stay; else it gives no images until it is imported again.
    """

    form: Form
    images: int
    usable: bool


def forget(
    vault: Path, key: SealingKey, states: Mapping[bytes, bytes], min_patients: int, alone: AbstractContextManager[None]
) -> Forgotten | None:
    """Delete the images of files that are gone or changed since.

    Args:
        vault: The folder of another form of the same source.
        key: The site's.
        states: Every file of the source as it is now, as `Imported` says.
        min_patients: With fewer the vault gives no images.
        alone: Held while the vault changes from one state to the next.

    Returns:
        What was deleted; None where all was as it is now.

    Raises:
        StorageError: The vault cannot be written, is damaged, or is being imported.

    Guarantees:
        - gone_from_all: No file of the vault holds an image of a file that is not as `states` says.
    """
    with alone_in(vault):
        before = read_manifest(vault, key)
        manifest = recover(vault, key, before)
        stale = np.array([states.get(file) != Names.state_of(stamp) for file, stamp, _ in manifest.images()], bool)
        if not stale.any():
            return None
        counted, there = before.current(), manifest.current() & ~stale
        images = int((counted & stale[: len(counted)]).sum())
        usable = len(set(manifest.rows["patient"][there].tolist())) >= max(1, min_patients)
        with alone:
            manifest = compact(vault, key, manifest, ~stale)
            seen = {file: one for file, one in manifest.seen.items() if states.get(file) == Names.state_of(one.stamp)}
            manifest = replace(manifest, seen=seen if usable else {})
            write_manifest(vault, key, manifest)
            delete_unnamed(vault, manifest)
    return Forgotten(manifest.form, images, usable)
