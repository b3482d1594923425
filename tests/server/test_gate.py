"""The gate before a listener, driven as an ASGI server drives it."""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from http import HTTPStatus
from typing import Any

import pytest

from server.gate import Gate, Limits

LIMITS = Limits(body_bytes=10, bodies=1, body_s=0.2, wait_s=0.2)


class Caller:
    """One request, fed part by part; counts how many parts were read."""

    def __init__(self, parts: list[bytes], headers: dict[str, str] | None = None, path: str = "/in", method="POST"):
        self.parts, self.read, self.status, self.answer = parts, 0, 0, b""
        raw = [(name.encode(), value.encode()) for name, value in (headers or {}).items()]
        self.scope = {"type": "http", "method": method, "path": path, "headers": raw, "client": ("10.0.0.1", 1)}
        self.stalls = False

    async def receive(self) -> dict[str, Any]:
        if self.read == len(self.parts):
            if self.stalls:
                await asyncio.sleep(60)
            return {"type": "http.disconnect"}
        self.read += 1
        more = self.read < len(self.parts) or self.stalls
        return {"type": "http.request", "body": self.parts[self.read - 1], "more_body": more}

    async def send(self, message: dict[str, Any]) -> None:
        self.status = message.get("status", self.status)
        self.answer += message.get("body", b"")


async def echo(scope: Any, receive: Any, send: Any) -> None:
    """Answer with the body, as an application that reads it whole."""
    message = await receive()
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": message["body"]})


async def admit(method: str, path: str, headers: dict[str, str]) -> HTTPStatus:
    return HTTPStatus.OK if path in ("/in", "/large") else HTTPStatus.NOT_FOUND


def run(test: Callable[[Gate], Awaitable[None]], app: Any = echo, limits: Limits = LIMITS) -> None:
    async def body() -> None:
        await test(Gate(app, admit, limits))

    asyncio.run(body())


def test_a_request_passes_with_its_body_in_one_piece() -> None:
    async def test(gate: Gate) -> None:
        caller = Caller([b"abc", b"def"])
        await gate(caller.scope, caller.receive, caller.send)
        assert (caller.status, caller.answer) == (200, b"abcdef")

    run(test)


def test_refused_unread() -> None:
    async def test(gate: Gate) -> None:
        stranger = Caller([b"x"], path="/out")
        declared = Caller([b"x"], {"content-length": str(1 << 30)})
        nonsense = Caller([b"x"], {"content-length": "-1"})
        for caller, status in ((stranger, 404), (declared, 413), (nonsense, 413)):
            await gate(caller.scope, caller.receive, caller.send)
            assert (caller.status, caller.read) == (status, 0)

    run(test)


def test_body_bounded() -> None:
    async def test(gate: Gate) -> None:
        caller = Caller([b"12345", b"67890", b"1", b"never read"])
        await gate(caller.scope, caller.receive, caller.send)
        assert (caller.status, caller.read) == (413, 3)
        exact = Caller([b"12345", b"67890"])
        await gate(exact.scope, exact.receive, exact.send)
        assert exact.status == 200

    run(test)


def test_body_bounded_by_its_path() -> None:
    async def test(gate: Gate) -> None:
        for path, sizes, status in (
            ("/in", [11], 413),
            ("/in", [10], 200),
            ("/large", [20], 200),
            ("/large", [21], 413),
        ):
            parts = [bytes(size) for size in sizes]
            for headers in ({}, {"content-length": str(sum(sizes))}):
                caller = Caller(parts, headers, path)
                await gate(caller.scope, caller.receive, caller.send)
                assert caller.status == status, (path, sizes, headers)

    run(test, limits=Limits(body_bytes=10, bodies=1, larger={"/large": 20}))


def test_bodies_bounded() -> None:
    held, free = 0, asyncio.Event()

    async def slow(scope: Any, receive: Any, send: Any) -> None:
        nonlocal held
        held += 1
        await free.wait()
        await echo(scope, receive, send)

    async def test(gate: Gate) -> None:
        first, second, third = (Caller([b"x"]) for _ in range(3))
        under_way = asyncio.create_task(gate(first.scope, first.receive, first.send))
        await asyncio.sleep(0.01)
        await gate(second.scope, second.receive, second.send)
        assert (second.status, second.read, held) == (503, 0, 1)
        free.set()
        await under_way
        await gate(third.scope, third.receive, third.send)
        assert (first.status, third.status) == (200, 200)

    run(test, slow)


