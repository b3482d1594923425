"""An HTTP proxy on loopback that tunnels CONNECT and records whatever anybody asks of it."""

import select
import socket
import socketserver
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field


@dataclass
class Proxy:
    """Where it listens, and the first line of every request."""

    port: int
    asked: list[str] = field(default_factory=list)


@contextmanager
def recording_proxy() -> Iterator[Proxy]:
    class Handler(socketserver.StreamRequestHandler):
        def handle(self) -> None:
            first = self.rfile.readline(4096).decode("latin-1").strip()
            proxy.asked.append(first)
            while self.rfile.readline(4096).strip():
                pass
            method, _, rest = first.partition(" ")
            host, _, port = rest.split(" ")[0].rpartition(":")
            if method != "CONNECT" or host != "127.0.0.1":
                self.wfile.write(b"HTTP/1.1 403 Forbidden\r\n\r\n")
                return
            try:
                target = socket.create_connection((host, int(port)), 10)
            except ConnectionRefusedError:  # as real proxies do where the link is away
                self.wfile.write(b"HTTP/1.1 502 Bad Gateway\r\n\r\n")
                return
            with target:
                target.settimeout(None)  # an answer may be long in coming: a long upload goes before it
                self.wfile.write(b"HTTP/1.1 200 OK\r\n\r\n")
                _tunnel(self.connection, target)

    class Server(socketserver.ThreadingTCPServer):
        daemon_threads, block_on_close, allow_reuse_address = True, False, True

    with Server(("127.0.0.1", 0), Handler) as server:
        proxy = Proxy(server.server_address[1])
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield proxy
        finally:
            server.shutdown()


def _tunnel(one: socket.socket, other: socket.socket) -> None:
    ends = {one: other, other: one}
    while True:
        for ready in select.select(list(ends), [], [])[0]:
            try:
                content = ready.recv(1 << 16)
                if not content:
                    return
                ends[ready].sendall(content)
            except OSError:
                return
