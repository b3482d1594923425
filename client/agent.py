"""The agent: answers typed requests within the site's policy, its ledger and its egress rules.

Order of every private request: check the policy, charge the ledger (fsync), only then touch patients, train, check
what leaves, store the reply, write the journal, answer. Imports no flwr and opens no socket. Whatever the coordinator
sends, a refusal is a code; the reason stays in the site's own log.
"""

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from typing import Any, final

import numpy.typing as npt
import torch

from client import journal, policy
from client.gradient import gradient_share
from client.hello import say_hello
from client.home import Home, load_images, one_at_a_time, require_books, require_images
from client.intake import Dataset
from client.ledger import ChargeRequest, Ledger, open_ledger
from client.logs import printable
from client.policy import Policy, PolicyFile
from client.question import check_question
from client.replies import forget_old_replies, prepare_secret, secret_of_charge, store_reply, stored_reply
from client.site_config import head_copy, read_site_config
from client.train import train_round
from client.warmup import embedding_sum
from common.config import GradientEngine, Proposal
from common.crypto import KeyStream, SigningKey, VerifyKey, load_key
from common.errors import ConfigError, FedmedganError, IntakeError, PolicyRefusal, RefusalCode, WireError
from common.generator_step import reproducible
from common.look import Look, read_look
from common.messages import Kind, Reply, Request, Scalar
from common.models import Pair, build
from common.noise import gaussian, to_public_grid
from common.passphrase import Passphrase
from common.plan import Plan, plan
from common.privacy import Charge
from common.seal import check_request, request_digest, require_in_time, sign_reply
from common.secure_sum import COHORT_SETTINGS, WARMUP_GRID, Cohort, parse_cohort, to_integers
from common.weights import BOTH, for_transport, get_weights, release_dtype, set_weights

LOG = logging.getLogger("fedmedgan.agent")

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
    rules: PolicyFile
    key: SigningKey
    ledger: Ledger
    secrets: Secrets = os_secrets
    gradients: GradientEngine = "fast"
    coordinator: VerifyKey | None = None
    """Whose requests are answered; None: those of whoever reaches the agent, on one machine."""
    clock: Callable[[], float] = time.time

    @property
    def policy(self) -> Policy:
        """The policy as it was read for the request under way."""
        seen = self.rules.seen
        return seen if self.coordinator is None else policy.between_machines(seen)


def open_site(
    home: Home,
    secrets: Secrets = os_secrets,
    coordinator: VerifyKey | None = None,
    ask: Callable[[], Passphrase] | None = None,
) -> Site:
    """Open a site's home and verify its ledger.

    Args:
        home: The site's folder.
        secrets: Where secret randomness comes from. Only the simulator passes anything but the operating system's.
        coordinator: Whose requests are answered; None for everybody's, within one machine.
        ask: Gives the passphrase of the identity key, where it has one.

    Raises:
        ConfigError: The policy or site.toml does not read.
        StorageError: The key or the ledger is damaged.
        PassphraseError: The key is kept under a passphrase, and `ask` does not give it.
    """
    key = load_key(home.key, ask)
    require_books(home)
    ledger = open_ledger(home.ledger, key, head_copy(home))
    gradients = read_site_config(home).gradients
    return Site(home, PolicyFile(home.policy), key, ledger, secrets, gradients, coordinator)


