"""A round of secure-sum: whole numbers of all sites in, one step of D, and every few rounds one of G.

G never leaves the coordinator; the sites get D's weights alone. Everything here is post-processing of the sum. Out of
scope: the shares and their noise (client/dp/share), the numbers of the mechanism (common/secure_sum).
"""

import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor, nn

from common.config import Config
from common.generator_step import draw_fakes, generator_step, move_average, reproducible
from common.losses import Loss, bound_weights, losses_of
from common.messages import Kind, Request
from common.models import Pair
from common.plan import plan
from common.secure_sum import GRID
from common.weights import get_weights, named_parameters, only, set_weights
from server import aggregation
from server.aggregation import OptimizerState
from server.checkpoint import State
from server.cohort import cohort_of, least_sites, taking_part
from server.exchange import Link
from server.records import Progress
from server.rounds import Heard, Members, Outcome, averaged_pair, initial_pair, make_record, releases

BETAS = (0.5, 0.999)
_CHUNK = 32


def train_together(link: Link, config: Config, members: Members, state: State) -> Iterator[Progress | Outcome]:
    """Run one round of secure-sum; yield progress, and in the end the outcome."""
    started = time.monotonic()
    torch.set_num_threads(config.performance.threads)
    number, heard = state.round + 1, Heard()
    cohort = cohort_of(state.cohort)
    asked = taking_part(config, members, state.cohort)
    weights = {name: array for name, array in state.weights.items() if name.startswith("discriminator.")}
    request = Request(Kind.GRADIENT, state.run_id, number, config.proposal(), cohort.settings(), weights)
    numbers = sum(array.size for array in weights.values())
    total = np.zeros(numbers, np.int64)
    for _, arrays in releases(link, config, asked, request, {"gradient": (numbers,)}, heard):
        total += arrays["gradient"]
        yield Progress(number, len(heard.sites), len(asked), "sites", dict(heard.sites))
    heard.refused |= dict.fromkeys(sorted(set(state.cohort) - set(asked)), "not-connected")
    if len(heard.sites) < least_sites(config, state.cohort):
        yield None, make_record(number, heard, state.d_steps_per_g_step, 0.0, started)
        return
    divisor = plan(config, min(state.cohort.values()), cohort).divisor
    after, told = step_together(config, state, total, divisor)
    heard.fake_accuracy += [] if told is None else [told]
    change = aggregation.norm(after.weights[name] - state.weights[name] for name in after.weights)
    yield after, make_record(number, heard, state.d_steps_per_g_step, change, started)


def step_together(
    config: Config, state: State, total: npt.NDArray[np.int64], divisor: float
) -> tuple[State, float | None]:
    """Step D on the sum of all shares and on as many fakes; step G and its average when it is their turn.

    Args:
        config: The run's configuration.
        state: Before the round.
        total: Sum of the shares, in grid steps, flat in the order of D's parameters.
        divisor: Public: expected patients. The sum of reals and fakes is divided by twice this, whoever answered.

    Returns:
        The state after the round, and the share of its fakes that D told to be fakes before the step; None without any.

    Guarantees:
        - deterministic: State and sum decide the result, bit for bit with the same number of threads; fakes follow from
          the run's seed and the round.
        - public_divisor: The divisor depends neither on the batch nor on who answered.
    """
    pair, number = initial_pair(config), state.round + 1
    set_weights(pair, state.weights)
    generator, discriminator = pair.generator.train(), pair.discriminator.train()
    rng = reproducible(config.federation.seed, "coordinator", number)
    losses, told = losses_of(discriminator, config.train), None
    norm = config.privacy.max_grad_norm
    both = torch.from_numpy(total).double() * (GRID * norm)
    if losses.of_fake is not None:
        fakes, labels, told = _draw_and_tell(pair, max(1, round(divisor)), config, rng)
        both += clipped_sum_of_fakes(discriminator, fakes, labels, losses.of_fake, norm)
    gradient = (both / (2 * divisor)).float()
    adam_d = _adam(pair, "discriminator", config.train.learning_rate_d, state.optimizer, state.round)
    parameters = list(discriminator.parameters())
    for parameter, part in zip(parameters, gradient.split([p.numel() for p in parameters]), strict=True):
        parameter.grad = part.view(parameter.shape)
    adam_d.step()
    bound_weights(discriminator, losses)
    moments, averaged = _moments(pair, "discriminator", adam_d), dict(state.averaged)
    if number % state.d_steps_per_g_step == 0:
        steps_before = state.round // state.d_steps_per_g_step
        adam_g = _adam(pair, "generator", config.train.learning_rate_g, state.optimizer, steps_before)
        generator_step(generator, discriminator, adam_g, config, rng)
        moments = _merged(moments, _moments(pair, "generator", adam_g))
        kept = averaged_pair(config, state)
        move_average(kept.generator, generator, config.train.ema_decay)
        averaged = get_weights(kept)
    weights = get_weights(pair)
    averaged |= {f"discriminator.{name}": array for name, array in only(weights, "discriminator").items()}
    optimizer = _merged(state.optimizer, moments)
    return replace(state, round=number, weights=weights, averaged=averaged, optimizer=optimizer), told


