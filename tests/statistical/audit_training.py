"""The strongest attack on local training that its rules allow. What it reads is scored here and judged by common/audit.

Everything but the site's coins, draws and noise is the adversary's: a coordinator that picks the weights and the
settings, and patients who pick their images. Then each private gradient can be read off the weights that come back:

- D is sure of every image (its last bias is 20) and the clip is tiny, so gradients are far below the 1e-8 that Adam
  adds to their size: a step moves the weights by a constant times the noisy sums, and hardly at all.
- G draws grey, so fakes do not touch the weights of D's first layer.
- Images are rows of a Hadamard matrix: the gradients of two patients in these weights are orthogonal.
"""

import copy
import functools
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from scipy.linalg import hadamard

from client.intake import Dataset
from client.train import train_round
from common.config import Proposal
from common.crypto import KeyStream
from common.models import Pair, build
from common.plan import Plan

SIZE, DELTA, CLIP = 32, 1e-5, 1e-10
_ROWS = (hadamard(SIZE * SIZE)[1:] > 0).reshape(-1, 1, SIZE, SIZE).astype(np.uint8) * 255


def images(first, last):
    """Return rows of the matrix, black and white; there are 1023."""
    return _ROWS[first:last]


def dataset(drawn, patients=None):
    """Give each image a patient of its own, if no other is named."""
    number = len(drawn)
    return Dataset(drawn, np.zeros(number, np.int64), np.arange(number) if patients is None else patients)


@dataclass(frozen=True)
class Training:
    """A run: the plan that is stated, and what is really done with it.

    A clip that is off and noise that stays are a clip `clip_factor` times higher and as much less noise per clip.
    """

    noise_multiplier: float
    sample_rate: float
    declared_patients: int
    steps_per_round: int
    rounds: int = 1
    clip_factor: float = 1.0
    noise_factor: float = 1.0

    def movement(self, data, key):
        """Train as the site does and return how far D's first layer went, as the coordinator sees it."""
        pair, proposal, stream, rng = hostile_pair(), self._proposal(), KeyStream(key), torch.Generator().manual_seed(0)
        start = pair.discriminator.first.weight.detach().clone()
        noise = self.noise_multiplier * self.noise_factor / self.clip_factor
        steps = self.steps_per_round
        plan = Plan(self.declared_patients, self.sample_rate, None, noise, steps * self.rounds, 1.0, DELTA)
        for number in range(self.rounds):
            secret = stream.derive(f"round {number}")
            trained = train_round(data, pair, proposal, plan, steps, secret, rng).pair.discriminator
            pair = Pair(hostile_pair().generator, trained)
        return (pair.discriminator.first.weight.detach() - start).double()

    def _proposal(self):
        return _proposal(self.steps_per_round, CLIP * self.clip_factor)


@functools.cache
def _proposal(steps_per_round=1, max_grad_norm=CLIP):
    return Proposal.model_validate(
        {
            "image": {"size": SIZE, "classes": ("only",)},
            "privacy": {"max_grad_norm": max_grad_norm, "images_per_patient": 50},
            "model": {"name": "mlp", "latent_dim": 2, "generator_width": 8, "discriminator_width": 8},
            "train": {"steps_per_round": steps_per_round, "learning_rate_d": 1e-3, "generator_batch": 2},
        }
    )


def hostile_pair():
    return copy.deepcopy(_hostile_pair())


@functools.cache  # an audit is hundreds of runs from the same weights
def _hostile_pair():
    pair = build(_proposal().model, _proposal().image, 1, torch.Generator().manual_seed(1))
    with torch.no_grad():
        pair.discriminator.last.bias.fill_(20.0)
        pair.generator.last.weight.zero_()
        pair.generator.last.bias.zero_()
    return pair


def directions(drawn, discriminator=None):
    """Return, for each image, the direction in which it alone would move the first layer, of length one."""
    discriminator, found = discriminator or hostile_pair().discriminator, []
    label = torch.zeros(1, dtype=torch.int64)
    for image in torch.from_numpy(drawn).float() / 127.5 - 1:
        loss = F.softplus(-discriminator(image[None], label)).sum()
        gradient = torch.autograd.grad(loss, discriminator.first.weight)[0]
        found.append(-gradient / gradient.norm())
    return torch.stack(found).double()


def along(movement, towards):
    """Score each canary by how far the weights went in its direction."""
    return (towards.flatten(1) @ movement.flatten()).numpy()