def answer(site: Site, request: Request) -> Reply:
    """Answer one request of the coordinator.

    Args:
        site: The site.
        request: Whatever arrived; nothing in it is trusted.

    Returns:
        The released reply, or a refusal code.

    Guarantees:
        - charged_first: The ledger holds the charge before a patient is touched.
        - journal_before_reply: What a warm-up or a round returns stands in the journal; hello says nothing but who
          the site is, by its policy, what is installed, and how far the budget carries the run (client/hello).
        - repeat_is_free: The same request again gives the same bytes and charges nothing.
        - one_outcome_per_charge: Whatever fails after the charge, by an error or by kill -9, the same request draws the
          same secrets again; no second sample of patients or noise can be had for one charge, not even by putting
          older journals and replies back.
        - policy_of_the_moment: policy.toml is read anew for each request, for a repeated one too, and one that does not
          read allows nothing.
        - codes_only: A refusal holds no text, no field, no array.
        - pinned_coordinator_only: With a coordinator's key, what that key did not sign, or too long ago, is refused
          before anything is read for it; nor is anything answered once the site has left; and every answer is signed
          by the site for this very request.
        - no_unmasked_shares: With a coordinator's key, a share with part of the noise is refused, whatever the policy.
        - timely_at_its_turn: What waited for the home is held against its deadline again, and against leaving, before
          anything is charged.
    """
    try:
        if site.coordinator is not None:
            _require_joined(site)
            check_request(site.coordinator, request, site.clock(), site.key.verify_key)
        if request.kind is Kind.HELLO:
            reply = _hello(site, request)
        else:
            with one_at_a_time(site.home):
                if site.coordinator is not None:  # an import or another agent may have held the home for hours
                    _require_joined(site)
                    require_in_time(request, site.clock())
                reply = _private(site, request)
    except FedmedganError as error:
        reply = _refusal(request, error)
    return sign_reply(site.key, request, reply)


def _require_joined(site: Site) -> None:
    if not site.home.federation.exists():
        raise PolicyRefusal(RefusalCode.POLICY, "This site has left the federation. Stop what still runs.")


def _hello(site: Site, request: Request) -> Reply:
    site.rules.refresh()
    greeting = say_hello(site.home, site.policy, site.ledger.entries, request)
    reply = Reply(request.kind, request.run_id, request.round, None, greeting.as_fields())
    journal.check_egress(reply, journal.release_schema(request.kind, {}))
    return reply


def _private(site: Site, request: Request) -> Reply:
    site.rules.refresh()
    proposal, digest = check_question(request), request_digest(request)
    policy.check_proposal(site.policy, proposal)
    agreed = plan(proposal, site.policy.declared_patients, _cohort(site, request, proposal))
    policy.check_plan(site.policy, agreed)
    site.ledger.require_within(site.policy.max_epsilon, site.policy.delta)
    released, replies = _released(site), site.home.replies
    reply = stored_reply(replies, request, digest, released)
    if reply is None:
        require_images(site.home, proposal.image.classes, proposal.image.size, proposal.image.channels)
    asked, rng = _asked(site, request, proposal)  # what does not decode is refused before it costs anything
    warmup = isinstance(asked, Look)
    shapes = journal.reply_shapes(proposal, asked.dim if warmup else asked)
    allowed = journal.release_schema(request.kind, shapes, release_dtype(proposal, request.kind))
    policy.check_reply(site.policy, allowed.size_bytes)
    if reply is None:
        cost = agreed.charge_of_warmup() if warmup else agreed.charge_of_round(proposal.train.steps_per_round)
        _require_one_price(site, request, cost)
        charge = ChargeRequest(request.run_id, request.round, request.kind, digest)
        prepare = partial(prepare_secret, replies, request, lambda: site.secrets(digest))
        spent = site.ledger.charge(charge, cost, site.policy.max_epsilon, site.policy.delta, prepare)
        secret = secret_of_charge(replies, request)
        try:
            reply = _release(site, request, proposal, agreed, asked, rng, secret, spent)
            journal.check_egress(reply, allowed, site.policy.max_reply_bytes)
        except FedmedganError as error:  # the charge stands, so this is its one outcome: stored and journaled too
            reply = _refusal(request, error)
        except Exception:  # so is whatever else goes wrong: an outcome that leaves without a line would be a release
            LOG.exception("%s round %d failed after its charge", request.kind, request.round)
            reply = Reply(request.kind, request.run_id, request.round, RefusalCode.INTERNAL)
        store_reply(replies, reply, digest)
    journal.check_egress(reply, allowed, site.policy.max_reply_bytes)  # a stored one too, by the policy of the moment
    journal.append(site.home.journal, site.key, reply, site.ledger.spent(site.policy.delta), datetime.now(UTC))
    forget_old_replies(replies, request, released)
    return reply


