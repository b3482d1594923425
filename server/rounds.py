"""The parts of a round: collect and combine the sites' releases, step the global weights.

Read the loop in server/app first. Out of scope: rounds of the warm-up
(server/warmup_round), drawing and writing (server/app, display, report).
"""

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import final

import numpy as np
import torch

from common.config import MAX_EPSILON, Config
from common.errors import WireError
from common.messages import Arrays, Kind, Reply, Request, size_bytes
from common.models import Pair, build
from common.privacy import Charge
from common.seal import content_digest
from common.weights import check_arrays, for_transport, get_weights, only, release_dtype, set_weights
from server import aggregation, robust
from server.aggregation import MeanState
from server.checkpoint import State
from server.exchange import Link, ask
from server.ladder import climb
from server.records import Progress, RoundRecord, SiteRelease
from server.roster import Member

_ROUNDING = 1e-6

Members = Mapping[str, Member]
Outcome = tuple[State | None, RoundRecord]
"""The state after a round, or None where too few sites were heard; and the round's record."""


@final
@dataclass
class Heard:
    """What a round has heard so far; filled while answers come in."""

    sites: dict[str, SiteRelease] = field(default_factory=dict[str, SiteRelease])
    refused: dict[str, str] = field(default_factory=dict[str, str])
    fake_accuracy: list[float] = field(default_factory=list[float])
    upload_bytes: int = 0
    download_bytes: int = 0
    asked: int = 0
    deadline_s: float = 0.0


def initial_pair(config: Config) -> Pair:
    """Build the pair that a run starts from; its weights depend on the seed only."""
    rng = torch.Generator().manual_seed(config.federation.seed)
    return build(config.model, config.image, len(config.image.classes), rng)


def releases(
    link: Link, config: Config, members: Members, request: Request, shapes: Mapping[str, tuple[int, ...]], heard: Heard
) -> Iterator[tuple[Member, Arrays]]:
    """Ask all members the same and yield each valid release, in the order of names.

    Args:
        link: The way to the sites.
        config: The run's configuration.
        members: Whom to ask.
        request: What.
        shapes: The arrays that a release must hold, exactly.
        heard: Filled on the way.
    """
    by_node = {member.node_id: member for member in members.values()}
    requests = dict.fromkeys(by_node, request)
    names = {node_id: member.name for node_id, member in by_node.items()}
    heard.deadline_s = config.federation.round_timeout_s if link.deadline_s is None else link.deadline_s
    for answer in ask(link, requests, heard.deadline_s, names):
        member, reply = by_node[answer.node_id], answer.reply
        heard.asked, heard.download_bytes = heard.asked + 1, heard.download_bytes + answer.download_bytes
        if reply is None:
            heard.refused[member.name] = answer.code
            continue
        try:
            check_arrays(reply.arrays, shapes, release_dtype(config, request.kind))
            heard.sites[member.name] = replace(_release(member, reply, config, request.kind), seconds=answer.seconds)
        except WireError:
            heard.refused[member.name] = "malformed-reply"
            continue
        heard.upload_bytes += answer.upload_bytes
        accuracy, adversary = reply.fields.get("fake_accuracy"), config.model.name != "vae"
        heard.fake_accuracy += [accuracy] if adversary and isinstance(accuracy, float) and 0 <= accuracy <= 1 else []
        yield member, reply.arrays


def train(link: Link, config: Config, members: Members, state: State) -> Iterator[Progress | Outcome]:
    """Run one training round; yield progress, and in the end the outcome."""
    started = time.monotonic()
    number, heard = state.round + 1, Heard()
    settings = {"d_steps_per_g_step": state.d_steps_per_g_step}
    sent = for_transport(state.weights, config.federation.transport)
    request = Request(Kind.TRAIN, state.run_id, number, config.proposal(), settings, sent)
    shapes = {name: tuple(array.shape) for name, array in state.weights.items()}
    mean, updates = MeanState(), list[Arrays]()
    for member, arrays in releases(link, config, members, request, shapes, heard):
        if config.server.aggregation == "mean":
            weight = member.declared_patients if config.server.weights == "declared" else 1
            mean = aggregation.add_to_mean(mean, arrays, float(weight))
        else:
            updates.append({name: np.asarray(array, np.float32) for name, array in arrays.items()})
        yield Progress(number, len(heard.sites), len(members), "sites", dict(heard.sites))
    if len(heard.sites) < config.federation.min_sites:
        yield None, make_record(number, heard, state.d_steps_per_g_step, 0.0, started)
        return
    combined = mean.mean if not updates else robust.combine(config.server.aggregation, updates)
    # seen from the weights as they are, not as they were sent: else rounding would swallow small steps of the server
    combined = {name: array + (state.weights[name] - sent[name]) for name, array in combined.items()}
    moved, optimizer = aggregation.step(config.server, state.weights, combined, state.optimizer)
    averaged = aggregation.average(state.averaged, moved, config.server.ema_decay)
    change = aggregation.norm(moved[name] - state.weights[name] for name in moved)
    record = make_record(number, heard, state.d_steps_per_g_step, change, started)
    after = replace(state, round=number, weights=moved, averaged=averaged, optimizer=optimizer)
    yield climb(config.train, after, record.fake_accuracy if record.fake_accuracy is not None else 1.0), record


def round_bytes(config: Config) -> int:
    """Return the bytes of weights that a round sends to a site; as many come back."""
    arrays = get_weights(initial_pair(config))
    if config.train.algorithm == "secure-sum":
        arrays = only(arrays, "discriminator")
    return size_bytes(for_transport(arrays, config.federation.transport))


def averaged_pair(config: Config, state: State) -> Pair:
    """Return the pair with the averaged weights: its generator is the run's result so far."""
    pair = initial_pair(config)
    set_weights(pair, state.averaged)
    return pair


def _release(member: Member, reply: Reply, config: Config, kind: Kind) -> SiteRelease:
    spent, allowed = reply.fields.get("epsilon_spent"), reply.fields.get("epsilon_allowed")
    if not isinstance(spent, float) or not isinstance(allowed, float):
        raise WireError("Expected epsilon_spent and epsilon_allowed as floats.")
    if not 0 <= spent <= allowed * (1 + _ROUNDING) or not allowed <= MAX_EPSILON:
        raise WireError(f"Expected 0 <= epsilon_spent <= epsilon_allowed <= {MAX_EPSILON:g}.")
    warmup = kind is Kind.WARMUP
    charge: Charge = (
        member.plan.charge_of_warmup() if warmup else member.plan.charge_of_round(config.train.steps_per_round)
    )
    noise, rate, steps = charge.noise_multiplier, charge.sample_rate, charge.steps
    return SiteRelease(member.declared_patients, noise, rate, steps, spent, allowed, content_digest(reply))


def make_record(number: int, heard: Heard, d_steps: int | None, change: float, started: float) -> RoundRecord:
    """Put what a round heard and did into its record."""
    accuracy = sum(heard.fake_accuracy) / len(heard.fake_accuracy) if heard.fake_accuracy else None
    return RoundRecord(
        round=number,
        sites=heard.sites,
        refused=heard.refused,
        fake_accuracy=accuracy,
        d_steps_per_g_step=d_steps,
        update_norm=change,
        seconds=round(time.monotonic() - started, 3),
        upload_bytes=heard.upload_bytes,
        download_bytes=heard.download_bytes,
        asked=heard.asked,
        deadline_s=round(heard.deadline_s, 3),
    )
