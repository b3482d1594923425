"""Connections that ask nothing: of the public listener's places a stranger who only holds them keeps none from a site.

Before a connection has a place it has to shake hands, for which there are places of their own: a stranger who never
begins TLS takes none of the others, and no file from the listener beside it. No bound per address: many sites may stand
behind one. tests/contracts/test_uvicorn.py pins what it relies on. Out of scope: bodies (server/gate), who a caller is
(server/link).
"""

import asyncio
import logging
import resource
import socket
import ssl
import time
from asyncio import Protocol, Task, Transport
from asyncio.base_events import Server as AsyncioServer
from collections.abc import Callable
from contextlib import suppress
from typing import cast, final

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

LOG = logging.getLogger("fedmedgan.connections")

HEAD_S = 15.0
"""The head of a request must be here so long after the connection was made, or after the last answer; so must the end
of the handshake before it, after the connection was accepted."""
MOST_FILES = 8192
"""Of files that a process opens at a time; nothing of a link needs more."""
RETRY_S = 0.1
TELL_S = 60.0
"""What a flood causes is logged once in so long, with how often it was."""


@final
class Seldom:
    """One line of a log for many events of a kind."""

    def __init__(self, line: str) -> None:
        """Log `line`, which has a place for how often it was."""
        self._line, self._count, self._told = line, 0, -TELL_S

    def __call__(self) -> None:
        """Count one, and log them if the last line is old enough."""
        self._count += 1
        if time.monotonic() - self._told >= TELL_S:
            LOG.warning(self._line, self._count)
            self._count, self._told = 0, time.monotonic()


_SHAKING_CUT = Seldom("connections without a TLS handshake cut for room, since the last such line: %d")
_SILENT_CUT = Seldom("connections without a request cut for room, since the last such line: %d")
_NOT_ACCEPTED = Seldom("connections could not be accepted, most likely for want of open files; attempts: %d")


def raise_file_limit() -> int:
    """Let this process open as many files as it may, MOST_FILES at most.

    Returns:
        How many it may.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    bound = MOST_FILES if hard == resource.RLIM_INFINITY else min(hard, MOST_FILES)
    if soft == resource.RLIM_INFINITY or soft >= bound:
        return MOST_FILES if soft == resource.RLIM_INFINITY else soft
    resource.setrlimit(resource.RLIMIT_NOFILE, (bound, hard))
    return bound


@final
class Listener:
    """Accepts connections and shakes hands, in the place of asyncio's server, which bounds neither.

    Guarantees:
        - shaking_ones_leave: A connection whose handshake has not ended after HEAD_S is cut.
        - shaking_ones_make_room: At most `places` shake hands at a time; a new connection takes the place of the one
          that was accepted first.
        - deaf_for_a_moment: Where no connection can be accepted, for want of files, one that shakes hands is cut, and
          it is tried again at once.
    """

    def __init__(
        self, bound: socket.socket, make: Callable[[], Protocol], tls: ssl.SSLContext | None, places: int
    ) -> None:
        """Listen, from now on, on a socket that is bound."""
        self._bound, self._make, self._tls, self._places = bound, make, tls, places
        self._shaking: dict[Task[None], None] = {}  # in the order in which they came
        self.hears = True
        bound.setblocking(False)
        self._accepting = asyncio.get_running_loop().create_task(self._accept())

    def close(self) -> None:
        """Accept no more; connections that are made stay."""
        asyncio.get_running_loop().remove_reader(self._bound.fileno())
        for task in (self._accepting, *self._shaking):
            task.cancel()

    async def wait_closed(self) -> None:
        """Wait until nothing is under way."""
        await asyncio.gather(self._accepting, *self._shaking, return_exceptions=True)

    async def _accept(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            self.hears = True
            try:
                connection, _ = await loop.sock_accept(self._bound)
            except ConnectionError:  # it went away before it was accepted
                continue
            except OSError:
                self.hears = False
                _NOT_ACCEPTED()
                self._cut_first()
                await asyncio.sleep(RETRY_S)
                continue
            if len(self._shaking) >= self._places:
                self._cut_first()
            task = loop.create_task(self._shake(connection))
            self._shaking[task] = None
            task.add_done_callback(lambda done: self._shaking.pop(done, None))
            await asyncio.sleep(0)  # a handshake can only be cut once it has begun

    async def _shake(self, connection: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        with suppress(OSError):  # a stranger's: no TLS, another protocol, gone, or too slow
            await loop.connect_accepted_socket(
                self._make, connection, ssl=self._tls, ssl_handshake_timeout=HEAD_S if self._tls else None
            )

    def _cut_first(self) -> None:
        if first := next(iter(self._shaking), None):
            _SHAKING_CUT()
            del self._shaking[first]
            first.cancel()


@final
class PromptServer(uvicorn.Server):
    """Uvicorn's server behind `Listener`.

    Attributes:
        heard: When it last took what came, by time.monotonic().
    """

    def __init__(self, config: uvicorn.Config, shaking: int) -> None:
        """Serve with places for `shaking` handshakes at a time."""
        super().__init__(config)
        self._shaking, self._listeners, self.heard = shaking, list[Listener](), time.monotonic()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start the application, then listen."""
        await super().startup(sockets=[])
        if self.should_exit:
            return
        for bound in sockets or []:
            bound.listen(self.config.backlog)
            self._listeners.append(Listener(bound, self._protocol, self.config.ssl, self._shaking))
        self.servers.extend(cast("list[AsyncioServer]", self._listeners))

    async def on_tick(self, counter: int) -> bool:
        """Do what uvicorn does ten times a second, and say that this server hears."""
        if all(listener.hears for listener in self._listeners):
            self.heard = time.monotonic()
        return await super().on_tick(counter)

    def _protocol(self) -> Protocol:
        make = cast("Callable[..., Protocol]", self.config.http_protocol_class)
        return make(config=self.config, server_state=self.server_state, app_state=self.lifespan.state)


@final
class PromptProtocol(H11Protocol):
    """Uvicorn's protocol, which waits for a request's head for HEAD_S and no longer.

    Guarantees:
        - silent_ones_leave: A connection without a complete head after HEAD_S is cut, however its bytes trickle.
        - silent_ones_make_room: Where all places are taken, a new connection takes that of the one that has waited
          longest for a head.
    """

    _waits_since: float

    def connection_made(self, transport: Transport) -> None:  # type: ignore[override]
        """Take a connection, in the place of a silent one if need be."""
        super().connection_made(transport)
        if self.limit_concurrency is not None and len(self.connections) >= self.limit_concurrency:
            self._make_room()
        self._wait()

    def on_response_complete(self) -> None:
        """Wait for the next request."""
        self._wait()
        super().on_response_complete()

    def _wait(self) -> None:
        self._waits_since = self.loop.time()
        self.loop.call_later(HEAD_S, self._look, self._waits_since)

    def _look(self, since: float) -> None:
        if self._is_silent() and since == self._waits_since:
            self.transport.abort()

    def _is_silent(self) -> bool:
        answering = self.cycle and not self.cycle.response_complete
        return not (answering or self.transport.is_closing())

    def _make_room(self) -> None:
        others = [cast("PromptProtocol", other) for other in self.connections if other is not self]
        if silent := [other for other in others if other._is_silent()]:
            longest = min(silent, key=lambda other: other._waits_since)
            longest.transport.abort()
            _SILENT_CUT()
            # a request may come in this very step of the loop, and the abort is told of in one of the next
            self.connections.discard(longest)