def _release(
    site: Site,
    request: Request,
    proposal: Proposal,
    agreed: Plan,
    asked: Look | Pair,
    rng: torch.Generator,
    secret: KeyStream,
    spent: float,
) -> Reply:
    """Touch the patients, once the charge stands."""
    dataset = load_images(site.home, proposal.image.classes, proposal.image.size, proposal.image.channels)
    fields: dict[str, Scalar] = {"epsilon_spent": spent, "epsilon_allowed": site.policy.max_epsilon}
    if isinstance(asked, Look):
        arrays = _warmup(dataset, proposal, agreed, asked, secret)
    elif request.kind is Kind.GRADIENT:
        share = gradient_share(dataset, asked.discriminator, proposal, agreed, secret, rng, site.gradients)
        arrays = {"gradient": share}
    else:
        d_steps = int(request.settings["d_steps_per_g_step"])
        trained = train_round(dataset, asked, proposal, agreed, d_steps, secret, rng, site.gradients)
        arrays = dict(for_transport(get_weights(trained.pair), proposal.federation.transport))  # after the noise: free
        fields |= {"fake_accuracy": trained.fake_accuracy, "d_steps_per_g_step": d_steps}
    return Reply(request.kind, request.run_id, request.round, None, fields, arrays)


def _refusal(request: Request, error: FedmedganError) -> Reply:
    code = error.code if isinstance(error, PolicyRefusal) else _code(error)
    LOG.warning("%s round %d refused (%s): %s", request.kind, request.round, code, printable(str(error)))
    return Reply(request.kind, request.run_id, request.round, code)


def _cohort(site: Site, request: Request, proposal: Proposal) -> Cohort | None:
    if proposal.train.algorithm == "local":
        return None
    stated = {name: request.settings[name] for name in COHORT_SETTINGS}
    return parse_cohort(stated, site.policy.declared_patients, proposal.privacy.min_patients)


def _require_one_price(site: Site, request: Request, cost: Charge) -> None:
    """Refuse a gradient, or a release of the warm-up, at another price than the run's first: one plan a run.

    Else a coordinator could choose rate and noise anew in each round by what it has seen, and every other price in the
    ledger makes all later accounts slower.
    """
    before = [entry for entry in site.ledger.entries if entry.request.run_id == request.run_id]
    alike = [entry.charge for entry in before if entry.request.kind is request.kind is not Kind.TRAIN]
    if alike and alike[0] != cost:
        raise PolicyRefusal(
            RefusalCode.POLICY,
            f"Expected round {request.round} at the price of the run's first, {alike[0]}, got {cost}: the cohort "
            "or the proposal changed. Start another run.",
        )


def _asked(site: Site, request: Request, proposal: Proposal) -> tuple[Look | Pair, torch.Generator]:
    """Read what is to be looked at, or the coordinator's weights; nothing of the site goes into them."""
    rng = reproducible(proposal.federation.seed, site.policy.site, request.round)
    if request.kind is Kind.WARMUP:
        return read_look(proposal.image, request.settings.get("look"), request.arrays), rng
    pair = build(proposal.model, proposal.image, len(proposal.image.classes), rng)
    networks = BOTH if request.kind is Kind.TRAIN else ("discriminator",)
    set_weights(pair, request.arrays, networks, proposal.federation.transport)
    return pair, rng


def _warmup(
    dataset: Dataset, proposal: Proposal, agreed: Plan, look: Look, secret: KeyStream
) -> dict[str, npt.NDArray[Any]]:
    sums = embedding_sum(dataset.images[:], dataset.labels, dataset.patients, len(proposal.image.classes), look)
    std = agreed.share_warmup_noise
    noisy = sums + gaussian(secret, tuple(sums.shape), std)
    if agreed.cohort is not None:
        return {"embedding": to_integers(noisy, WARMUP_GRID)}
    return {"embedding": to_public_grid(noisy, std).float().numpy()}


def _released(site: Site) -> set[tuple[str, Kind, int]]:
    """Read what stands in the journal; one that is gone or damaged stops the request before anything is done."""
    entries = journal.entries(site.home.journal, site.key.verify_key)
    return {(entry.run_id, entry.kind, entry.round) for entry in entries}


def _code(error: FedmedganError) -> RefusalCode:
    if isinstance(error, IntakeError):
        return RefusalCode.NO_DATA
    if isinstance(error, ConfigError | WireError):
        return RefusalCode.BAD_REQUEST
    return RefusalCode.INTERNAL
