"""What goes wrong at virtual hospitals, on purpose: sites that miss a round, and one with little budget left.

Neither the coordinator nor the sites' own code knows of it. Out of scope: who has which patients (partition).
"""

import hashlib

import numpy as np

from client.channel import Transport
from client.home import Home
from client.ledger import ChargeRequest, open_ledger
from client.policy import Policy
from common.config import Config
from common.crypto import load_key
from common.errors import RefusalCode
from common.messages import Kind, Reply, Request
from common.privacy import Charge, noise_for

EARLIER_RUN = "an-earlier-run"


def missing_sites(config: Config, number: int) -> frozenset[int]:
    """Return the partitions of the sites that miss a training round; the seed and the round's number decide.

    Each misses it with the chance `simulation.missing_share`. Where fewer than `federation.min_sites` would be left,
    those with the largest draws stay: a round that hears too few is a matter of its own.
    """
    simulation = config.simulation
    draws = np.random.default_rng((config.federation.seed, number)).random(simulation.sites)
    may_miss = np.argsort(draws)[: simulation.sites - config.federation.min_sites]
    return frozenset(int(index) for index in may_miss if draws[index] < simulation.missing_share)


def missing_at_times(transport: Transport, config: Config, partition: int) -> Transport:
    """Wrap the way to a virtual hospital: in the rounds that it misses, no request reaches it.

    Greeting and warm-up always do: the warm-up is one release for the whole run, for which a coordinator can wait.
    """
    if config.simulation.missing_share == 0:
        return transport

    def ask(request: Request) -> Reply:
        in_a_round = request.kind in (Kind.TRAIN, Kind.GRADIENT)
        if in_a_round and partition in missing_sites(config, request.round):
            return Reply(request.kind, request.run_id, request.round, RefusalCode.UNREACHABLE)
        return transport(request)

    return ask


def spend_before(home: Home, policy: Policy, share: float) -> None:
    """Charge a part of a site's budget for an earlier run, before the run that is simulated.

    The site then refuses by itself what it cannot pay for, as over-budget.

    Args:
        home: Of the site, with nothing charged yet.
        policy: Its bounds.
        share: Part of max_epsilon that the earlier run spent, in (0, 1).

    Raises:
        ConfigError: No noise multiplier costs so little.
        StorageError: The ledger could not be written.
    """
    cost = Charge(noise_for(share * policy.max_epsilon, policy.delta, 1.0, 1), 1.0, 1)
    request = ChargeRequest(EARLIER_RUN, 0, Kind.WARMUP, hashlib.sha256(EARLIER_RUN.encode()).hexdigest())
    open_ledger(home.ledger, load_key(home.key)).charge(request, cost, policy.max_epsilon, policy.delta)
