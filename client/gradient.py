"""One round of secure-sum at a site: patients drawn, their clipped gradients added up, noise in it, whole numbers out.

Out of scope: budget (client/ledger), egress (client/journal), what the sum of all sites is used for (server).
"""

import functools

import numpy as np
import torch
from jaxtyping import Int32
from torch import nn

from client.dp import integer_share, make_adder
from client.draw import draw_patients
from client.intake import Dataset
from common.config import GradientEngine, Proposal
from common.crypto import KeyStream
from common.losses import losses_of
from common.models.vae import renew_noise
from common.noise import gaussian
from common.plan import Plan


def gradient_share(
    dataset: Dataset,
    discriminator: nn.Module,
    proposal: Proposal,
    plan: Plan,
    secret: KeyStream,
    rng: torch.Generator,
    gradients: GradientEngine = "fast",
) -> Int32[np.ndarray, " gradient"]:
    """Return the site's share of one discriminator step.

    Args:
        dataset: The site's patients.
        discriminator: With the coordinator's weights; they are not changed.
        proposal: Clipping norm, images of a patient and views.
        plan: Sample rate, noise and divisor of the whole federation, all public.
        secret: The source of the patient draw and of the noise.
        rng: Reproducible: what a step has of randomness that is not secret.
        gradients: How gradients of single patients are computed (client/dp).
    """
    privacy = proposal.privacy
    batch = draw_patients(dataset, plan.sample_rate, privacy, secret)
    adder = make_adder(discriminator.train(), privacy, plan.sample_rate * plan.declared_patients, gradients)
    noise = functools.partial(gaussian, secret)
    renew_noise(discriminator, rng)
    of_real = losses_of(discriminator, proposal.train).of_real
    sigma = plan.share_noise_multiplier
    return integer_share(adder, batch, of_real, privacy.max_grad_norm, sigma, plan.divisor, noise)
