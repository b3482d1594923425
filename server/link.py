"""The link: Flower's SuperLink inside this process, behind two listeners of our own.

    public   all interfaces, TLS: /v1/fleet/* for callers that hold an enrolled node key, and /health
    admin    loopback, TLS: the control API under a token, the runtime API under the executor's secret, and /health

The only module that starts Flower's server; tests/contracts/test_flower_link.py pins what it relies on.
Out of scope: enrolment (server/consortium), what the control API is asked (server/control).
"""

import asyncio
import ipaddress
import logging
import socket
import sys
import threading
import time
from base64 import b64decode
from datetime import datetime
from http import HTTPStatus
from pathlib import Path
from typing import NoReturn, cast

import uvicorn
from flwr.common.constant import SYSTEM_TIME_TOLERANCE, TIMESTAMP_HEADER, TIMESTAMP_TOLERANCE
from flwr.server.superlink.linkstate import LinkStateFactory
from flwr.supercore.constant import FLEET_HTTP_PUBLIC_KEY_HEADER, FLEET_HTTP_SIGNATURE_HEADER
from flwr.supercore.date import now
from flwr.supercore.primitives.asymmetric import bytes_to_public_key, verify_signature
from flwr.superlink.auth_plugin import NoOpControlAuthnPlugin
from flwr.superlink.cli.flower_superlink import SuperLinkLifespan
from flwr.superlink.config_loader import SuperLinkLifespanConfig
from flwr.superlink.main import create_app
from starlette.concurrency import run_in_threadpool
from uvicorn.config import LifespanType

from common.errors import ConfigError, ExitCode, FedmedganError
from server.connections import PromptProtocol, PromptServer, raise_file_limit
from server.consortium import Consortium, FederationConfig, enrolled, load_consortium, read_settings
from server.control import connect, list_nodes, register_sites
from server.gate import Admit, Application, Gate, Headers, Limits
from server.outage import keep_runs, keep_unheard_runs
from server.own_secrets import is_token, read_secret, read_token
from server.registered import write_nodes
from server.supervise import started_process

LOG = logging.getLogger("fedmedgan.link")

PUBLIC_LIMITS = Limits(body_bytes=32 << 10, bodies=16, bodies_a_caller=4, larger={"/v1/fleet/push-object": 8 << 20})
"""Flower sends arrays in chunks of 5 MB. All else names and asks: the names of a gigabyte's parts take 15 KiB. The
link's database takes in some hundred names a second, and does nothing else meanwhile. A site sends two parts at a time;
a place more each for one whose connection broke and whose end is not known yet."""
ADMIN_LIMITS = Limits(body_bytes=16 << 20, bodies=16)
"""A bundle may have 10 MiB."""
MAX_CONNECTIONS, MAX_SHAKING = 512, 256
"""Of each listener: connections, and handshakes beside them. Fewer where the process may not open enough files: a
quarter and an eighth of them, so that both listeners, the database and the log always have theirs."""
FIRST_WATCH_S, WATCH_S = 0.2, 2.0
"""How often the files of the home are looked at: sites that come and go, a renewed certificate."""
FIRST_LOOKS = 10
"""After so many looks in vain who is not known is refused, and not asked to come again: that would go on for as long as
the home stays as it is."""
SHUTDOWN_S = 5
BIND_S = 10.0


def sites_only(states: LinkStateFactory, registered: threading.Event) -> Admit:
    """Admit to the public listener who signs with the node key of an enrolled site, and anybody to /health.

    Args:
        states: Knows the node keys.
        registered: Set once the link has been told the sites of the home, or could not be for `FIRST_LOOKS` looks. A
            key that is not known before may be one of theirs: who signs with it is asked to come again, and not told
            that it was revoked.
    """

    async def admit(method: str, path: str, headers: Headers) -> HTTPStatus:
        """Say what a request gets before its body is read."""
        if (method, path) == ("GET", "/health"):
            return HTTPStatus.OK
        if method != "POST" or not path.startswith("/v1/fleet/"):
            return HTTPStatus.NOT_FOUND
        refusal = HTTPStatus.UNAUTHORIZED if registered.is_set() else HTTPStatus.SERVICE_UNAVAILABLE
        signed = await run_in_threadpool(_signed_by_a_site, headers, states)
        return HTTPStatus.OK if signed else refusal

    return admit


