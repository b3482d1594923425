"""Virtual hospitals: who has which patients, their folders and homes, and the way to their agents.

Each hospital reads its own folder through the intake that a real hospital uses, and keeps its own policy, key, ledger
and journal. Out of scope: running the federation (simulations/engines).
"""

import fcntl
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import final

import torch

from client import policy as policies
from client.agent import Secrets, answer, open_site
from client.channel import MAX_BODY_BYTES, Transport
from client.home import Home, create_home, import_images, load_images
from client.intake import Dataset, Record, Scan, scan
from client.intake.refusals import describe
from client.policy import Policy
from client.site_config import SiteConfig
from common.config import Config
from common.config_text import build_config
from common.crypto import KeyStream
from common.errors import ConfigError, IntakeError
from common.files import make_folder, write_atomic
from common.messages import Reply, Request
from simulations.faults import spend_before
from simulations.partition import assign, at_most, hold_out, place
from simulations.phantoms.cohort import CLASSES, PhantomPatient, draw_patients, draw_scanner
from simulations.phantoms.dicom import write_hospital

HOLDOUT = "held-out"
MIN_NOISE_MULTIPLIER = 0.05
"""A researcher may ask for any epsilon that can be calibrated; real sites ask for more noise by default, and bound
sample rate, steps and size of a reply."""
_READY = "ready.json"
_MAX_NAMED = 10
"""Labels in one message."""


@final
@dataclass(frozen=True)
class Federation:
    """Who has which patients; no file is written yet.

    Attributes:
        config: The configuration with the classes filled in.
        sites: What each hospital gets.
        held_out: What no hospital gets.
        phantoms: The phantom patients by patient key; empty for given data.
    """

    config: Config
    sites: tuple[Scan, ...]
    held_out: Scan
    phantoms: Mapping[tuple[str, str], PhantomPatient]
    refused: Mapping[str, int]
    """What the source holds and nobody can use, by reason."""


def site_name(index: int) -> str:
    """Return the name of a virtual hospital."""
    return f"hospital-{index + 1:02d}"


def patients_in(found: Scan) -> int:
    """Count the patients of a scan."""
    return len({record.patient for record in found.records})


def declared_patients(patients: int) -> int:
    """Round a hospital's patients down to the public number that its policy declares: to tens where there are ten."""
    return patients // 10 * 10 if patients >= 10 else max(2, patients)


def draw_federation(config: Config) -> Federation:
    """Decide who gets which patients, from headers and indexes alone.

    Raises:
        IntakeError: The data cannot be used, or there are fewer patients than hospitals.
        ConfigError: The partition does not fit the data, or `image.classes` names one that no patient has.
    """
    seed, simulation = config.federation.seed, config.simulation
    phantoms: dict[tuple[str, str], PhantomPatient] = {}
    if simulation.data:
        everything = scan(Path(simulation.data).absolute(), simulation.label)
    else:
        drawn = draw_patients(simulation.phantom_patients, seed)
        phantoms = {(patient.issuer, patient.patient_id): patient for patient in drawn}
        everything = Scan(
            tuple(
                Record(Path(), None, key, CLASSES[patient.label], None)
                for key, patient in phantoms.items()
                for _ in range(patient.images)
            ),
            {},
        )
    if patients_in(everything) < max(2, simulation.sites):
        raise IntakeError(
            f"Expected at least {max(2, simulation.sites)} patients for simulation.sites={simulation.sites} hospitals, "
            f"found {patients_in(everything)}. Lower --sites or give more patients."
        )
    found = tuple(sorted({r.label for r in everything.records if r.label is not None})) if simulation.data else CLASSES
    _require_classes(config, found)
    config = build_config(config.model_dump(), {"image.classes": config.image.classes or found})
    rest, held_out = hold_out(everything, simulation.holdout, seed)
    if simulation.max_patients:
        rest = at_most(rest, simulation.max_patients, seed)
    sites = assign(rest, simulation.sites, simulation.partition, seed, simulation.one_class_site)
    _require_anybody(config, sites)
    return Federation(config, sites, held_out, phantoms, everything.refused)


def _require_classes(config: Config, found: Sequence[str]) -> None:
    """Refuse a class that nobody has: it would be learned from noise alone, and only a simulator can tell."""
    if absent := [name for name in config.image.classes if name not in found]:
        named, labels = (", ".join(map(repr, names[:_MAX_NAMED])) for names in (absent, found))
        more = f" and {len(found) - _MAX_NAMED} more" if len(found) > _MAX_NAMED else ""
        raise ConfigError(
            f"Expected image.classes among the labels of the data, got {named}, which no patient has. The labels are "
            f"{labels}{more}. Mend image.classes, or name where labels are with --label."
        )


def _require_anybody(config: Config, sites: Sequence[Scan]) -> None:
    """Refuse a class whose few patients were all held out, or left out by `max_patients`."""
    there = {record.label for site in sites for record in site.records}
    if absent := [name for name in config.image.classes if name not in there]:
        raise ConfigError(
            f"Expected patients of each class at a site, got none of {', '.join(map(repr, absent[:_MAX_NAMED]))}: "
            "those few were held out, or left out by simulation.max_patients or simulation.phantom_patients. Set "
            "simulation.holdout = 0, raise the others, take another seed, or leave the class out of image.classes."
        )


