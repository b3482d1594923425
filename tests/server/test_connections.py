"""Connections of which nothing comes, at a listener as the link makes it but without TLS."""

import asyncio
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any
from unittest.mock import create_autospec

import pytest
import uvicorn
from uvicorn.server import ServerState

from server import connections
from server.connections import PromptProtocol

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
    server, listener, made = uvicorn.Server(config), socket.create_server(("127.0.0.1", 0)), list[socket.socket]()
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
