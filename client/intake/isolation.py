"""A child process for compressed DICOM: a damaged file may abort a compiled decoder or send it round in circles.

GDCM ends its process with `std::terminate` on some damaged JPEG streams, which no `except` catches. Out of scope:
what is decoded (dicom.py); keeping a decoder that was taken over from acting as this user.
"""

import os
import resource
import struct
import subprocess
import sys
from multiprocessing.connection import Connection, Pipe
from pathlib import Path
from types import TracebackType
from typing import final

import numpy as np

from client.intake.dicom import decode
from client.intake.pixels import Square, fit
from client.intake.refusals import Reason, Refused, quiet

TIMEOUT_S = 120.0
_MAX_REASON_BYTES = 200
_FORM = ">HB"
_FORM_BYTES = struct.calcsize(_FORM)

# Not multiprocessing.Process: that imports the caller's main module again, which runs a plain script twice.
_PROGRAM = """
import sys
from multiprocessing.connection import Connection
from client.intake.isolation import serve
serve(Connection(int(sys.argv[1])))
"""


def serve(connection: Connection) -> None:
    """Decode one file after the other until the other end hangs up; runs in the child.

    Messages are plain bytes, never pickles: a request is the side as two bytes, the channels as one and the path, a
    reply is `+` and the pixels or `-` and the reason.
    """
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # a core dump would hold the image
    with quiet():
        while True:
            try:
                request = connection.recv_bytes()
            except EOFError:
                return
            size, channels = struct.unpack(_FORM, request[:_FORM_BYTES])
            try:
                levels = decode(Path(os.fsdecode(request[_FORM_BYTES:])))
                connection.send_bytes(b"+" + fit(levels, size, channels).tobytes())
            except Refused as refusal:
                connection.send_bytes(b"-" + refusal.reason.encode())


@final
class DecoderProcess:
    """Starts the child when it is first needed, and a new one when it died or hung.

    Args:
        program: What runs in the child, Python that takes the descriptor of its end of the pipe as argument.
        timeout_s: Longest wait for one image, the child's start included.

    Guarantees:
        - survives_abort: When the child dies on an image, that image is refused and the next is decoded.
        - survives_hang: So it is when the child does not answer in `timeout_s`.
    """

    def __init__(self, program: str = _PROGRAM, timeout_s: float = TIMEOUT_S) -> None:
        """Start nothing yet."""
        self._program = program
        self._timeout_s = timeout_s
        self._child: tuple[subprocess.Popen[bytes], Connection] | None = None

    def __enter__(self) -> "DecoderProcess":
        """Return itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End the child."""
        self._stop()

    def square(self, path: Path, size: int, channels: int = 1) -> Square | str:
        """Return a file's image, resized, or the reason why it is refused."""
        connection = self._connection()
        try:
            connection.send_bytes(struct.pack(_FORM, size, channels) + os.fsencode(path))
            if not connection.poll(self._timeout_s):
                raise EOFError
            reply = connection.recv_bytes(channels * size * size + _MAX_REASON_BYTES)
        except (EOFError, OSError):  # OSError: a broken pipe, or a reply that is too long
            self._stop()
            return str(Reason.PIXELS)
        if reply[:1] == b"+" and len(reply) == channels * size * size + 1:
            return np.frombuffer(reply, dtype=np.uint8, offset=1).reshape(channels, size, size)
        return reply[1:].decode("ascii", errors="replace")

    def _connection(self) -> Connection:
        if self._child is None:
            ours, theirs = Pipe()
            with theirs:
                process = subprocess.Popen(
                    [sys.executable, "-P", "-c", self._program, str(theirs.fileno())],
                    env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
                    pass_fds=(theirs.fileno(),),
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,  # compiled decoders write about the file
                )
            self._child = (process, ours)
        return self._child[1]

    def _stop(self) -> None:
        if self._child is not None:
            process, connection = self._child
            connection.close()
            process.kill()
            process.wait()
            self._child = None