def test_a_place_is_free_once_the_answer_begins() -> None:
    async def test(gate: Gate) -> None:
        streaming, second = Caller([b"x"]), Caller([b"y"])
        under_way = asyncio.create_task(gate(streaming.scope, streaming.receive, streaming.send))
        await asyncio.sleep(0.01)
        await gate(second.scope, second.receive, second.send)
        assert second.status == 200
        under_way.cancel()

    async def stream(scope: Any, receive: Any, send: Any) -> None:
        message = await receive()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        if message["body"] == b"x":
            await asyncio.sleep(60)
        await send({"type": "http.response.body", "body": b""})

    run(test, stream)


def test_slow_body_ends() -> None:
    async def test(gate: Gate) -> None:
        slow = Caller([b"x"])
        slow.stalls = True
        await gate(slow.scope, slow.receive, slow.send)
        after = Caller([b"y"])
        await gate(after.scope, after.receive, after.send)
        assert (slow.status, after.status) == (408, 200)

    run(test)


def test_a_caller_that_goes_away_reaches_nobody() -> None:
    async def test(gate: Gate) -> None:
        gone = Caller([])
        await gate(gone.scope, gone.receive, gone.send)
        assert gone.status == 0

    run(test)


def test_refusals_are_logged(caplog: pytest.LogCaptureFixture) -> None:
    async def refuse(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        await send({"type": "http.response.start", "status": 401, "headers": []})
        await send({"type": "http.response.body", "body": b"no"})

    async def test(gate: Gate) -> None:
        for path in ("/in", "/out"):
            caller = Caller([b"abc"], path=path)
            await gate(caller.scope, caller.receive, caller.send)

    caplog.set_level(logging.INFO, "fedmedgan.gate")  # whatever other tests left
    run(test, refuse)
    assert caplog.messages == ["refused 401 '/in' from 10.0.0.1", "refused 404 '/out' from 10.0.0.1"]


async def unlock(*calls: asyncio.Task[None]) -> None:
    for call in calls:
        call.cancel()
    await asyncio.gather(*calls, return_exceptions=True)


def test_one_caller_leaves_places() -> None:
    """However many bodies of one caller drip, those of another pass, and its own once a place is free again."""
    limits = Limits(body_bytes=10, bodies=4, wait_s=0.2, bodies_a_caller=2)

    async def body() -> None:
        gate = Gate(echo, admit, limits, lambda headers: headers["key"].encode())
        dripping = [Caller([b"x"], {"key": "a"}) for _ in range(6)]
        for caller in dripping:
            caller.stalls = True
        calls = [asyncio.create_task(gate(caller.scope, caller.receive, caller.send)) for caller in dripping]
        other = Caller([b"y"], {"key": "b"})
        await asyncio.sleep(0)
        await gate(other.scope, other.receive, other.send)
        assert other.status == 200
        await asyncio.gather(*calls[2:])
        assert [caller.status for caller in dripping] == [0, 0, 503, 503, 503, 503]
        await unlock(*calls)
        again = Caller([b"z"], {"key": "a"})
        await gate(again.scope, again.receive, again.send)
        assert again.status == 200

    asyncio.run(body())


def test_small_bodies_have_places_of_their_own() -> None:
    async def test(gate: Gate) -> None:
        large, small = Caller([b"x"], path="/large"), Caller([b"y"])
        large.stalls = True
        call = asyncio.create_task(gate(large.scope, large.receive, large.send))
        await asyncio.sleep(0.01)
        await gate(small.scope, small.receive, small.send)
        assert (large.read, small.status) == (1, 200)
        await unlock(call)

    run(test, limits=Limits(body_bytes=10, bodies=1, larger={"/large": 20}, wait_s=0.2))


def test_dripping_body_ends() -> None:
    """Long before the time that a body has: one that goes on at the least rate is read to its end."""

    class Dripping(Caller):
        pause_s = 0.05

        async def receive(self) -> dict[str, Any]:
            await asyncio.sleep(self.pause_s)
            return await super().receive()

    async def test(gate: Gate) -> None:
        slow = Dripping([b"x"] * 1000)
        await asyncio.wait_for(gate(slow.scope, slow.receive, slow.send), 30)
        steady = Dripping([b"x" * 100] * 12)
        await gate(steady.scope, steady.receive, steady.send)
        assert (slow.status, steady.status) == (408, 200)
        assert slow.read < 100

    run(test, limits=Limits(body_bytes=2000, bodies=1, body_s=60.0, slow_s=0.3, least_bytes_a_s=100))
