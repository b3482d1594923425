"""What a coordinator asks of its own link over loopback: sites in and out, runs started, listed, followed, stopped.

Speaks Flower's control API under the token of the coordinator's home. Out of scope: the link itself (server/link) and
what a run does (server/app).
"""

import json
import os
import time
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path
from typing import final

import httpx
from flwr.common.serde import fab_to_proto, user_config_from_proto, user_config_to_proto
from flwr.proto.control_pb2 import (
    ListNodesRequest,
    ListRunsRequest,
    RegisterNodeRequest,
    StartRunRequest,
    StopRunRequest,
    StreamLogsRequest,
    UnregisterNodeRequest,
)
from flwr.proto.node_pb2 import NodeInfo
from flwr.proto.run_pb2 import Run as FlowerRun
from flwr.supercore.control import ControlHttpClient
from flwr.supercore.fab import Fab
from flwr.supercore.interceptors import RuntimeVersionHttpInterceptor
from flwr.supercore.protobuf.client import ProtobufCall, ProtobufRequestContext

from common.errors import FederationError
from common.flower_environment import flower_environment
from common.flower_run import HERE
from common.node_keys import node_public_pem
from server.bundle import build_bundle, bundle_hash
from server.consortium import Consortium, EnrolledSite, read_settings
from server.own_secrets import read_authority_pem, read_token

RUNNING, FINISHED = "running", "finished"
NODE_GONE, NODE_ONLINE = "unregistered", "online"
"""Words of Flower's own."""
KILLED, UNHEARD = "its process was killed", "No heartbeat received from the task"
"""What the link holds of a run whose process ended without a word: the executor's words, and Flower's own."""
RECONNECT_S = 1.0
LONGEST_OUTAGE_S = 600.0
"""A link that restarts is waited for this long while a run is followed."""


@final
@dataclass(frozen=True)
class Changes:
    """Names of the sites that were let in, that were put out, and whose node key the link does not take."""

    came: list[str]
    went: list[str]
    refused: list[str]


@final
@dataclass(frozen=True)
class NodeStatus:
    """A site's node as the link sees it.

    Attributes:
        name: The site's name.
        node_id: Its number.
        online: Whether it is connected; None while the link does not answer.
        last_seen: "now", ISO 8601, empty if it never connected, or None while the link does not answer.
    """

    name: str
    node_id: int
    online: bool | None
    last_seen: str | None


@final
@dataclass(frozen=True)
class RunStatus:
    """A run as the link sees it.

    Attributes:
        run_id: The link's number of it.
        status: pending, starting, running or finished.
        outcome: completed, failed, stopped, or empty before the end.
        details: Why it failed.
        folder: Its run folder.
        started: When it was submitted, ISO 8601.
    """

    run_id: int
    status: str
    outcome: str
    details: str
    folder: Path
    started: str

    @property
    def name(self) -> str:
        """Return the run's name: that of its folder."""
        return self.folder.name


@final
class _Bearer:
    """Adds the token to each request."""

    def __init__(self, token: str) -> None:
        self._token = token

    def intercept(self, context: ProtobufRequestContext, call_next: ProtobufCall) -> httpx.Response:
        context.request.headers["authorization"] = f"Bearer {self._token}"
        return call_next(context)


@contextmanager
def connect(consortium: Consortium) -> Generator[ControlHttpClient]:
    """Connect to the link of a coordinator's home on this machine.

    Raises:
        FederationError: The link does not answer, or refuses what was asked.
        StorageError: Token or certificate cannot be read.
        ConfigError: federation.toml is wrong.
    """
    os.environ.update(flower_environment(consortium.folder))
    port = read_settings(consortium).control_port
    client = ControlHttpClient.from_server_address(
        server_address=f"127.0.0.1:{port}",
        insecure=False,
        root_certificates=read_authority_pem(consortium),
        interceptors=[RuntimeVersionHttpInterceptor(component_name="flwr CLI"), _Bearer(read_token(consortium))],
    )
    try:
        yield client
    except httpx.HTTPStatusError as error:
        raise FederationError(_refused(error)) from error
    except httpx.HTTPError as error:
        raise FederationError(
            f"The coordinator does not answer on 127.0.0.1:{port} ({type(error).__name__}). "
            f"Start it: fedmedgan-coordinator start {consortium.folder}"
        ) from error
    finally:
        client.close()


def register_sites(client: ControlHttpClient, sites: Mapping[str, EnrolledSite]) -> Changes:
    """Make the link accept exactly the enrolled sites that are not revoked.

    Args:
        client: From `connect`.
        sites: All enrolled sites.

    Returns:
        What changed, and which sites could not be let in.

    Raises:
        EnrolmentError: A node key does not decode; nothing was changed.

    Guarantees:
        - revoked_stays_out: A node key that was put out never comes back, under no name: Flower keeps it as used.
    """
    wanted = {node_public_pem(site.node_public_key): name for name, site in sites.items() if not site.revoked}
    known = {node.public_key: node for node in _registered(client)}
    leaving = {key: node for key, node in known.items() if wanted.get(key) != node.name}
    for node in leaving.values():
        client.UnregisterNode(UnregisterNodeRequest(node_id=node.node_id))
    came: list[str] = []
    refused: list[str] = []
    for key, name in wanted.items():
        if key in known and key not in leaving:
            continue
        try:
            client.RegisterNode(RegisterNodeRequest(public_key=key, name=name))
            came.append(name)
        except httpx.HTTPStatusError:  # one site's key must not keep the others out
            refused.append(name)
    return Changes(sorted(came), sorted(node.name for node in leaving.values()), sorted(refused))


