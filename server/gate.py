"""The gate before a listener: what may pass is decided from path and headers, and no body is read before.

Plain ASGI, so that it stands before whatever the link is made of. Out of scope: who a caller is (server/link).
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any, final

LOG = logging.getLogger("fedmedgan.gate")

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Application = Callable[[Scope, Receive, Send], Awaitable[None]]

Headers = dict[str, str]
Caller = Callable[[Headers], bytes]
"""Says who asks, of a request that was admitted."""
Admit = Callable[[str, str, Headers], Awaitable[HTTPStatus]]
"""Says from method, path and headers whether a request may pass: OK, or the status of the refusal."""

_SHOWN_CHARACTERS = 80


@final
@dataclass(frozen=True)
class Limits:
    """What one listener holds of other people's bytes.

    Attributes:
        body_bytes: The largest body.
        larger: The paths whose bodies may be larger, and how large.
        bodies: Bodies that are held at a time, from the first byte until the answer begins: so many on the paths of
            larger ones, and so many on all others.
        bodies_a_caller: So many of each may be one caller's; all of them if None.
        body_s: A body must be here after this.
        slow_s, least_bytes_a_s: And after `slow_s` it must have come at this rate on average.
        wait_s: A request waits this long for one of the places before it is refused.
    """

    body_bytes: int
    bodies: int
    bodies_a_caller: int | None = None
    body_s: float = 120.0
    slow_s: float = 30.0
    least_bytes_a_s: int = 4000
    wait_s: float = 10.0
    larger: Mapping[str, int] = field(default_factory=dict[str, int])

    def of(self, path: str) -> int:
        """Return the bytes of the largest body that a path takes."""
        return self.larger.get(path, self.body_bytes)


@final
class Refused(Exception):
    """A request that does not pass."""

    def __init__(self, status: HTTPStatus) -> None:
        """Refuse with a status."""
        super().__init__(status.phrase)
        self.status = status


@final
class Gate:
    """An ASGI application before another one.

    Guarantees:
        - refused_unread: Of a request that is not admitted, or declares a body over the bound, no byte is read.
        - body_bounded: A body that grows over its path's bound, declared or not, is refused at that byte.
        - bodies_bounded: At most `bodies` are held at a time, on paths of larger ones and on others each.
        - one_caller_leaves_places: Of these at most `bodies_a_caller` are one caller's.
        - small_bodies_have_places_of_their_own: Larger ones never keep them waiting.
        - dripping_body_ends: A body below the least rate is refused long before its time is over.
        - slow_body_ends: A body that does not arrive in time is refused, and its place is free again.
        - refusals_are_logged: One line for each refusal, the gate's own and those of the application behind it.
    """

    def __init__(self, app: Application, admit: Admit, limits: Limits, caller: Caller = lambda _: b"") -> None:
        """Stand before `app`; without `caller` all who ask are one."""
        self._app, self._admit, self._limits, self._caller = app, admit, limits, caller
        self._places = {larger: asyncio.Semaphore(limits.bodies) for larger in (False, True)}
        self._own: dict[tuple[bool, bytes], asyncio.Semaphore] = {}  # of callers that were admitted: never many

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or refuse it."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
        elif scope["type"] == "http":
            try:
                await self._pass(scope, receive, send)
            except Refused as refusal:
                _log(scope, refusal.status.value)
                await _refuse(send, refusal.status)

    async def _pass(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        status = await self._admit(scope["method"], scope["path"], headers)
        if status != HTTPStatus.OK:
            raise Refused(status)
        declared = headers.get("content-length", "0")
        if not declared.isdecimal() or int(declared) > self._limits.of(scope["path"]):
            raise Refused(HTTPStatus.REQUEST_ENTITY_TOO_LARGE)
        if scope["method"] == "GET":
            await self._app(scope, receive, send)
            return
        leave = await self._take_place(scope["path"] in self._limits.larger, self._caller(headers))
        await self._pass_body(scope, receive, send, leave)

    async def _take_place(self, larger: bool, caller: bytes) -> Callable[[], None]:
        """Wait for one of the caller's own places, then for one of all; return what gives both back, once."""
        most = self._limits.bodies_a_caller or self._limits.bodies
        own = self._own.setdefault((larger, caller), asyncio.Semaphore(most))
        with ExitStack() as places:
            try:
                async with asyncio.timeout(self._limits.wait_s):
                    for place in (own, self._places[larger]):
                        await place.acquire()
                        places.callback(place.release)
            except TimeoutError as error:
                raise Refused(HTTPStatus.SERVICE_UNAVAILABLE) from error
            return places.pop_all().close

    async def _pass_body(self, scope: Scope, receive: Receive, send: Send, leave: Callable[[], None]) -> None:

        async def answer(message: Message) -> None:
            leave()  # the body was read and handled once an answer begins; a long answer must not hold the place
            if message["type"] == "http.response.start" and message["status"] >= HTTPStatus.BAD_REQUEST:
                _log(scope, message["status"])
            await send(message)

        try:
            body = await self._read(receive, self._limits.of(scope["path"]))
            if body is not None:
                await self._app(scope, _replay(body, receive), answer)
        finally:
            leave()

    async def _read(self, receive: Receive, most_bytes: int) -> bytes | None:
        """Read a body; None if the caller went away."""
        parts: list[bytes] = []
        size_bytes = 0
        begun = asyncio.get_running_loop().time()
        try:
            async with asyncio.timeout(min(self._limits.slow_s, self._limits.body_s)) as deadline:
                while True:
                    message = await receive()
                    if message["type"] != "http.request":
                        return None
                    part: bytes = message.get("body", b"")
                    size_bytes += len(part)
                    if size_bytes > most_bytes:
                        raise Refused(HTTPStatus.REQUEST_ENTITY_TOO_LARGE)
                    parts.append(part)
                    enough_s = max(self._limits.slow_s, size_bytes / self._limits.least_bytes_a_s)
                    deadline.reschedule(begun + min(enough_s, self._limits.body_s))
                    if not message.get("more_body", False):
                        return b"".join(parts)
        except TimeoutError as error:
            raise Refused(HTTPStatus.REQUEST_TIMEOUT) from error


def _replay(body: bytes, receive: Receive) -> Receive:
    waiting = [body]

    async def again() -> Message:
        if waiting:
            return {"type": "http.request", "body": waiting.pop(), "more_body": False}
        return await receive()

    return again


async def _refuse(send: Send, status: HTTPStatus) -> None:
    headers = [(b"content-type", b"text/plain"), (b"connection", b"close")]
    if status == HTTPStatus.SERVICE_UNAVAILABLE:
        headers.append((b"retry-after", b"5"))
    await send({"type": "http.response.start", "status": status.value, "headers": headers})
    await send({"type": "http.response.body", "body": status.phrase.encode()})


def _log(scope: Scope, status: int) -> None:
    client = scope.get("client") or ("unknown",)
    path = repr(scope["path"])[:_SHOWN_CHARACTERS]  # a stranger chose it
    LOG.warning("refused %d %s from %s", status, path, client[0])
