"""The agent: answers typed requests within the site's policy, its ledger and its egress rules.

Order of every private request: check the policy, charge the ledger (fsync), only then touch patients, train, check
what leaves, store the reply, write the journal, answer. Imports no flwr and opens no socket. Whatever the coordinator
sends, a refusal is a code; the reason stays in the site's own log.
"""

import hashlib
import json
import logging
import re
from collections.abc import Callable, Collection
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, final

import numpy as np
import numpy.typing as npt
import torch

from client import journal, policy
from client.channel import pack_reply, unpack_reply
from client.home import Home, head_copy, load_images, one_at_a_time, read_site_config, require_books, require_images
from client.intake import Dataset
from client.ledger import ChargeRequest, Ledger, open_ledger
from client.policy import Policy
from client.train import train_round
from client.warmup import embedding_sum
from common.config import GradientEngine, Proposal
from common.config_text import parse_proposal
from common.crypto import KeyStream, SigningKey, load_key
from common.errors import ConfigError, FedmedganError, IntakeError, PolicyRefusal, RefusalCode, WireError
from common.features import feature_map
from common.files import write_atomic
from common.messages import PROTOCOL_VERSION, Kind, Reply, Request, Scalar
from common.models import Pair, build
from common.noise import gaussian, to_public_grid
from common.plan import Plan, plan
from common.weights import check_arrays, get_weights, set_weights

LOG = logging.getLogger("fedmedgan.agent")
KEPT_REPLIES = 2
SECRET_BYTES = 32
MAX_D_STEPS = 5000
_RUN_ID = re.compile(r"[a-z0-9-]{1,64}")

Secrets = Callable[[str], KeyStream]


def os_secrets(request_digest: str) -> KeyStream:
    """Return a fresh stream from the operating system, whatever the request."""
    del request_digest
    return KeyStream.from_os()


@final
@dataclass(frozen=True)
class Site:
    """A site that can answer: its home, policy, key, ledger and source of secrets."""

    home: Home
    policy: Policy
    key: SigningKey
    ledger: Ledger
    secrets: Secrets = os_secrets
    gradients: GradientEngine = "fast"


def open_site(home: Home, secrets: Secrets = os_secrets) -> Site:
    """Open a site's home and verify its ledger.

    Args:
        home: The site's folder.
        secrets: Where secret randomness comes from. Only the simulator passes anything but the operating system's.

    Raises:
        ConfigError: The policy or site.toml does not read.
        StorageError: The key or the ledger is damaged.
    """
    key = load_key(home.key)
    require_books(home)
    ledger = open_ledger(home.ledger, key, head_copy(home))
    return Site(home, policy.load(home.policy), key, ledger, secrets, read_site_config(home).gradients)


def answer(site: Site, request: Request) -> Reply:
    """Answer one request of the coordinator.

    Args:
        site: The site.
        request: Whatever arrived; nothing in it is trusted.

    Returns:
        The released reply, or a refusal code.

    Guarantees:
        - charged_first: The ledger holds the charge before a patient is touched.
        - journal_before_reply: What a warm-up or a round returns stands in the journal; hello says nothing but what
          the policy makes public.
        - repeat_is_free: The same request again gives the same bytes and charges nothing.
        - one_outcome_per_charge: Whatever fails after the charge, by an error or by kill -9, the same request draws the
          same secrets again; no second sample of patients or noise can be had for one charge.
        - codes_only: A refusal holds no text, no field, no array.
    """
    try:
        if request.kind is Kind.HELLO:
            return _hello(site, request)
        with one_at_a_time(site.home):
            return _private(site, request)
    except FedmedganError as error:
        return _refusal(request, error)


def _hello(site: Site, request: Request) -> Reply:
    policy.check_hello(site.policy)
    declared = site.policy.declared_patients
    fields = {"site": site.policy.site, "declared_patients": declared, "protocol": PROTOCOL_VERSION}
    reply = Reply(request.kind, request.run_id, request.round, None, fields)
    journal.check_egress(reply, journal.release_schema(request.kind, {}))
    return reply


