"""Connections of which nothing comes, at a listener as the link makes it but without TLS."""

import asyncio
import errno
import resource
import socket
import ssl
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import suppress
from typing import Any
from unittest.mock import create_autospec

import pytest
import uvicorn
from uvicorn.server import ServerState

from server import connections
from server.connections import Listener, PromptProtocol, PromptServer, Seldom, raise_file_limit

PLACES = 4
ASK = b"GET / HTTP/1.1\r\nhost: a\r\n\r\n"


under_way = threading.Event()


async def answer(scope: Any, receive: Any, send: Any) -> None:
    under_way.set()
    await asyncio.sleep(float(scope["path"][1:] or 0))
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
    await send({"type": "http.response.body", "body": b"ok"})


@pytest.fixture
def connect() -> Iterator[Callable[[], socket.socket]]:
    """Connect to a listener of four places."""
    under_way.clear()
    config = uvicorn.Config(
        answer, http=PromptProtocol, ws="none", lifespan="off", limit_concurrency=PLACES, log_config=None
    )
    server, listener, made = (
        PromptServer(config, shaking=PLACES),
        socket.create_server(("127.0.0.1", 0)),
        list[socket.socket](),
    )
    thread = threading.Thread(target=lambda: asyncio.run(server.serve(sockets=[listener])), daemon=True)
    thread.start()

    def connected() -> socket.socket:
        made.append(socket.create_connection(listener.getsockname(), timeout=20))
        return made[-1]

    try:
        yield connected
    finally:
        for connection in made:
            connection.close()
        server.should_exit = True
        thread.join(20)


def status(connection: socket.socket, ask: bytes = ASK) -> bytes:
    connection.sendall(ask)
    return answered(connection)


def answered(connection: socket.socket) -> bytes:
    got = b""
    while not got.endswith(b"ok") and (part := connection.recv(4096)):
        got += part
    return got.split(b"\r\n")[0]


def is_cut(connection: socket.socket) -> bool:
    with suppress(ConnectionError):
        return connection.recv(4096) == b""
    return True


def test_silent_ones_leave(connect: Callable[[], socket.socket], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "HEAD_S", 0.6)
    nothing, trickling, second = connect(), connect(), connect()
    assert status(second) == b"HTTP/1.1 200 OK"
    started = time.monotonic()
    second.sendall(ASK[:20])
    with suppress(ConnectionError):
        while time.monotonic() - started < 10:
            trickling.sendall(b"G")
            time.sleep(0.05)
    assert time.monotonic() - started < 10
    assert is_cut(nothing)
    assert is_cut(second)


def test_a_request_may_take_longer(connect: Callable[[], socket.socket], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "HEAD_S", 0.3)
    busy = connect()
    assert status(busy, ASK.replace(b"/ ", b"/1.0 ", 1)) == b"HTTP/1.1 200 OK"
    time.sleep(0.1)
    assert status(busy) == b"HTTP/1.1 200 OK"


def test_silent_ones_make_room(connect: Callable[[], socket.socket]) -> None:
    busy = connect()
    busy.sendall(ASK.replace(b"/ ", b"/2.0 ", 1))
    assert under_way.wait(20)
    silent = [connect() for _ in range(3 * PLACES)]
    assert status(connect()) == b"HTTP/1.1 200 OK"
    assert is_cut(silent[0])
    assert answered(busy) == b"HTTP/1.1 200 OK"


def test_silent_ones_make_room_at_once() -> None:
    """A request may come with the end of its handshake: in the same step of the loop as its connection."""

    async def main() -> None:
        config = uvicorn.Config(answer, ws="none", lifespan="off", limit_concurrency=PLACES, log_config=None)
        state = ServerState()
        transports = [create_autospec(asyncio.Transport, instance=True) for _ in range(PLACES + 1)]
        protocols = [PromptProtocol(config, state, {}) for _ in transports]
        for protocol, transport in zip(protocols, transports, strict=True):
            transport.is_closing.return_value = False
            protocol.connection_made(transport)
        protocols[-1].data_received(ASK)
        await asyncio.gather(*state.tasks)
        transports[0].abort.assert_called()
        said = b"".join(call.args[0] for call in transports[-1].write.call_args_list)
        assert said.startswith(b"HTTP/1.1 200")

    asyncio.run(main())


