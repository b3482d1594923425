"""One round of secure-sum at a site: patients drawn, their clipped gradients added up, noise in it, whole numbers out.

Out of scope: budget (client/ledger), egress (client/journal), what the sum of all sites is used for (server).
"""

import functools

import numpy as np
from jaxtyping import Int32
from torch import nn

from client.dp import integer_share, make_adder
from client.draw import draw_patients
from client.intake import Dataset
from common.config import GradientEngine, Proposal
from common.crypto import KeyStream
from common.noise import gaussian
from common.plan import Plan


def gradient_share(
    dataset: Dataset,
    discriminator: nn.Module,
    proposal: Proposal,
    plan: Plan,
    secret: KeyStream,
    gradients: GradientEngine = "fast",
) -> Int32[np.ndarray, " gradient"]:
    """Return the site's share of one discriminator step.

    Args:
        dataset: The site's patients.
        discriminator: With the coordinator's weights; they are not changed.
        proposal: Clipping norm, images of a patient and views.
        plan: Sample rate, noise and divisor of the whole federation, all public.
        secret: The source of the patient draw and of the noise.
        gradients: How gradients of single patients are computed (client/dp).
    """
    privacy = proposal.privacy
    batch = draw_patients(dataset, plan.sample_rate, privacy, secret)
    adder = make_adder(discriminator.train(), privacy, plan.sample_rate * plan.declared_patients, gradients)
    noise = functools.partial(gaussian, secret)
    return integer_share(adder, batch, privacy.max_grad_norm, plan.share_noise_multiplier, plan.divisor, noise)