def _private(site: Site, request: Request) -> Reply:
    proposal, digest = _check_request(request), _digest(request)
    policy.check_proposal(site.policy, proposal)
    agreed = plan(proposal, site.policy.declared_patients)
    policy.check_plan(site.policy, agreed)
    released = _released(site)
    reply = _stored_reply(site, request, digest, released)
    if reply is None:
        require_images(site.home, proposal.image.classes, proposal.image.size)
        pair, rng = _weights_of(site, request, proposal)  # what does not decode is refused before it costs anything
        allowed = journal.release_schema(request.kind, journal.reply_shapes(proposal, pair))
        policy.check_reply(site.policy, allowed.size_bytes)
        cost = agreed.charge_of_warmup() if pair is None else agreed.charge_of_round(proposal.train.steps_per_round)
        charge = ChargeRequest(request.run_id, request.round, request.kind, digest)
        spent = site.ledger.charge(charge, cost, site.policy.max_epsilon, site.policy.delta)
        secret = _secret_of_charge(site, request, digest)
        try:
            reply = _release(site, request, proposal, agreed, pair, rng, secret, spent)
            journal.check_egress(reply, allowed, site.policy.max_reply_bytes)
        except FedmedganError as error:  # the charge stands, so this is its one outcome: stored and journaled too
            reply = _refusal(request, error)
        except Exception:  # so is whatever else goes wrong: an outcome that leaves without a line would be a release
            LOG.exception("%s round %d failed after its charge", request.kind, request.round)
            reply = Reply(request.kind, request.run_id, request.round, RefusalCode.INTERNAL)
        _store_reply(site, reply, digest)
    journal.append(site.home.journal, site.key, reply, site.ledger.spent(site.policy.delta), datetime.now(UTC))
    _forget_old_replies(site, request, released)
    return reply


def _release(
    site: Site,
    request: Request,
    proposal: Proposal,
    agreed: Plan,
    pair: Pair | None,
    rng: torch.Generator,
    secret: KeyStream,
    spent: float,
) -> Reply:
    """Touch the patients, once the charge stands."""
    dataset = load_images(site.home, proposal.image.classes, proposal.image.size)
    fields: dict[str, Scalar] = {"epsilon_spent": spent, "epsilon_allowed": site.policy.max_epsilon}
    if pair is None:
        arrays = _warmup(dataset, proposal, agreed, secret)
    else:
        d_steps = int(request.settings["d_steps_per_g_step"])
        trained = train_round(dataset, pair, proposal, agreed, d_steps, secret, rng, site.gradients)
        arrays = get_weights(trained.pair)
        fields |= {"fake_accuracy": trained.fake_accuracy, "d_steps_per_g_step": d_steps}
    return Reply(request.kind, request.run_id, request.round, None, fields, arrays)


def _refusal(request: Request, error: FedmedganError) -> Reply:
    code = error.code if isinstance(error, PolicyRefusal) else _code(error)
    text = str(error).replace("\n", " | ")  # what came in a message cannot write lines of its own into the log
    LOG.warning("%s round %d refused (%s): %s", request.kind, request.round, code, text)
    return Reply(request.kind, request.run_id, request.round, code)


def _check_request(request: Request) -> Proposal:
    """Check what every private request must be, whatever it asks."""
    proposal = parse_proposal(request.proposal)
    if not _RUN_ID.fullmatch(request.run_id):
        raise WireError("Expected a run id of 1 to 64 lower-case letters, digits and hyphens.")
    if not proposal.image.classes:
        raise ConfigError("Expected image.classes to name at least one class.")
    rounds = proposal.federation.rounds
    if request.kind is Kind.TRAIN and not 1 <= request.round <= rounds:
        raise WireError(f"Expected round={request.round} in [1, {rounds}].")
    if request.kind is Kind.WARMUP and (request.round != 0 or proposal.warmup.share == 0):
        raise WireError("Expected a warm-up only in round 0 of a proposal with warmup.share > 0.")
    d_steps = request.settings.get("d_steps_per_g_step")
    whole = type(d_steps) is int and 1 <= d_steps <= MAX_D_STEPS
    wanted = ["d_steps_per_g_step"] if request.kind is Kind.TRAIN else []
    if list(request.settings) != wanted or (wanted and not whole):
        raise WireError(f"Expected the settings {wanted} with whole numbers in [1, {MAX_D_STEPS}].")
    return proposal


def _weights_of(site: Site, request: Request, proposal: Proposal) -> tuple[Pair | None, torch.Generator]:
    """Load the coordinator's weights, or none for a warm-up; nothing of the site goes into them."""
    rng = reproducible(proposal.federation.seed, site.policy.site, request.round)
    if request.kind is Kind.WARMUP:
        check_arrays(request.arrays, {})
        return None, rng
    pair = build(proposal.model, proposal.image, len(proposal.image.classes), rng)
    set_weights(pair, request.arrays)
    return pair, rng


