"""The one part of a WADO-RS answer, streamed to a file. Source: RFC 2046 5.1.1; PS3.18 8.6.1.2."""

from collections.abc import Callable, Iterator, Mapping
from email.message import Message
from typing import BinaryIO, Final

from client.pull.archive import Reason, Refused

MAX_HEAD: Final = 1 << 14
"""Bytes before the part's content."""
MAX_BOUNDARY: Final = 200


def boundary_of(headers: Mapping[str, str]) -> bytes | None:
    """Return what divides the parts; None where the answer has no parts.

    Args:
        headers: The answer's, by lower-case name.

    Raises:
        Refused: It should, and does not say what divides them; or it has none, and nothing says where it ends.
    """
    message = Message()
    message["Content-Type"] = headers.get("content-type", "")
    if message.get_content_type() == "application/dicom":
        if "content-length" not in headers and "transfer-encoding" not in headers:
            raise Refused(Reason.NOT_SENT, "its answer has neither a boundary nor a length: nothing shows a cut one")
        return None
    boundary = message.get_param("boundary")
    good = message.get_content_type() == "multipart/related" and isinstance(boundary, str)
    if not good or not 1 <= len(str(boundary)) <= MAX_BOUNDARY or not str(boundary).isascii():
        raise Refused(Reason.NOT_SENT, "its answer is not multipart/related DICOM")
    return str(boundary).encode()


def save_part(chunks: Iterator[bytes], boundary: bytes | None, out: BinaryIO, write: Callable[[int], None]) -> None:
    """Write the content of the first part.

    Args:
        chunks: The body; where it has a length or comes in HTTP's chunks, it raises if it ends before.
        boundary: What divides the parts, as `boundary_of` returns it; None: the body is the content.
        out: Where the content goes.
        write: Called with the bytes written so far, before more are; may raise.

    Raises:
        Refused: It ends too early, or is no multipart body.

    Guarantees:
        - cut_is_seen: A body that ends before its closing boundary is refused; one without boundary, before its end as
          HTTP says it, or where HTTP says none.
    """
    written = 0
    for piece in chunks if boundary is None else _content(chunks, b"--" + boundary):
        written += len(piece)
        write(written)
        out.write(piece)


def _content(chunks: Iterator[bytes], delimiter: bytes) -> Iterator[bytes]:
    held, inside = b"", False
    for chunk in chunks:
        held += chunk
        if not inside:
            begin = held.find(delimiter)
            end = held.find(b"\r\n\r\n", begin) if begin >= 0 else -1
            if end < 0:
                if len(held) > MAX_HEAD:
                    raise Refused(Reason.NOT_SENT, "its answer is no multipart body")
                continue
            held, inside = held[end + 4 :], True
        last = held.find(b"\r\n" + delimiter)
        if last >= 0:
            yield held[:last]
            return
        keep = len(delimiter) + 1  # a boundary may be cut between two chunks
        if len(held) > keep:
            yield held[:-keep]
            held = held[-keep:]
    raise Refused(Reason.CUT)
