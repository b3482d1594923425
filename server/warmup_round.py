"""A round of the warm-up: choose what to look at, collect the noisy sums, fit the generator to all of them so far.

Read the loop in server/app first. Out of scope: the fit (server/warmup), lenses (server/lens).
"""

import math
import time
from collections.abc import Generator, Iterator, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import nn

from common import lens as lenses
from common.config import Config
from common.errors import RefusalCode
from common.generator_step import reproducible
from common.greeting import Verdict, pays_for_warm_up
from common.lens import SIGHTS
from common.look import PUBLIC, look_dims, read_look
from common.messages import Arrays, Kind, Request, Scalar
from common.models.vae import take_over_decoder
from common.plan import Plan
from common.secure_sum import WARMUP_GRID
from common.sheets import save_sheet
from common.weights import BOTH, get_weights, set_weights
from server.checkpoint import State, WarmupRelease
from server.cohort import cohort_of, least_sites, taking_part
from server.exchange import Link
from server.ladder import first_rung
from server.lens import choose, make_lens, outlook
from server.looks import fix_look
from server.records import Progress
from server.rounds import Heard, Members, Outcome, initial_pair, make_record, releases
from server.run_folder import RunFolder
from server.start import Beginning
from server.warmup import Detail, Target, fit_generator, target

FIT_SHEETS = (0.02, 0.1, 0.3)
"""How far the first fit is when a sheet shows what the generator draws: most of it is there after a third."""


def warm_up(
    link: Link, config: Config, members: Members, before: Beginning | State, folder: RunFolder
) -> Iterator[Progress | Outcome]:
    """Run round 0 or a refinement; yield progress, and in the end the outcome.

    Args:
        link: The way to the sites.
        config: The run's configuration.
        members: Whom to ask.
        before: The state before the round, or before round 0 what the run starts from.
        folder: The run's, which keeps what was asked for.

    Raises:
        ConfigError: Whatever would be looked at drowns in the noise; nobody was asked.
    """
    started = time.monotonic()
    torch.set_num_threads(config.performance.threads)
    state = before if isinstance(before, State) else None
    number, heard, pair = 0 if state is None else state.round + 1, Heard(), initial_pair(config)
    if before.weights is not None:
        set_weights(pair, before.weights, ("generator",) if state is None else BOTH)
    loss, unseen, so_far = 0.0, tuple[str, ...](), () if state is None else state.warmup
    if config.warmup.share > 0:
        known = None if before.weights is None else pair.generator
        release = yield from _collect(link, config, members, before, folder, number, known, heard)
        if release is None:
            yield None, make_record(number, heard, None, loss, started)
            return
        so_far = (*so_far, release)
        targets = [_target(config, release) for release in so_far]
        unseen = _unseen(config, targets)
        says_little = all(release.look == "means" for release in so_far)
        detail = "free" if not says_little else "alike" if known is None else "kept"
        loss = yield from _fit(config, folder, pair.generator, targets, number, detail, heard)
    take_over_decoder(pair.discriminator, pair.generator)
    weights = get_weights(pair)
    if state is None:
        rung = first_rung(config.train)
        state = State(
            before.run_id, config.digest(), 0, weights, weights, d_steps_per_g_step=rung, cohort=before.cohort
        )
    kept = so_far if number < config.refinements else ()
    after = replace(state, round=number, weights=weights, averaged=weights, warmup=kept)
    yield after, replace(make_record(number, heard, None, loss, started), unseen=unseen)


def _fit(
    config: Config,
    folder: RunFolder,
    generator: nn.Module,
    targets: Sequence[Target],
    number: int,
    detail: Detail,
    heard: Heard,
) -> Generator[Progress, None, float]:
    """Fit the generator to all releases so far, with a few sheets of the first fit, and return the last loss."""
    steps, loss, began = config.warmup.steps, 0.0, time.monotonic()
    shown = {max(1, round(part * steps)) for part in FIT_SHEETS} if number == 0 else set[int]()
    rng = reproducible(config.federation.seed, "fit", number)
    for fit in fit_generator(generator, targets, config.warmup, config.model.latent_dim, rng, detail):
        loss = fit.loss
        if fit.step in shown:
            save_sheet(folder.samples / f"fit-{fit.step:06d}.png", generator, config)
        yield Progress(number, fit.step, steps, "fit", dict(heard.sites), time.monotonic() - began)
    return loss


