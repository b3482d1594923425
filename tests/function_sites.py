"""Sites that are functions, and the round loop over a grid of them in this process."""

import functools
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from flwr.app import Context, Message
from flwr.serverapp import Grid

from client.app import make_app
from common.config import Config, Proposal
from common.config_text import parse_proposal
from common.crypto import SigningKey
from common.errors import RefusalCode
from common.greeting import CAPABILITIES, Greeting, Verdict, planned_rounds
from common.messages import PACKAGE_VERSION, PROTOCOL_VERSION, Arrays, Kind, Reply, Request, Scalar
from common.seal import Trust, sign_reply
from server.app import Event, Job, federate
from server.records import RoundRecord
from server.registered import Registered
from server.run_folder import open_run
from simulations.local_grid import FIRST_NODE_ID, LocalGrid

SMALL_RUN: Mapping[str, Any] = {
    "image.size": 28,
    "image.classes": ("a", "b"),
    "model.name": "mlp",
    "model.generator_width": 8,
    "model.discriminator_width": 8,
    "warmup.share": 0.0,
    "federation.rounds": 3,
    "federation.connect_timeout_s": 5.0,
    "simulation.sites": 3,
}

Release = Callable[[int, Request, Any], tuple[Mapping[str, Scalar], Arrays]]
"""Makes fields and arrays of a reply from the site's index, the request and what its function answered."""

Says = Callable[[int], Mapping[str, Scalar]]
"""What the site of an index says of itself otherwise, at each greeting."""


class AwayGrid(Grid):
    """A grid whose nodes are all away, or some by number, when `away` says so."""

    def __init__(self, grid: Grid, away: Callable[[], bool | Container[int]]) -> None:
        self._grid, self._away = grid, away

    def set_run(self, run: Any) -> None:
        self._grid.set_run(run)

    @property
    def run(self) -> Any:
        return self._grid.run

    def create_message(self, *arguments: Any, **named: Any) -> Message:
        return self._grid.create_message(*arguments, **named)

    def get_node_ids(self) -> list[int]:
        away, ids = self._away(), list(self._grid.get_node_ids())
        if isinstance(away, bool):
            return [] if away else ids
        return [node_id for node_id in ids if node_id - FIRST_NODE_ID not in away]

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        return self._grid.push_messages(messages)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        return self._grid.pull_messages(message_ids)

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        return self._grid.send_and_receive(messages, timeout=timeout)


COORDINATOR = SigningKey(bytes(32))


def run_sites(
    tmp_path: Path,
    config: Config,
    behaviours: Sequence[Callable[[Request], Any]],
    release: Release,
    away: Callable[[], bool] = lambda: False,
    says: Mapping[str, Scalar] | Says | None = None,
) -> list[RoundRecord]:
    """Run a federation of functions, which answer with a refusal or with what `release` understands.

    What they say of themselves in a greeting may be changed by `says`, for all or for each.
    """
    events = follow_sites(tmp_path, config, behaviours, release, away, says=says)
    return [event for event in events if isinstance(event, RoundRecord)]


def follow_sites(
    tmp_path: Path,
    config: Config,
    behaviours: Sequence[Callable[[Request], Any]],
    release: Release,
    away: Callable[[], bool | Container[int]] = lambda: False,
    signed: bool = False,
    says: Mapping[str, Scalar] | Says | None = None,
    revoked: Container[int] = (),
) -> Iterator[Event]:
    """As `run_sites`, with all that happens; if `signed`, the sites are enrolled and sign, as between machines.

    Who is in `revoked` is no longer enrolled.
    """

    def connect(context: Context) -> Callable[[Request], Reply]:
        index = int(context.node_config["partition-id"])
        return functools.partial(_answer, index, behaviours[index], release, says)

    grid = AwayGrid(LocalGrid(make_app(connect), len(behaviours)), away)
    names = {index: f"site-{index}" for index in range(len(behaviours)) if index not in revoked}
    trust = Trust(COORDINATOR, {name: _key(index).verify_key for index, name in names.items()})
    now = Registered(trust, {FIRST_NODE_ID + index: name for index, name in names.items()})
    folder = open_run(tmp_path / "run", config, config.run.resume)
    return federate(grid, Job(config, folder, registered=(lambda: now) if signed else None))


def _key(index: int) -> SigningKey:
    return SigningKey(bytes([index + 1] * 32))


def greeting(name: str, declared_patients: int, proposal: Proposal) -> Greeting:
    """Say what a site of this release says that will join the whole run."""
    rounds = planned_rounds(proposal)
    versions = (PROTOCOL_VERSION, PACKAGE_VERSION, proposal.digest(), CAPABILITIES)
    return Greeting(name, declared_patients, *versions, Verdict.OK, rounds)


def _answer(
    index: int,
    behaviour: Callable[[Request], Any],
    release: Release,
    says: Mapping[str, Scalar] | Says | None,
    request: Request,
) -> Reply:
    return sign_reply(_key(index), request, _unsigned(index, behaviour, release, says, request))


def _unsigned(
    index: int,
    behaviour: Callable[[Request], Any],
    release: Release,
    says: Mapping[str, Scalar] | Says | None,
    request: Request,
) -> Reply:
    if request.kind is Kind.HELLO:
        said = greeting(f"site-{index}", 100 * (index + 1), parse_proposal(request.proposal))
        changes = says(index) if callable(says) else says or {}
        return Reply(request.kind, request.run_id, request.round, None, {**said.as_fields(), **changes})
    answer = behaviour(request)
    if isinstance(answer, RefusalCode):
        return Reply(request.kind, request.run_id, request.round, answer)
    return Reply(request.kind, request.run_id, request.round, None, *release(index, request, answer))
