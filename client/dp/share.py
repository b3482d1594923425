"""A site's share of one discriminator step of all sites together: whole numbers with the site's noise in them.

Gaussian noise on a sum of clipped contributions, as in client/dp/step, rounded to a public grid so that the shares of
many sites add up without rounding. Out of scope: who is sampled (client/draw), how much noise (common/plan), the fakes'
part and the step itself (server/secure_sum).
"""

import numpy as np
import torch
from jaxtyping import Int32

from client.dp.engine import Loss
from client.dp.packing import Batch
from client.dp.step import Noise, rounding
from client.dp.sums import Adder
from common.secure_sum import GRID, to_integers


def integer_share(
    adder: Adder,
    batch: Batch,
    of_real: Loss,
    max_grad_norm: float,
    noise_multiplier: float,
    divisor: float,
    noise: Noise,
) -> Int32[np.ndarray, " gradient"]:
    """Clip each sampled patient's gradient, add them up, add noise and round to the public grid.

    Args:
        adder: From `make_adder`.
        batch: The sampled patients' images; none is a legal batch.
        of_real: The discriminator's loss on real images.
        max_grad_norm: Bound on each patient's contribution.
        noise_multiplier: Deviation of this share's noise over the clipping norm.
        divisor: Public: expected patients of all sites in a step. All sites widen their noise by the same part, else
            one with few patients would add too little for the patients of another.
        noise: Where the noise comes from: secret in deployment.

    Returns:
        The sum in steps of `GRID` clipping norms, flat, in the order of the discriminator's parameters.

    Guarantees:
        - one_clipped_contribution: Before it is rounded, a patient moves the sum by at most `max_grad_norm`, and by
          rounding of floats at most `rounding` of it more; the noise is larger by that much.
        - rounding_is_post_processing: Noise is added first and rounded last; all that leaves is a function of the noisy
          sum.
        - empty_batch_is_noise: With no patient sampled the share is the same noise.
        - always_fits: Whatever the weights, every number fits into 32 bits; what does not is cut.
    """
    adder.prepare(batch.images.shape[1:])
    engine_order = adder.clipped_sum([(batch, of_real)])
    total = torch.cat([part.flatten() for part in adder.by_parameter(engine_order)]).cpu()
    std = noise_multiplier * max_grad_norm * (1 + rounding(divisor))
    return to_integers(total.add_(noise((len(total),), std)), GRID * max_grad_norm)
