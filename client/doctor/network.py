"""The checks of the way to the coordinator: DNS, the proxy, TLS, the server's answer, the clock.

Each opens a connection of its own, to the coordinator or to the proxy and to nobody else, and none takes longer than
`TIMEOUT_S`. Only the standard library: the agent's program imports this too. Out of scope: whether the coordinator lets
this node in, which the relay finds out.
"""

import base64
import hashlib
import queue
import socket
import ssl
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from http import HTTPStatus
from http.client import HTTPException, HTTPResponse
from typing import Any, TypeVar, cast, final
from urllib.parse import unquote, urlsplit
from urllib.request import getproxies

from client.doctor.findings import Finding, failed, passed, warned
from client.joining import Pinned
from common.certificates import issuer
from common.errors import ConfigError, EnrolmentError, ExitCode, FederationError, FedmedganError

TIMEOUT_S = 10.0
AHEAD_S, BEHIND_S = 5.0, 300.0
"""How far Flower lets a site's clock be from the coordinator's."""
WARN_AHEAD_S, WARN_BEHIND_S = 2.5, 60.0  # HTTP tells whole seconds, so a second more or less is nothing
_Result = TypeVar("_Result")
Resolve = Callable[..., Sequence[tuple[Any, ...]]]


@final
@dataclass(frozen=True)
class Proxy:
    """An HTTP proxy.

    Attributes:
        host: Its name or address.
        port: Its port.
        credentials: The value of the header Proxy-Authorization, never shown; empty for none.
    """

    host: str
    port: int
    credentials: str = ""

    def __repr__(self) -> str:
        """Return where it is, without its password."""
        return f"{self.host}:{self.port}"


@final
@dataclass(frozen=True)
class Way:
    """How the coordinator is reached: straight, or through a proxy."""

    host: str
    port: int
    proxy: Proxy | None = None

    @property
    def target(self) -> str:
        """Return host and port as HTTP writes them."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def way_to(pinned: Pinned, environment: Mapping[str, str] | None = None) -> Way:
    """Return the way that the relay takes, by HTTPS_PROXY, ALL_PROXY and NO_PROXY.

    Args:
        pinned: The coordinator.
        environment: Proxies by scheme, as `urllib` reads them; None: this process's.

    Raises:
        ConfigError: The proxy is none that can be used.
    """
    proxies = getproxies() if environment is None else environment
    url = proxies.get("https") or proxies.get("all")
    if not url or _is_exempt(pinned.host, proxies.get("no", "")):
        return Way(pinned.host, pinned.port)
    try:
        parts = urlsplit(url if "://" in url else f"http://{url}")
        host, port = parts.hostname, parts.port or 80
    except ValueError:
        host, port, parts = None, 0, urlsplit("")
    if parts.scheme != "http" or not host:
        raise ConfigError(
            "Expected HTTPS_PROXY as http://HOST:PORT. Mend it: a proxy for TLS is asked in plain HTTP and tunnels; "
            "SOCKS and https:// are not tried here."
        )
    user = f"{unquote(parts.username or '')}:{unquote(parts.password or '')}"
    credentials = f"Basic {base64.b64encode(user.encode()).decode()}" if parts.username else ""
    return Way(pinned.host, pinned.port, Proxy(host, port, credentials))


def check_dns(way: Way, resolve: Resolve = socket.getaddrinfo) -> Finding:
    """Check that the coordinator's name has an address here; behind a proxy only the proxy needs to know it."""
    if way.proxy is not None:
        return passed("dns", f"left to the proxy {way.proxy}")
    try:
        found = _within(lambda: resolve(way.host, way.port, type=socket.SOCK_STREAM))
    except OSError as error:
        fix = "Ask the network's administrator, or the coordinator whether the name is right."
        return failed("dns", f"{way.host} has no address here: {_reason(error)}.", fix, ExitCode.FEDERATION)
    return passed("dns", f"{way.host} is {', '.join(sorted({str(entry[4][0]) for entry in found}))}")


def check_proxy(way: Way) -> Finding:
    """Check that the proxy, if one is set, is there and tunnels to the coordinator."""
    if way.proxy is None:
        return passed("proxy", "none for this host (HTTPS_PROXY, NO_PROXY)")
    _within(lambda: _open(way).close())
    return passed("proxy", f"{way.proxy} tunnels to {way.target}")


