"""An HTTP proxy on loopback behind which the network is bad: narrow, slow, with resets and one long cut."""

import math
import random
import socket
import socketserver
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

_CHUNK = 1 << 16


@dataclass
class Weather:
    """How bad it is.

    Attributes:
        bits_per_s: All connections together, each way.
        delay_s: Added to what goes through, each way.
        reset_share: The chance of each tunnel to be reset within its first second.
        cut_after_s: When nothing goes through any more, counted from the first tunnel; never by default.
        cut_s: For how long.
        seed: Of the resets.
    """

    bits_per_s: float = 1e9
    delay_s: float = 0.0
    reset_share: float = 0.0
    cut_after_s: float = math.inf
    cut_s: float = 0.0
    seed: int = 0


class SlowProxy:
    """Where it listens, what the weather is, and what it did to whom."""

    def __init__(self, weather: Weather) -> None:
        self.port, self.resets, self.refused, self.bytes_through = 0, 0, 0, 0
        self.weather, self.rng, self.lock = weather, random.Random(weather.seed), threading.Lock()
        self.free_at, self.first = {"up": 0.0, "down": 0.0}, 0.0
        self.cut_until, self.open = 0.0, set[socket.socket]()

    def is_cut(self) -> bool:
        now = time.monotonic()
        since = now - self.first
        by_weather = self.weather.cut_after_s <= since < self.weather.cut_after_s + self.weather.cut_s
        return by_weather or now < self.cut_until

    def cut(self, seconds: float) -> None:
        """End all tunnels and let nothing through for so long."""
        self.cut_until = time.monotonic() + seconds
        with self.lock:
            for end in self.open:
                with suppress(OSError):
                    end.shutdown(socket.SHUT_RDWR)

    def opened(self) -> float:
        """Note a new tunnel, and return when it is to be reset."""
        with self.lock:
            self.first = self.first or time.monotonic()
            unlucky = self.rng.random() < self.weather.reset_share
            self.resets += unlucky
            return time.monotonic() + (self.rng.random() if unlucky else 1e9)

    def wait_for_the_line(self, way: str, size_bytes: int) -> None:
        """Sleep until so many bytes are through. Waiting delays what follows too: latency is paid once a burst."""
        with self.lock:
            self.free_at[way] = max(time.monotonic(), self.free_at[way]) + 8 * size_bytes / self.weather.bits_per_s
            self.bytes_through += size_bytes
            ready = self.free_at[way]
        time.sleep(max(0.0, ready - time.monotonic()) + self.weather.delay_s)

    def pump(self, source: socket.socket, target: socket.socket, way: str, end_at: float) -> None:
        """Pass bytes on, each chunk when the line is free for it; end the tunnel at a reset or a cut."""
        try:
            while content := source.recv(_CHUNK):
                self.wait_for_the_line(way, len(content))
                if self.is_cut() or time.monotonic() > end_at:
                    break
                target.sendall(content)
        except OSError:
            pass  # the peer ended the tunnel first
        for end in (source, target):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)


class _Tunnel(socketserver.StreamRequestHandler):
    proxy: SlowProxy

    def handle(self) -> None:
        method, _, rest = self.rfile.readline(4096).decode("latin-1").strip().partition(" ")
        while self.rfile.readline(4096).strip():
            pass
        host, _, port = rest.split(" ")[0].rpartition(":")
        end_at = self.proxy.opened()
        if method != "CONNECT" or host != "127.0.0.1" or self.proxy.is_cut():
            self.proxy.refused += 1
            self.wfile.write(b"HTTP/1.1 502 Bad Gateway\r\n\r\n")
            return
        with socket.create_connection((host, int(port)), 10) as target:
            target.settimeout(None)  # an answer may be long in coming: a long upload goes before it
            self.wfile.write(b"HTTP/1.1 200 OK\r\n\r\n")
            ends = (self.connection, target)
            with self.proxy.lock:
                self.proxy.open.update(ends)
            up = threading.Thread(target=self.proxy.pump, args=(*ends, "up", end_at), daemon=True)
            up.start()
            self.proxy.pump(*reversed(ends), "down", end_at)
            up.join()
            with self.proxy.lock:
                self.proxy.open.difference_update(ends)


class _Server(socketserver.ThreadingTCPServer):
    daemon_threads, block_on_close, allow_reuse_address = True, False, True


@contextmanager
def slow_proxy(weather: Weather) -> Iterator[SlowProxy]:
    proxy = SlowProxy(weather)
    with _Server(("127.0.0.1", 0), type("Tunnel", (_Tunnel,), {"proxy": proxy})) as server:
        proxy.port = server.server_address[1]
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield proxy
        finally:
            server.shutdown()
