"""How much memory a decoder's process may take for one thing. Out of scope: what is refused for it.

Linux counts address space, not what is used of it.
"""

import resource
from collections.abc import Generator
from contextlib import contextmanager

from client.intake.rules import IntakeRules

_HEADER_BYTES = 128 * 1024**2
_FRAME_BYTES = 32 * 1024
_PAGE_BYTES = resource.getpagesize()


def header_bytes(rules: IntakeRules) -> int:
    """Return what pydicom may take for a header beyond the file's bytes, 256 MiB by default.

    An item of nothing takes some 750 bytes; functional groups of a frame some ten items.
    """
    return _HEADER_BYTES + _FRAME_BYTES * rules.max_frames


@contextmanager
def within(size_bytes: int) -> Generator[None, None, None]:
    """Let this process take so many more bytes; MemoryError beyond.

    Only in a process that is bounded already, as the decoders' are: another one may have threads that need more.

    Guarantees:
        - bounded_and_given_back: More is a MemoryError, and afterwards the limit is what it was.
    """
    now, most = resource.getrlimit(resource.RLIMIT_AS)
    if now == resource.RLIM_INFINITY:
        yield
        return
    with open("/proc/self/statm", "rb", buffering=0) as pages:  # noqa: PTH123 - a Path takes longer
        taken = int(pages.read(64).split()[0]) * _PAGE_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (min(now, taken + size_bytes), most))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (now, most))
