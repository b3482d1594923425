"""The parts that a message of Flower travels as, fetched within bounds before they are put together.

An Array lists its chunks by their places among its children. Flower joins them as listed: a small message whose list
names one chunk many times would become any amount of memory. Used by the relay (client/fleet) and by the coordinator's
run (server/run_process); tests/contracts/test_parts.py pins what it relies on in Flower. Out of scope: which parts a
message has (its tree), what it means (common/wire).
"""

import json
import threading
from collections.abc import Callable, Mapping, Sequence

from flwr.app import Array
from flwr.app.message.arraychunk import ArrayChunk
from flwr.supercore.inflatable.inflatable_object import (
    get_object_body,
    get_object_head_values_from_object_content,
    get_object_type_from_object_content,
)
from flwr.supercore.inflatable.inflatable_utils import pull_objects
from google.protobuf.message import DecodeError

from common.errors import WireError
from common.wire import MAX_ARRAYS, MAX_NAME_CHARACTERS, MAX_TOTAL_BYTES

_CHUNK_BYTES = 1 << 20  # Flower cuts arrays into chunks of 5 MB; five times as many are taken
MAX_OBJECTS = 2 * MAX_ARRAYS + MAX_TOTAL_BYTES // _CHUNK_BYTES
MAX_MESSAGE_BYTES = MAX_TOTAL_BYTES + MAX_OBJECTS * (MAX_NAME_CHARACTERS + 1024)
MAX_HEADS_BYTES = 1 << 20
"""Of all parts but the chunks: a proposal of 64 Ki characters, scalars, and a name of 64 bytes for each chunk."""
FIRST_RETRY_S = 0.05
"""A message is announced while its parts are on their way; Flower would look for them again after 1 s, 2 s, 4 s."""
LONGEST_RETRY_S = 1.0

MADE_UP = (ValueError, LookupError, ArithmeticError, TypeError, AttributeError, RecursionError, DecodeError)
"""What Flower raises over parts that somebody made up."""


def fetch_parts(ids: Sequence[str], pull: Callable[[str], bytes], longest_s: float) -> dict[str, bytes]:
    """Fetch the parts of one message, and say whether they may be put together.

    Args:
        ids: The parts' names.
        pull: Fetches one; raises Flower's ObjectUnavailableError where it has not come yet.
        longest_s: Parts that have not come after this are given up; what is there is taken, however late.

    Returns:
        Each part's content.

    Raises:
        WireError: There are too many parts, or they take too much memory.
        ObjectPullError: A part did not come.

    Guarantees:
        - bounded_while_it_comes: Of a message over MAX_MESSAGE_BYTES no part is asked for once that many have come.
        - ends_in_time: Parts that do not come are waited for `longest_s` and no longer.
    """
    if len(ids) > MAX_OBJECTS:
        raise WireError(f"Expected a message of at most {MAX_OBJECTS} parts, got {len(ids)}.")
    parts = pull_objects(
        list(ids),
        _bounded(pull),
        max_time=longest_s,
        max_tries_per_object=None,
        initial_backoff=FIRST_RETRY_S,
        backoff_cap=LONGEST_RETRY_S,
    )
    check_parts(parts)
    return parts


def check_parts(parts: Mapping[str, bytes]) -> None:
    """Look at how parts refer to each other, before Flower follows that.

    Raises:
        WireError: They would take more memory together than they do apart, or are no parts.

    Guarantees:
        - no_larger_together: No chunk is joined twice, and only chunks are joined.
        - heads_are_small: What is not a chunk has MAX_HEADS_BYTES in all, and a chunk has no children.
    """
    try:
        chunks = {name for name, content in parts.items() if _is_chunk(content)}
        heads_bytes = sum(len(content) for name, content in parts.items() if name not in chunks)
        if heads_bytes > MAX_HEADS_BYTES:
            raise WireError(f"Expected at most {MAX_HEADS_BYTES} bytes beside the arrays, got {heads_bytes}.")
        arrays = [content for name, content in parts.items() if name not in chunks and _is_array(content)]
        listed = [name for content in arrays for name in _listed(content)]
    except MADE_UP as error:
        raise WireError(f"Expected the parts of a message, they do not decode: {type(error).__name__}.") from error
    if len(set(listed)) < len(listed):
        raise WireError("Expected each chunk of an array once: a message takes the memory that its bytes do.")
    if not chunks.issuperset(listed):
        raise WireError("Expected arrays of chunks, and all of them.")


def _is_chunk(content: bytes) -> bool:
    """Look at the first bytes alone: a head may be as long as the part."""
    if not content.startswith(ArrayChunk.__qualname__.encode() + b" "):
        return False
    if get_object_head_values_from_object_content(content[:_SHORT_HEAD_BYTES])[1]:
        raise WireError("Expected a chunk without children.")
    return True


_SHORT_HEAD_BYTES = 64
"""A chunk's name and its length, with no child between them."""


def _is_array(content: bytes) -> bool:
    return get_object_type_from_object_content(content) == Array.__qualname__


def _listed(content: bytes) -> list[str]:
    """Return the names of the chunks that Flower joins to an array, in that order, as it finds them."""
    children = get_object_head_values_from_object_content(content)[1]
    return [children[place] for place in json.loads(get_object_body(content, Array).decode())["arraychunk_ids"]]


def _bounded(pull: Callable[[str], bytes]) -> Callable[[str], bytes]:
    total_bytes, lock = 0, threading.Lock()

    def counted(object_id: str) -> bytes:
        nonlocal total_bytes
        content = pull(object_id)
        with lock:
            total_bytes += len(content)
            if total_bytes > MAX_MESSAGE_BYTES:
                raise WireError(f"Expected a message of at most {MAX_MESSAGE_BYTES} bytes.")
        return content

    return counted
