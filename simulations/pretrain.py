"""A generator to start from that has seen phantoms only: what a chest looks like, and nothing of any patient.

Out of scope: where it stands and who reads it (server/start), what phantoms are (simulations/phantoms).
"""

import functools
import time
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor, nn

from common.config import Config, WarmupConfig
from common.generator_step import reproducible
from common.look import PUBLIC, Look, read_look
from server.display import FIT_LINE_S
from server.now import fit_line
from server.records import Progress
from server.rounds import initial_pair
from server.start import has_start, write_start
from server.warmup import Target, fit_generator
from simulations.phantoms.anatomy import render
from simulations.phantoms.cohort import draw_patients, draw_scanner

PHANTOMS = 1000
EFFORT = WarmupConfig(steps=500, batch_size=64, learning_rate=2e-3)
"""Of the fit; a run's own may be shorter, for its sums are noisy and these are not."""
_SEED = 2**32 + 17
"""Not a seed of the command's phantom patients: what a run starts from must not have seen those who are held out."""
_SCANNERS = 8
_RENDERED_PX = 128
_CHUNK = 250


def put_start(config: Config, run: Path, effort: WarmupConfig = EFFORT, phantoms: int = PHANTOMS) -> None:
    """Put the generator that a configuration wants to start from into a run's folder, unless it stands there.

    Args:
        config: The run's configuration, with its classes.
        run: The run's folder.
        effort: Of the fit.
        phantoms: How many there are to learn from.

    Raises:
        StorageError: A file could not be written.
    """
    if config.simulation.start == "phantoms" and not has_start(run):
        write_start(run, pretrain(config, effort, phantoms), config)


def pretrain(config: Config, effort: WarmupConfig = EFFORT, phantoms: int = PHANTOMS) -> nn.Module:
    """Fit a run's generator to phantoms, all of them to every class; print now and then how far it is.

    Args:
        config: The run's configuration, with its classes.
        effort: Of the fit.
        phantoms: How many there are to learn from.

    Guarantees:
        - deterministic: The configuration decides the weights, for equal thread counts.
    """
    torch.set_num_threads(config.performance.threads)
    generator, look = initial_pair(config).generator, read_look(config.image, PUBLIC, {})
    mean = phantom_mean(config, look, phantoms)
    classes = len(config.image.classes)
    goal = Target(look.vectors, mean.repeat(classes, 1), torch.full((classes,), 1 / classes), 1.0)
    rng = reproducible(config.federation.seed, "pretrain", 0)
    began = told = time.monotonic()
    for fit in fit_generator(generator, [goal], effort, config.model.latent_dim, rng):
        now = time.monotonic()
        if fit.step == 1 or now > told + FIT_LINE_S:
            told = now
            print(fit_line("phantoms", Progress(0, fit.step, effort.steps, "fit", {}, now - began)), flush=True)
    return generator


def phantom_mean(config: Config, look: Look, count: int) -> Float[Tensor, "1 dim"]:
    """Return the mean vector of phantoms."""
    pixels = np.stack(phantom_images(config.image.size, count))
    images = torch.from_numpy(pixels)[:, None].expand(-1, config.image.channels, -1, -1) * 2 - 1
    labels = torch.zeros(len(images), dtype=torch.int64)
    with torch.no_grad():
        parts = [look.vectors(*part) for part in zip(images.split(_CHUNK), labels.split(_CHUNK), strict=True)]
    return torch.cat(parts).mean(dim=0, keepdim=True)


@functools.cache
def phantom_images(size: int, count: int) -> list[Float[np.ndarray, "size size"]]:
    """Draw phantoms as the intake would show them: one image of each of some patients, from 0 to 1."""
    patients = draw_patients(count, _SEED)
    scanners = [draw_scanner(number, _SEED) for number in range(_SCANNERS)]
    films = (render(patient, 0, scanners[i % _SCANNERS], _RENDERED_PX) for i, patient in enumerate(patients))
    return [_resized(film, size) for film in films]


def _resized(film: Float[np.ndarray, "rendered rendered"], size: int) -> Float[np.ndarray, "size size"]:
    image = Image.fromarray(film.astype(np.float32)).resize((size, size), Image.Resampling.LANCZOS)
    return np.asarray(image).clip(0, 1)
