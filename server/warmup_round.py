"""A round of the warm-up: choose what to look at, collect the noisy sums, fit the generator to all of them so far.

Read the loop in server/app first. Out of scope: the fit (server/warmup), lenses (server/lens).
"""

import math
import time
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import torch
from torch import nn

from common import lens as lenses
from common.config import Config
from common.errors import FederationError
from common.generator_step import reproducible
from common.lens import SIGHTS
from common.look import PUBLIC, look_dims, read_look
from common.messages import Arrays, Kind, Request
from common.models.vae import take_over_decoder
from common.weights import get_weights, set_weights
from server.checkpoint import State, WarmupRelease
from server.exchange import Grid
from server.ladder import first_rung
from server.lens import choose, make_lens, outlook
from server.records import Progress
from server.rounds import Heard, Members, Outcome, initial_pair, make_record, releases
from server.warmup import Target, fit_generator, target


def warm_up(
    grid: Grid, config: Config, members: Members, run_id: str, state: State | None, start: Arrays | None
) -> Iterator[Progress | Outcome]:
    """Run round 0 or a refinement; yield progress, and in the end the outcome.

    Args:
        grid: Flower's grid.
        config: The run's configuration.
        members: Whom to ask.
        run_id: The run, as the sites know it.
        state: Before the round; None before round 0.
        start: Weights of a generator that was trained on public data, for round 0.

    Raises:
        ConfigError: Whatever would be looked at drowns in the noise; nobody was asked.
        FederationError: With secure-sum nobody may take part.
    """
    started = time.monotonic()
    torch.set_num_threads(config.performance.threads)
    number, heard, pair = 0 if state is None else state.round + 1, Heard(), initial_pair(config)
    if state is not None:
        set_weights(pair, state.weights)
    elif start is not None:
        set_weights(pair, start, ("generator",))
    loss, so_far = 0.0, () if state is None else state.warmup
    if config.warmup.share > 0:
        if len(members) < config.federation.min_sites:  # whoever is here would be asked, and charged, for nothing
            yield None, make_record(number, heard, None, loss, started)
            return
        look, lens = _where_to_look(config, members, number, pair.generator if state or start else None)
        shape = (len(config.image.classes), look_dims(config.image)[look])
        total, variance = np.zeros(shape), 0.0
        request = Request(Kind.WARMUP, run_id, number, config.proposal(), {"look": look}, lens)
        for member, arrays in releases(grid, config, members, request, {"embedding": shape}, heard):
            total += arrays["embedding"]
            variance += member.plan.charge_of_warmup().noise_multiplier ** 2
            yield Progress(number, len(heard.sites), len(members), "sites", dict(heard.sites))
        if len(heard.sites) < config.federation.min_sites:
            yield None, make_record(number, heard, None, loss, started)
            return
        so_far = (*so_far, WarmupRelease(look, math.sqrt(variance), {"sum": total, **lens}))
        targets = [_target(config, release) for release in so_far]
        rng = reproducible(config.federation.seed, "fit", number)
        alike = all(release.look == "means" for release in so_far)
        latent = config.model.latent_dim
        for fit in fit_generator(pair.generator, targets, config.warmup, latent, rng, alike):
            loss = fit.loss
            yield Progress(number, fit.step, config.warmup.steps, "fit", dict(heard.sites))
    take_over_decoder(pair.discriminator, pair.generator)
    weights = get_weights(pair)
    if state is None:
        together = config.train.algorithm == "secure-sum"
        cohort = cohort_of(config, members, heard) if together else {}
        rung = first_rung(config.train)
        state = State(run_id, config.digest(), 0, weights, weights, d_steps_per_g_step=rung, cohort=cohort)
    kept = so_far if number < config.refinements else ()
    after = replace(state, round=number, weights=weights, averaged=weights, warmup=kept)
    yield after, make_record(number, heard, None, loss, started)


def cohort_of(config: Config, members: Members, heard: Heard) -> dict[str, int]:
    """Fix who takes part in a run with secure-sum: those who gave the warm-up, or without one, all who may.

    Raises:
        FederationError: Nobody may.
    """
    names = heard.sites if config.warmup.share > 0 else members
    declared = {name: members[name].declared_patients for name in names}
    cohort = {name: patients for name, patients in declared.items() if patients >= config.privacy.min_patients}
    if not cohort:
        raise FederationError(
            f"No site declares privacy.min_patients={config.privacy.min_patients} patients. Lower it, or ask others."
        )
    return cohort


def _where_to_look(config: Config, members: Members, number: int, generator: nn.Module | None) -> tuple[str, Arrays]:
    """Choose the map of a release by numbers that are public; with a lens make it."""
    least = config.privacy.min_patients  # those with fewer take no part
    able = [member for member in members.values() if member.declared_patients >= least] or list(members.values())
    noises = [member.plan.charge_of_warmup().noise_multiplier for member in able]
    patients = sum(member.declared_patients for member in able)
    seen = outlook(config, math.sqrt(sum(noise**2 for noise in noises)), patients)
    look = choose(seen, PUBLIC if number == 0 else "learned")
    rng = reproducible(config.federation.seed, "lens", number)
    return look, {} if look not in SIGHTS else lenses.to_arrays(make_lens(generator, config, look, rng, number > 0))


def _target(config: Config, release: WarmupRelease) -> Target:
    arrays = dict(release.arrays)
    noisy_sum = torch.from_numpy(np.array(arrays.pop("sum")))
    return target(read_look(config.image, release.look, arrays).vectors, noisy_sum, release.noise_std)
