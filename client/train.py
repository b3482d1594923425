"""One round of local training: private discriminator steps with generator steps between them.

The only line that sees real images is `private_step`. Out of scope: budget (client/ledger), egress (client/journal).
"""

import copy
import functools
from dataclasses import dataclass
from typing import final

import torch

from client.dp import private_optimizer, private_step
from client.draw import draw_patients
from client.intake import Dataset
from common.config import GradientEngine, Proposal
from common.crypto import KeyStream
from common.generator_step import draw_fakes, generator_step, move_average
from common.models import Pair
from common.models.vae import renew_noise
from common.noise import gaussian
from common.plan import Plan


@final
@dataclass(frozen=True)
class Round:
    """What local training gives back; all of it is an output of the private steps or of fakes.

    Attributes:
        pair: The trained discriminator and the averaged generator.
        fake_accuracy: Share of fakes that D tells to be fakes, over the round; 0 where there are none.
    """

    pair: Pair
    fake_accuracy: float


def train_round(
    dataset: Dataset,
    pair: Pair,
    proposal: Proposal,
    plan: Plan,
    d_steps_per_g_step: int,
    secret: KeyStream,
    rng: torch.Generator,
    gradients: GradientEngine = "fast",
) -> Round:
    """Train a site's pair for one round.

    Args:
        dataset: The site's patients.
        pair: The coordinator's weights; trained in place.
        proposal: What to do.
        plan: Sample rate, noise multiplier and divisor, all public.
        d_steps_per_g_step: Private steps for each generator step.
        secret: The source of the patient draw and of the noise.
        rng: Reproducible: latents and classes of fakes, a step's public noise.
        gradients: How gradients of single patients are computed (client/dp).

    Returns:
        The trained pair and D's accuracy on fakes.
    """
    generator, discriminator = pair.generator.train(), pair.discriminator.train()
    averaged = copy.deepcopy(generator)
    noise_multiplier = plan.charge_of_round(proposal.train.steps_per_round).noise_multiplier
    private = private_optimizer(
        discriminator, proposal.privacy, proposal.train, noise_multiplier, plan.divisor, gradients
    )
    noise = functools.partial(gaussian, secret)
    adam = torch.optim.Adam(generator.parameters(), lr=proposal.train.learning_rate_g, betas=(0.5, 0.999))
    fakes_per_step, told = max(1, round(plan.divisor)) if private.losses.of_fake else 0, 0
    for step in range(1, proposal.train.steps_per_round + 1):
        batch = draw_patients(dataset, plan.sample_rate, proposal.privacy, secret)
        with torch.no_grad():
            fakes, labels = draw_fakes(generator, fakes_per_step, proposal, rng)
            told += int((discriminator(fakes, labels) < 0).sum())
        renew_noise(discriminator, rng)
        private_step(private, batch, fakes, labels, noise)
        if step % d_steps_per_g_step == 0:
            generator_step(generator, discriminator, adam, proposal, rng)
            move_average(averaged, generator, proposal.train.ema_decay)
    return Round(Pair(averaged, discriminator), told / max(1, fakes_per_step * proposal.train.steps_per_round))