def clipped_sum_of_fakes(
    discriminator: nn.Module,
    fakes: Float[Tensor, "fakes channels size size"],
    labels: Int64[Tensor, " fakes"],
    of_fake: Loss,
    max_grad_norm: float,
) -> Float64[Tensor, " gradient"]:
    """Clip the gradient of each fake as a patient's is clipped, and add them up, flat.

    Fakes are no patients and need no clipping; it keeps the two halves of the loss in balance (Bie et al. 2023,
    arXiv 2302.02936). A gradient that is not finite counts as zero.
    """
    parameters = {name: parameter.detach() for name, parameter in discriminator.named_parameters()}

    def loss(weights: Mapping[str, Tensor], image: Tensor, label: Tensor) -> Tensor:
        logits = torch.func.functional_call(discriminator, dict(weights), (image[None], label[None]))
        return of_fake(logits).squeeze(0)

    of_each = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0))
    total = torch.zeros(sum(parameter.numel() for parameter in parameters.values()), dtype=torch.float64)
    for images, classes in zip(fakes.split(_CHUNK), labels.split(_CHUNK), strict=True):
        gradients: Mapping[str, Tensor] = of_each(parameters, images, classes)
        rows = torch.cat([gradients[name].flatten(1) for name in parameters], dim=1).double()
        norms = rows.norm(dim=1)
        factors = torch.where(norms < math.inf, max_grad_norm / norms.clamp(min=max_grad_norm), 0.0)
        total += factors @ torch.where((norms < math.inf)[:, None], rows, 0.0)
    return total


def _draw_and_tell(
    pair: Pair, count: int, config: Config, rng: torch.Generator
) -> tuple[Float[Tensor, "count channels size size"], Int64[Tensor, " count"], float]:
    """Draw fakes with their labels, and return with them the share that D tells to be fakes."""
    with torch.no_grad():
        fakes, labels = draw_fakes(pair.generator, count, config, rng)
        return fakes, labels, int((pair.discriminator(fakes, labels) < 0).sum()) / count


def _adam(pair: Pair, network: str, learning_rate: float, moments: OptimizerState, steps: int) -> torch.optim.Adam:
    """Make the Adam of a network as it stood after so many steps."""
    named = named_parameters(pair, (network,))
    adam = torch.optim.Adam([parameter for _, parameter in named], lr=learning_rate, betas=BETAS)
    for name, parameter in named if named[0][0] in moments.first else ():
        adam.state[parameter] = {
            "step": torch.tensor(float(steps)),
            "exp_avg": torch.from_numpy(np.array(moments.first[name])),
            "exp_avg_sq": torch.from_numpy(np.array(moments.second[name])),
        }
    return adam


def _moments(pair: Pair, network: str, adam: torch.optim.Adam) -> OptimizerState:
    def of(key: str) -> dict[str, npt.NDArray[Any]]:
        named = named_parameters(pair, (network,))
        return {name: adam.state[parameter][key].numpy() for name, parameter in named if parameter in adam.state}

    return OptimizerState(of("exp_avg"), of("exp_avg_sq"))


def _merged(old: OptimizerState, new: OptimizerState) -> OptimizerState:
    return OptimizerState({**old.first, **new.first}, {**old.second, **new.second})
