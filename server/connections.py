"""Connections that ask nothing: of the public listener's 512, a stranger who only holds them keeps none from a site.

No bound per address: many sites may stand behind one. tests/contracts/test_uvicorn.py pins what it relies on.
Out of scope: bodies (server/gate), who a caller is (server/link).
"""

from asyncio import Transport
from typing import cast, final

from uvicorn.protocols.http.h11_impl import H11Protocol

HEAD_S = 15.0
"""The head of a request must be here so long after the connection was made, or after the last answer."""


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
            # a request may come in this very step of the loop, and the abort is told of in one of the next
            self.connections.discard(longest)