def _warmup(dataset: Dataset, proposal: Proposal, agreed: Plan, secret: KeyStream) -> dict[str, npt.NDArray[Any]]:
    features = feature_map(proposal.image.size)
    sums = embedding_sum(dataset.images, dataset.labels, dataset.patients, len(proposal.image.classes), features)
    std = agreed.charge_of_warmup().noise_multiplier
    noisy = to_public_grid(sums + gaussian(secret, tuple(sums.shape), std), std)
    return {"embedding": noisy.float().numpy()}


def _secret_of_charge(site: Site, request: Request, digest: str) -> KeyStream:
    """Return the stream of a charge, kept on disk until its outcome is stored."""
    path = _reply_path(site, request.run_id, request.kind, request.round).with_suffix(".secret")
    if not path.exists():
        write_atomic(path, site.secrets(digest).read(SECRET_BYTES), 0o600)
    return KeyStream(path.read_bytes())


def reproducible(seed: int, site: str, round_: int) -> torch.Generator:
    """Return the generator of a site's round for everything that is not secret: initial weights, latents, fakes."""
    digest = hashlib.sha256(f"{seed}/{site}/{round_}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def _digest(request: Request) -> str:
    parts = [request.kind.value, str(request.round), request.proposal]
    parts += [json.dumps(dict(request.settings), sort_keys=True)]
    sha = hashlib.sha256("\0".join(parts).encode())
    for name in sorted(request.arrays):
        array = np.ascontiguousarray(request.arrays[name])
        sha.update(f"\0{name}\0{array.dtype}\0{array.shape}\0".encode() + array.tobytes())
    return sha.hexdigest()


def _released(site: Site) -> set[tuple[str, Kind, int]]:
    """Read what stands in the journal; one that is gone or damaged stops the request before anything is done."""
    entries = journal.entries(site.home.journal, site.key.verify_key)
    return {(entry.run_id, entry.kind, entry.round) for entry in entries}


def _stored_reply(
    site: Site, request: Request, digest: str, released: Collection[tuple[str, Kind, int]]
) -> Reply | None:
    """Return the reply that this very request got before, if it is still stored.

    Raises:
        PolicyRefusal: The round was answered to another request, or its answer is no longer stored.
    """
    path = _reply_path(site, request.run_id, request.kind, request.round)
    if path.exists():
        stored_digest, _, frame = path.read_bytes().partition(b"\n")
        if stored_digest == digest.encode():
            path.with_suffix(".secret").unlink(missing_ok=True)  # a kill may have left it beside its outcome
            return unpack_reply(frame)
        raise PolicyRefusal(RefusalCode.REPLAYED, f"Round {request.round} was already answered to another request.")
    if (request.run_id, request.kind, request.round) in released:
        raise PolicyRefusal(RefusalCode.REPLAYED, f"Round {request.round} was answered; its reply is no longer stored.")
    return None


def _store_reply(site: Site, reply: Reply, digest: str) -> None:
    path = _reply_path(site, reply.run_id, reply.kind, reply.round)
    write_atomic(path, digest.encode() + b"\n" + pack_reply(reply), 0o600)
    path.with_suffix(".secret").unlink(missing_ok=True)


def _forget_old_replies(site: Site, request: Request, released: Collection[tuple[str, Kind, int]]) -> None:
    """Keep the last replies of a run, and every one that does not stand in the journal: it has not left yet."""
    of_run = (number for run_id, kind, number in released if (run_id, kind) == (request.run_id, request.kind))
    for round_ in sorted(number for number in of_run if number < request.round)[: 1 - KEPT_REPLIES]:
        _reply_path(site, request.run_id, request.kind, round_).unlink(missing_ok=True)


def _reply_path(site: Site, run_id: str, kind: Kind, round_: int) -> Path:
    return site.home.replies / f"{run_id}-{kind.value}-{round_:06d}.reply"


def _code(error: FedmedganError) -> RefusalCode:
    if isinstance(error, IntakeError):
        return RefusalCode.NO_DATA
    if isinstance(error, ConfigError | WireError):
        return RefusalCode.BAD_REQUEST
    return RefusalCode.INTERNAL