def check_tls(way: Way, pinned_pem: bytes, extra: Sequence[bytes] = ()) -> Finding:
    """Check that the coordinator shows a certificate of the pinned authority, or a proxy one of an extra authority."""
    wrong: ssl.SSLCertVerificationError | None = None
    trusts = ((pinned_pem, "the pinned authority"), (b"\n".join(extra), "extra_ca: a proxy inspects TLS here"))
    for pem, whose in trusts[: 2 if extra else 1]:
        try:
            shown = _within(lambda pem=pem: _certificate(way, trusting(pem)))
        except ssl.SSLCertVerificationError as error:
            wrong = error
            continue
        return passed("tls", f"by {whose}; certificate SHA-256 {fingerprint(shown)}")
    shown = _within(lambda: _certificate(way, _trusting_anybody()))  # to show it, and nothing is said to it
    return _wrong_certificate(wrong, shown)


def check_health(way: Way, ca_pem: bytes) -> Finding:
    """Check that the coordinator's server answers."""
    status, _ = _within(lambda: _health(way, ca_pem))
    if status != HTTPStatus.OK:
        fix = "Something else listens there, or the server is starting: ask the coordinator."
        return failed("health", f"{way.target} answers with HTTP {status}.", fix, ExitCode.FEDERATION)
    return passed("health", f"the coordinator's server answers at {way.target}")


def check_clock(way: Way, ca_pem: bytes, clock: Callable[[], float] = time.time) -> Finding:
    """Compare this machine's clock with the coordinator's, by the header Date of its answer."""
    before = clock()
    _, date = _within(lambda: _health(way, ca_pem))
    try:
        told = parsedate_to_datetime(date or "").timestamp()
    except ValueError:
        return warned("clock", "the coordinator's answer has no date.", "Compare the clocks by hand.")
    ahead = (before + clock()) / 2 - (told + 0.5)  # the date is cut to whole seconds
    said = f"{abs(ahead):.1f} s {'ahead of' if ahead > 0 else 'behind'} the coordinator's, to about 1 s"
    fix = f"Flower takes {AHEAD_S:g} s ahead and {BEHIND_S:g} s behind. Set the clock, or let NTP do it."
    if not -BEHIND_S <= ahead <= AHEAD_S:
        return failed("clock", f"{said}.", fix, ExitCode.FEDERATION)
    if not -WARN_BEHIND_S <= ahead <= WARN_AHEAD_S:
        return warned("clock", f"{said}.", fix)
    return passed("clock", said)