def _unseen(config: Config, targets: Sequence[Target]) -> tuple[str, ...]:
    """Name the classes that drown in every release: no site has them, or too few patients; noisy counts say so, free.

    How large each class is no site may tell, so that nobody can know it before the sums are there.
    """
    seen = torch.stack([target.weights for target in targets]).sum(dim=0)
    return tuple(name for name, weight in zip(config.image.classes, seen, strict=True) if weight == 0)


def _collect(
    link: Link,
    config: Config,
    members: Members,
    before: Beginning | State,
    folder: RunFolder,
    number: int,
    generator: nn.Module | None,
    heard: Heard,
) -> Generator[Progress, None, WarmupRelease | None]:
    """Ask the sites for one release and return their sum; None where too few are there or answered."""
    cohort, least, settings = before.cohort, config.federation.min_sites, dict[str, Scalar]()
    asked = {name: member for name, member in members.items() if pays_for_warm_up(config, member.greeting)}
    poor = members.keys() - asked.keys()
    if cohort:
        asked, least = taking_part(config, asked, cohort), least_sites(config, cohort)
        settings, poor = dict(cohort_of(cohort).settings()), poor & cohort.keys()
    heard.refused |= dict.fromkeys(sorted(poor), RefusalCode.OVER_BUDGET.value)
    if len(asked) < least:  # whoever is here would be asked, and charged, for nothing
        return None
    look, lens = _where_to_look(config, folder, _willing(asked), number, generator)
    shape = (len(config.image.classes), look_dims(config.image)[look])
    total, variance = np.zeros(shape), 0.0
    request = Request(Kind.WARMUP, before.run_id, number, config.proposal(), {"look": look, **settings}, lens)
    for member, arrays in releases(link, config, asked, request, {"embedding": shape}, heard):
        total += arrays["embedding"] * (WARMUP_GRID if cohort else 1.0)  # a power of two: exact
        variance += member.plan.share_warmup_noise**2
        yield Progress(number, len(heard.sites), len(asked), "sites", dict(heard.sites))
    heard.refused |= dict.fromkeys(sorted(cohort.keys() - asked.keys() - poor), "not-connected")
    if len(heard.sites) < least:
        return None
    return WarmupRelease(look, math.sqrt(variance), {"sum": total, **lens})


def _willing(members: Members) -> list[Plan]:
    """Return the plans of those who will answer, by what they said: whoever refuses makes no sum any clearer."""
    willing = (Verdict.OK, Verdict.OVER_BUDGET)  # of the budget, enough for the warm-up
    plans = [member.plan for member in members.values() if member.greeting.verdict in willing]
    return plans or [member.plan for member in members.values()]


def _where_to_look(
    config: Config, folder: RunFolder, plans: Sequence[Plan], number: int, generator: nn.Module | None
) -> tuple[str, Arrays]:
    """Choose the map of a release by numbers that are public, once a release; with a lens make it."""
    least = config.privacy.min_patients  # those with fewer take no part
    able = [agreed for agreed in plans if agreed.declared_patients >= least] or plans
    largest = PUBLIC if number == 0 else "learned"
    look = fix_look(folder, config.image, number, lambda: choose(outlook(config, able), largest))
    rng = reproducible(config.federation.seed, "lens", number)
    return look, {} if look not in SIGHTS else lenses.to_arrays(make_lens(generator, config, look, rng, number > 0))


def _target(config: Config, release: WarmupRelease) -> Target:
    arrays = dict(release.arrays)
    noisy_sum = torch.from_numpy(np.array(arrays.pop("sum")))
    return target(read_look(config.image, release.look, arrays).vectors, noisy_sum, release.noise_std)