def list_nodes(client: ControlHttpClient) -> list[NodeStatus]:
    """Return the nodes that may connect, by name."""
    return sorted((_node_status(node) for node in _registered(client)), key=lambda status: status.name)


def submit(client: ControlHttpClient, home: Path, config: Path, folder: Path, resume: bool) -> int:
    """Start a run of the installed release.

    Args:
        client: From `connect`.
        home: The coordinator's home, whose keys the run uses.
        config: The run's configuration file, absolute; best one of the run folder.
        folder: The run folder, absolute; best one of the home.
        resume: Take up the run that stands in the folder.

    Returns:
        The link's number of the run.

    Raises:
        FederationError: The link did not take it.

    Guarantees:
        - sites_read_no_paths: Of a run that lies in the home the sites, which may ask the link for these values, read
          no path of this machine.
    """
    bundle = build_bundle()
    names = {"consortium": HERE, "config": _within(config, folder), "out": _within(folder, home.absolute())}
    values = user_config_to_proto({**names, "resume": resume})
    fab = fab_to_proto(Fab(bundle_hash(bundle), bundle, {}))
    answer = client.StartRun(StartRunRequest(fab=fab, override_config=values, federation=""))
    if not answer.HasField("run_id") or not answer.run_id:
        raise FederationError("The link did not take the run; its log says why.")
    return answer.run_id


def list_runs(client: ControlHttpClient, home: Path) -> list[RunStatus]:
    """Return the last runs of a coordinator's home, the newest first."""
    runs = client.ListRuns(ListRunsRequest()).run_dict.values()
    return sorted((_run_status(run, home) for run in runs), key=lambda run: run.started, reverse=True)


def read_run(client: ControlHttpClient, home: Path, run_id: int) -> RunStatus:
    """Return where one run of a coordinator's home stands."""
    return _run_status(_read(client, run_id), home)


def stop_run(client: ControlHttpClient, run_id: int) -> None:
    """Stop a run, unless it has finished: its rounds end; what a site is at work on is not used."""
    try:
        client.StopRun(StopRunRequest(run_id=run_id))
    except httpx.HTTPStatusError:  # so the link answers also where the run finished a moment before
        if _read(client, run_id).status.status != FINISHED:
            raise


def follow(client: ControlHttpClient, run_id: int, gone: Callable[[], bool]) -> Iterator[str]:
    """Yield what a run prints until it ends; a link that restarts meanwhile is waited for.

    Args:
        client: From `connect`.
        run_id: The link's number of the run.
        gone: Whether the run's process is known to have ended: a link that restarted believes for minutes that it runs.

    Raises:
        httpx.HTTPError: The link was away for longer than LONGEST_OUTAGE_S.
    """
    after, answered = 0.0, time.monotonic()
    while True:
        try:
            if gone() and _read(client, run_id).status.status != FINISHED:
                return
            for part in client.StreamLogs(StreamLogsRequest(run_id=run_id, after_timestamp=after)):
                after, answered = max(after, part.latest_timestamp), time.monotonic()
                yield part.log_output
            if _read(client, run_id).status.status == FINISHED:
                return
            answered = time.monotonic()
        except (httpx.TransportError, ValueError):  # ValueError: the stream was cut in the middle of a message
            if time.monotonic() - answered > LONGEST_OUTAGE_S:
                raise
        time.sleep(RECONNECT_S)


def _within(path: Path, folder: Path) -> str:
    return str(path.relative_to(folder) if path.is_relative_to(folder) else path)


def _read(client: ControlHttpClient, run_id: int) -> FlowerRun:
    return client.ListRuns(ListRunsRequest(run_id=run_id)).run_dict[run_id]


def _run_status(run: FlowerRun, home: Path) -> RunStatus:
    out = user_config_from_proto(run.override_config).get("out", "")
    outcome, folder = run.status, home.absolute() / str(out)
    return RunStatus(run.run_id, outcome.status, outcome.sub_status, outcome.details, folder, run.pending_at)


def _registered(client: ControlHttpClient) -> list[NodeInfo]:
    return [node for node in client.ListNodes(ListNodesRequest()).nodes_info if node.status != NODE_GONE]


def _node_status(node: NodeInfo) -> NodeStatus:
    online = node.status == NODE_ONLINE and node.online_until > time.time()
    return NodeStatus(node.name, node.node_id, online, "now" if online else node.last_deactivated_at)


def _refused(error: httpx.HTTPStatusError) -> str:
    status = error.response.status_code
    if status == HTTPStatus.UNAUTHORIZED:
        return "The link does not know this token: control.token was changed. Restart the coordinator."
    try:
        said = json.loads(error.response.text).get("detail", "")
    except (ValueError, AttributeError):
        said = ""
    return f"The link refused what was asked ({status}{': ' + said if said else ''}). Its log says why."