def trusting(pem: bytes) -> ssl.SSLContext:
    """Return what the relay verifies by: these authorities alone, and the host's name."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_verify_locations(cadata=pem.decode("ascii"))
    return context


def fingerprint(certificate: bytes) -> str:
    """Return the SHA-256 of a certificate in DER as OpenSSL prints it."""
    return hashlib.sha256(certificate).digest().hex(":").upper()


def _is_exempt(host: str, no_proxy: str) -> bool:
    entries = [entry.strip().lower().lstrip(".") for entry in no_proxy.split(",") if entry.strip()]
    return any(entry == "*" or host == entry or host.endswith(f".{entry}") for entry in entries)


def _open(way: Way) -> socket.socket:
    """Open a TCP connection to the coordinator, through the proxy if there is one."""
    to, where = ((way.proxy.host, way.proxy.port), f"the proxy {way.proxy}") if way.proxy else _straight(way)
    try:
        line = socket.create_connection(to, TIMEOUT_S)
    except OSError as error:
        refused = ", it may not be started" if isinstance(error, ConnectionRefusedError) else ""
        raise FederationError(
            f"Could not connect to {where}: {_reason(error)}{refused}. Ask the network's administrator to let this "
            "machine connect there; HTTPS_PROXY names a proxy, if it takes one."
        ) from error
    if way.proxy is not None:
        with ExitStack() as undone:
            undone.callback(line.close)
            _tunnel(line, way, way.proxy)
            undone.pop_all()
    return line


def _straight(way: Way) -> tuple[tuple[str, int], str]:
    return (way.host, way.port), f"the coordinator at {way.target}"


def _tunnel(line: socket.socket, way: Way, proxy: Proxy) -> None:
    lines = [f"CONNECT {way.target} HTTP/1.1", f"Host: {way.target}"]
    lines += [f"Proxy-Authorization: {proxy.credentials}"] if proxy.credentials else []
    try:
        line.sendall("\r\n".join([*lines, "", ""]).encode("ascii"))
        with HTTPResponse(line, method="CONNECT") as answer:
            answer.begin()
    except (OSError, HTTPException) as error:
        raise FederationError(
            f"The proxy {proxy} does not answer as an HTTP proxy: {_reason(error)}. Check HTTPS_PROXY."
        ) from error
    if answer.status == HTTPStatus.PROXY_AUTHENTICATION_REQUIRED:
        raise FederationError(f"The proxy {proxy} wants a user and password: HTTPS_PROXY=http://USER:PASSWORD@{proxy}")
    if answer.status != HTTPStatus.OK:
        raise FederationError(
            f"The proxy {proxy} does not tunnel to {way.target} (HTTP {answer.status}). Ask its administrator to allow "
            f"CONNECT to that host and port."
        )


def _secure(way: Way, context: ssl.SSLContext) -> ssl.SSLSocket:
    line = _open(way)
    try:
        return context.wrap_socket(line, server_hostname=way.host)
    except ssl.SSLCertVerificationError:
        line.close()
        raise
    except OSError as error:
        line.close()
        raise FederationError(
            f"{way.target} does not answer in TLS: {_reason(error)}. Something else listens there, or a firewall cuts "
            "the connection: ask the network's administrator, then the coordinator."
        ) from error


def _certificate(way: Way, context: ssl.SSLContext) -> bytes:
    with _secure(way, context) as line:
        return line.getpeercert(binary_form=True) or b""


def _health(way: Way, ca_pem: bytes) -> tuple[int, str | None]:
    """Return the status of /health and the answer's date."""
    try:
        with _secure(way, trusting(ca_pem)) as line:
            line.sendall(f"GET /health HTTP/1.1\r\nHost: {way.target}\r\nConnection: close\r\n\r\n".encode("ascii"))
            with HTTPResponse(line) as answer:
                answer.begin()
                return answer.status, answer.getheader("Date")
    except ssl.SSLCertVerificationError as error:
        raise EnrolmentError("Not asked: the certificate is not to be trusted, see tls.") from error
    except (OSError, HTTPException) as error:
        raise FederationError(
            f"{way.target} does not answer: {_reason(error)}. Ask the coordinator whether the server runs."
        ) from error


def _wrong_certificate(error: ssl.SSLCertVerificationError | None, shown: bytes) -> Finding:
    why = error.verify_message if error is not None else "unknown"
    said = f"the certificate is not to be trusted: {why}. Issued by {issuer(shown)}; SHA-256 {fingerprint(shown)}."
    fix = (
        "If a proxy of this hospital issued it, TLS is inspected: have this host excepted, or set extra_ca in "
        "site.toml to the file of the proxy's root certificate. If not, compare with the coordinator by phone, and "
        "connect to nothing until it is clear; a new invitation brings a new authority."
    )
    return failed("tls", said, fix, ExitCode.ENROLMENT)


def _trusting_anybody() -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    return context


def _within(call: Callable[[], _Result]) -> _Result:
    """Run a call that may hang: name resolution has no time-out, and a peer can send a byte at a time."""
    ended: queue.Queue[tuple[_Result | None, Exception | None]] = queue.Queue()

    def run() -> None:
        try:
            ended.put((call(), None))
        except (FedmedganError, OSError, ValueError) as error:
            ended.put((None, error))

    threading.Thread(target=run, daemon=True).start()
    try:
        result, error = ended.get(timeout=TIMEOUT_S)
    except queue.Empty:
        raise FederationError(
            f"No answer in {TIMEOUT_S:g} s. Ask the network's administrator whether a firewall drops the connection."
        ) from None
    if error is not None:
        raise error
    return cast("_Result", result)


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or ascii(str(error))[1:-1][:120] or type(error).__name__