def node_key(headers: Headers) -> bytes:
    """Return the node key that an admitted request is signed with."""
    return b64decode(headers.get(FLEET_HTTP_PUBLIC_KEY_HEADER, ""))


def coordinator_only(token: str) -> Admit:
    """Admit to the admin listener: the control API under the token, the runtime API, which has secrets of its own."""

    async def admit(method: str, path: str, headers: Headers) -> HTTPStatus:
        """Say what a request gets before its body is read."""
        if (method, path) == ("GET", "/health"):
            return HTTPStatus.OK
        if method == "POST" and path.startswith("/v1/control/"):
            return HTTPStatus.OK if is_token(headers.get("authorization", ""), token) else HTTPStatus.UNAUTHORIZED
        return HTTPStatus.OK if method == "POST" and path.startswith("/v1/runtime/") else HTTPStatus.NOT_FOUND

    return admit


def run_link(consortium: Consortium, stop: threading.Event) -> None:
    """Serve until `stop` is set, and keep the link's list of sites as the home has it.

    Raises:
        ConfigError: federation.toml is wrong, or a port is in use.
        StorageError: A key, a secret or the database cannot be read.
    """
    settings, files = read_settings(consortium), raise_file_limit()
    LOG.info("this process may open %d files", files)
    app, states = _superlink(consortium, settings)
    registered = threading.Event()
    admin = _server(Gate(app, coordinator_only(read_token(consortium)), ADMIN_LIMITS), consortium, files, "on")
    public = _server(Gate(app, sites_only(states, registered), PUBLIC_LIMITS, node_key), consortium, files, "off")
    servers = [
        (admin, _bind("127.0.0.1", settings.control_port)),
        (public, _bind(bind_address(settings), settings.port)),
    ]
    thread = threading.Thread(target=lambda: asyncio.run(_serve(servers)), daemon=True)
    thread.start()
    try:
        _watch(consortium, [admin, public], states, registered, thread, stop)
    finally:
        for server, _ in servers:
            server.should_exit = True
        thread.join(2 * SHUTDOWN_S)


def bind_address(settings: FederationConfig) -> str:
    """Return the address that the public listener binds: loopback for a federation on one machine, else all of IPv4."""
    try:
        return "127.0.0.1" if ipaddress.ip_address(settings.host).is_loopback else "0.0.0.0"  # noqa: S104
    except ValueError:
        return "127.0.0.1" if settings.host == "localhost" else "0.0.0.0"  # noqa: S104


def _superlink(consortium: Consortium, settings: FederationConfig) -> tuple[Application, LinkStateFactory]:
    database = consortium.database
    config = SuperLinkLifespanConfig(
        control_address="127.0.0.1:0",
        health_server_address=None,
        host="127.0.0.1",
        port=settings.control_port,
        insecure=False,
        certificates=None,  # read by Flower's own listeners only, and there are none
        superexec_auth_secret=read_secret(consortium),
        authn_plugin=NoOpControlAuthnPlugin(),  # the gate stands before: all of /v1/control/ needs the token
        event_log_plugin=None,
        fleet_event_log_plugin=None,
        enable_event_log=False,
        artifact_provider=None,
        enable_supernode_auth=True,
        fleet_api_type="grpc-rere",
        fleet_api_address=None,
        simulation=False,
        ssl_ca_certfile=str(consortium.ca_pem),
        ssl_certfile=str(consortium.server_pem),
        ssl_keyfile=str(consortium.server_key),
        database=str(database),
        isolation="process",
        runtime_dependency_install=False,
    )
    app = create_app(config, SuperLinkLifespan)
    database.chmod(0o600)
    states = cast("LinkStateFactory", app.state.linkstate_factory)
    keep_runs(states)
    return cast("Application", app), states