def build_hospitals(federation: Federation, out: Path) -> Iterator[str]:
    """Write every hospital's files and home, import its images, and say what is being done.

    Whatever an interrupted call left is removed first; a finished one is left as it is.

    Args:
        federation: From `draw_federation`.
        out: The run folder.

    Yields:
        One line a hospital, for display.

    Raises:
        IntakeError: Nothing is usable at some hospital, or every hospital has fewer than `privacy.min_patients`.
        StorageError: A file could not be written.
    """
    folder = out / "hospitals"
    make_folder(out)
    with (out / "hospitals.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # Ray's actors may all find the hospitals unbuilt
        if (folder / _READY).exists():
            return
        shutil.rmtree(folder, ignore_errors=True)
        if federation.held_out.records:
            data = make_folder(folder / HOLDOUT / "data")
            _write_images(federation, federation.held_out, data, len(federation.sites))
        sizes: list[int] = []
        for index, part in enumerate(federation.sites):
            usable, refused = _build_hospital(federation, index, part, folder / site_name(index))
            sizes.append(usable.number_of_patients)
            skipped = f", skipped {describe(refused)}" if refused else ""
            few = "; too few to take part" if _too_few(federation, sizes[-1]) else ""
            yield f"{site_name(index)}: {sizes[-1]} patients, {len(usable.images)} images{skipped}{few}"
        if all(_too_few(federation, size) for size in sizes):
            raise IntakeError(
                f"Expected a hospital with at least privacy.min_patients={federation.config.privacy.min_patients} "
                f"patients, the largest declares {declared_patients(max(sizes))}. Give more patients or "
                "fewer --sites, or lower privacy.min_patients in the TOML."
            )
        write_atomic(folder / _READY, json.dumps({"version": 1, "sites": len(federation.sites)}).encode())


def connect(out: Path, config: Config, partition: int) -> Transport:
    """Return the transport to a virtual hospital's agent in this process.

    The agent is opened for each request and dropped after it, so that memory does not grow with the hospitals. Its
    secrets are derived from the seed: reproducible, hence not secret; a real site takes them from the OS.
    """
    home = Home(out / "hospitals" / site_name(partition))
    secrets = simulated_secrets(config.federation.seed, partition)

    def ask(request: Request) -> Reply:
        torch.set_num_threads(config.performance.threads)
        _log_to(home)
        return answer(open_site(home, secrets), request)

    return ask


def simulated_secrets(seed: int, partition: int) -> Secrets:
    """Return reproducible secrets: the same for the same seed, hospital and request."""
    key = hashlib.sha256(f"fedmedgan simulator/{seed}/{partition}".encode()).digest()

    def derive(request_digest: str) -> KeyStream:
        return KeyStream(key).derive(request_digest)

    return derive


def held_out_images(config: Config, out: Path) -> Dataset | None:
    """Load the patients that no hospital got, or None when there are none."""
    home = Home(out / "hospitals" / HOLDOUT)
    if not home.folder.exists():
        return None
    classes, size, channels = config.image.classes, config.image.size, config.image.channels
    write_atomic(home.folder / "site.toml", b'data = "data"\n')
    import_images(home, classes, size, 1, channels)  # goes on where it was killed; what is there is not read again
    return load_images(home, classes, size, channels)


def _build_hospital(federation: Federation, index: int, part: Scan, folder: Path) -> tuple[Dataset, Mapping[str, int]]:
    config = federation.config
    classes, size, channels = config.image.classes, config.image.size, config.image.channels
    data = make_folder(folder / "data")
    _write_images(federation, part, data, index)
    policy = Policy(
        site=site_name(index),
        declared_patients=declared_patients(patients_in(part)),
        max_epsilon=config.privacy.epsilon,
        delta=config.privacy.delta,
        min_noise_multiplier=MIN_NOISE_MULTIPLIER,
        max_sample_rate=1.0,
        max_reply_bytes=MAX_BODY_BYTES,
        max_steps_per_round=config.train.steps_per_round,
        min_patients=config.privacy.min_patients,
        allow_unmasked_shares=config.privacy.colluding_sites != "all",
        max_rounds=max(1, config.federation.rounds),
        allowed_image_sizes=(config.image.size,),
    )
    home = create_home(folder, SiteConfig(data="data", gradients=config.performance.gradients), policy)
    refused = import_images(home, classes, size, 1, channels).refused
    usable = load_images(home, classes, size, channels)
    declared = declared_patients(usable.number_of_patients)
    policies.save(home.policy, policy.model_copy(update={"declared_patients": declared}))
    if index == 0 and config.simulation.poor_site_budget < 1:
        spend_before(home, policy, 1 - config.simulation.poor_site_budget)
    return usable, refused


def _too_few(federation: Federation, patients: int) -> bool:
    return declared_patients(patients) < federation.config.privacy.min_patients


def _write_images(federation: Federation, part: Scan, data: Path, scanner: int) -> None:
    if not federation.phantoms:
        place(part, data)
        return
    keys = dict.fromkeys(record.patient for record in part.records)
    patients = [federation.phantoms[key] for key in keys]
    for _ in write_hospital(data, patients, draw_scanner(scanner, federation.config.federation.seed)):
        pass


def _log_to(home: Home) -> None:
    """Send the agent's log to the hospital's own file, as a real agent would."""
    logger = logging.getLogger("fedmedgan.agent")
    path = os.fspath(home.log.absolute())
    if not any(isinstance(h, logging.FileHandler) and h.baseFilename == path for h in logger.handlers):
        for handler in list(logger.handlers):
            logger.removeHandler(handler)
            handler.close()
        make_folder(home.log.parent, 0o700)  # a home of an older release has none
        handler = logging.FileHandler(path)
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)  # whatever else this process has set for all of our loggers
        logger.propagate = False
