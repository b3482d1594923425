"""An HTTP proxy on loopback that tunnels CONNECT and counts what goes through: TLS records and all in them."""

import contextlib
import socket
import socketserver
import threading
from collections.abc import Generator
from typing import final

_CHUNK = 1 << 18


@final
class CountingProxy:
    """Where it listens, and the bytes that went through, both ways together."""

    def __init__(self) -> None:
        """Count from 0."""
        self.port, self.bytes_through, self._lock = 0, 0, threading.Lock()

    def pump(self, source: socket.socket, target: socket.socket) -> None:
        """Pass bytes on and count them, until one end closes."""
        with contextlib.suppress(OSError):
            while content := source.recv(_CHUNK):
                with self._lock:
                    self.bytes_through += len(content)
                target.sendall(content)
        for end in (source, target):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)


class _Tunnel(socketserver.StreamRequestHandler):
    proxy: CountingProxy

    def handle(self) -> None:
        method, _, rest = self.rfile.readline(4096).decode("latin-1").strip().partition(" ")
        while self.rfile.readline(4096).strip():
            pass
        host, _, port = rest.split(" ")[0].rpartition(":")
        if method != "CONNECT" or host != "127.0.0.1":
            self.wfile.write(b"HTTP/1.1 403 Forbidden\r\n\r\n")
            return
        try:
            target = socket.create_connection((host, int(port)), 10)
        except OSError:
            self.wfile.write(b"HTTP/1.1 502 Bad Gateway\r\n\r\n")
            return
        with target:
            target.settimeout(None)
            self.wfile.write(b"HTTP/1.1 200 OK\r\n\r\n")
            up = threading.Thread(target=self.proxy.pump, args=(self.connection, target), daemon=True)
            up.start()
            self.proxy.pump(target, self.connection)
            up.join()


class _Server(socketserver.ThreadingTCPServer):
    daemon_threads, block_on_close, allow_reuse_address = True, False, True


@contextlib.contextmanager
def counting_proxy() -> Generator[CountingProxy]:
    """Run a proxy on loopback until the block ends."""
    proxy = CountingProxy()
    with _Server(("127.0.0.1", 0), type("Tunnel", (_Tunnel,), {"proxy": proxy})) as server:
        proxy.port = int(server.server_address[1])
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield proxy
        finally:
            server.shutdown()