def _server(gate: Gate, consortium: Consortium, files: int, lifespan: LifespanType) -> PromptServer:
    return PromptServer(
        uvicorn.Config(
            cast("Application", gate),
            lifespan=lifespan,
            ssl_certfile=str(consortium.server_pem),
            ssl_keyfile=str(consortium.server_key),
            http=PromptProtocol,  # h11, which bounds the size of headers
            ws="none",
            log_config=None,
            access_log=False,
            proxy_headers=False,
            server_header=False,
            limit_concurrency=min(MAX_CONNECTIONS, files // 4),
            timeout_keep_alive=30,
            timeout_graceful_shutdown=SHUTDOWN_S,
        ),
        shaking=min(MAX_SHAKING, files // 8),
    )


def _bind(address: str, port: int) -> socket.socket:
    """Listen; for BIND_S, since the link of a coordinator that was killed needs a moment to leave."""
    deadline = time.monotonic() + BIND_S
    while True:
        try:
            return socket.create_server((address, port))
        except OSError as error:
            if time.monotonic() > deadline:
                raise ConfigError(
                    f"Could not listen on {address}:{port}: {error.strerror}. Does another coordinator run? "
                    "Stop it, or change the port in federation.toml."
                ) from error
        time.sleep(0.5)


async def _serve(servers: list[tuple[PromptServer, socket.socket]]) -> None:
    await asyncio.gather(*(server.serve(sockets=[listener]) for server, listener in servers))


def _signed_by_a_site(headers: Headers, states: LinkStateFactory) -> bool:
    """Check what Flower checks after it has read the body, but for the node id, which stands in the body."""
    try:
        public_key = b64decode(headers[FLEET_HTTP_PUBLIC_KEY_HEADER], validate=True)
        signature = b64decode(headers[FLEET_HTTP_SIGNATURE_HEADER], validate=True)
        timestamp = headers[TIMESTAMP_HEADER]
        age_s = (now() - datetime.fromisoformat(timestamp)).total_seconds()
        if not -SYSTEM_TIME_TOLERANCE < age_s < TIMESTAMP_TOLERANCE + SYSTEM_TIME_TOLERANCE:
            return False
        if states.state().get_node_id_by_public_key(public_key) is None:
            return False
        return verify_signature(bytes_to_public_key(public_key), timestamp.encode("ascii"), signature)
    except (KeyError, ValueError, TypeError):
        return False


def _watch(
    consortium: Consortium,
    servers: list[PromptServer],
    states: LinkStateFactory,
    registered: threading.Event,
    thread: threading.Thread,
    stop: threading.Event,
) -> None:
    sites: list[tuple[str, int]] | None = None
    certificate, in_vain = _stamp(consortium.server_pem), 0
    while thread.is_alive() and not stop.wait(WATCH_S if registered.is_set() else FIRST_WATCH_S):
        if not all(server.started for server in servers):
            continue
        keep_unheard_runs(states, min(server.heard for server in servers))
        try:
            renewed = _stamp(consortium.server_pem)
            if renewed != certificate:  # first, or a renewed CA would keep this process from asking its own link
                _show_renewed_certificate(consortium, servers)
                certificate = renewed
            seen = sorted((path.name, _stamp(path)) for path in consortium.sites.glob("*.json"))
            if seen != sites:
                _let_in_and_out(consortium)
                sites = seen
                registered.set()
        except (FedmedganError, OSError) as error:  # the link goes on with what it has; the next look tries again
            LOG.error("%s", error)
            in_vain += 1
            if in_vain >= FIRST_LOOKS and not registered.is_set():
                LOG.error("sites that this link does not know yet are not let in before that is mended")
                registered.set()


def _let_in_and_out(consortium: Consortium) -> None:
    with connect(consortium) as client:
        changes = register_sites(client, enrolled(consortium))
        write_nodes(consortium, {node.node_id: node.name for node in list_nodes(client)})
    if changes.came or changes.went:
        LOG.info("sites let in: %s; put out: %s", changes.came, changes.went)
    if changes.refused:
        LOG.error("not let in: %s; a node key that was put out cannot come back: enrol with a new one", changes.refused)


def _show_renewed_certificate(consortium: Consortium, servers: list[PromptServer]) -> None:
    for server in servers:
        if server.config.ssl is not None:
            server.config.ssl.load_cert_chain(consortium.server_pem, consortium.server_key)
    LOG.info("the renewed server certificate is in use")


def _stamp(path: Path) -> int:
    try:
        return path.stat().st_mtime_ns
    except OSError:
        return 0


def main() -> NoReturn:
    """Run the link of the home that is named on the command line, until SIGTERM or the end of who started it."""
    with started_process() as process:
        run_link(load_consortium(process.home), process.stop)
    sys.exit(ExitCode.OK if process.stop.is_set() else ExitCode.INTERNAL)


if __name__ == "__main__":
    main()