def shaking(test: Callable[[Listener, Callable[[], Awaitable[socket.socket]]], Awaitable[None]]) -> None:
    """Run a test with a listener that shakes hands with two at a time, and connections to it that say nothing."""

    async def main() -> None:
        loop, made = asyncio.get_running_loop(), list[socket.socket]()
        with socket.create_server(("127.0.0.1", 0)) as bound:
            listener = Listener(bound, asyncio.Protocol, ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), places=2)

            async def connected() -> socket.socket:
                made.append(socket.socket())
                made[-1].setblocking(False)
                await loop.sock_connect(made[-1], bound.getsockname())
                return made[-1]

            await test(listener, connected)
            listener.close()
            await listener.wait_closed()
        for connection in made:
            connection.close()

    asyncio.run(asyncio.wait_for(main(), 30))


async def is_gone(connection: socket.socket) -> bool:
    with suppress(ConnectionError):
        return await asyncio.get_running_loop().sock_recv(connection, 100) == b""
    return True


def test_shaking_ones_leave(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "HEAD_S", 0.3)

    async def test(listener: Listener, connected: Callable[[], Awaitable[socket.socket]]) -> None:
        assert await is_gone(await connected())

    shaking(test)


def test_shaking_ones_make_room(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    caplog.set_level("WARNING", connections.LOG.name)  # whatever other tests left
    monkeypatch.setattr(connections, "_SHAKING_CUT", Seldom("cut: %d"))

    async def test(listener: Listener, connected: Callable[[], Awaitable[socket.socket]]) -> None:
        silent = [await connected() for _ in range(4)]
        assert await is_gone(silent[0])
        assert await is_gone(silent[1])
        for held in silent[2:]:
            with pytest.raises(BlockingIOError):
                held.recv(1)

    shaking(test)
    assert caplog.messages == ["cut: 1"]  # once a minute


def test_deaf_for_a_moment(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    caplog.set_level("WARNING", connections.LOG.name)  # whatever other tests left
    monkeypatch.setattr(connections, "_NOT_ACCEPTED", Seldom("not accepted: %d"))

    async def test(listener: Listener, connected: Callable[[], Awaitable[socket.socket]]) -> None:
        loop = asyncio.get_running_loop()
        first, accept, failed = await connected(), loop.sock_accept, asyncio.Event()
        while not listener._shaking:
            await asyncio.sleep(0.01)

        async def none_left(bound: socket.socket) -> tuple[socket.socket, object]:
            failed.set()
            raise OSError(errno.EMFILE, "Too many open files")

        monkeypatch.setattr(loop, "sock_accept", none_left)
        await connected()  # taken by the accept that waits already; the next one fails
        await failed.wait()
        await asyncio.sleep(0)
        assert not listener.hears
        assert await is_gone(first)
        monkeypatch.setattr(loop, "sock_accept", accept)
        while not listener.hears:
            await asyncio.sleep(0.01)

    shaking(test)
    assert caplog.messages[0] == "not accepted: 1"


def test_the_limit_of_files_is_raised_within_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    set_to = list[tuple[int, int]]()
    monkeypatch.setattr(resource, "setrlimit", lambda _, limits: set_to.append(limits))
    for limits, files in (((1024, 4096), 4096), ((1024, 1 << 20), 8192), ((1024, -1), 8192), ((9000, 9000), 9000)):
        monkeypatch.setattr(resource, "getrlimit", lambda _, found=limits: found)
        assert raise_file_limit() == files
    assert set_to == [(4096, 4096), (8192, 1 << 20), (8192, -1)]
