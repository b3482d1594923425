"""The stored outcomes of charges: a repeated request gets the same bytes, a charge has one outcome, even after a kill.

A charge's secret stands on disk from before the charge until its outcome is stored. A charge with neither secret nor
outcome here had one: older files were put back, or it was forgotten, and a second is never drawn. Out of scope: what is
released (client/agent) and the record of it (client/journal).
"""

from collections.abc import Callable, Collection
from pathlib import Path

from client.channel import pack_reply, unpack_reply
from common.crypto import KeyStream
from common.errors import PolicyRefusal, RefusalCode
from common.files import write_atomic
from common.messages import Kind, Reply, Request

KEPT_REPLIES = 2
KEPT_RUNS = 4
"""Runs whose last replies are kept, the latest ones."""
KEPT_BYTES = 1 << 27
"""Of replies that are in the journal, together; the one that is asked for now comes on top."""
SECRET_BYTES = 32

Released = Collection[tuple[str, Kind, int]]
"""Run, kind and round of everything that stands in the journal."""


def prepare_secret(folder: Path, request: Request, draw: Callable[[], KeyStream]) -> None:
    """Put the secret of a charge on disk, right before the charge is written.

    One that stands already, since a kill or a full disk came in between, was never used and is kept.

    Raises:
        StorageError: The disk does not take it.
    """
    path = _secret(folder, request)
    if not path.exists():
        write_atomic(path, draw().read(SECRET_BYTES), 0o600)


def secret_of_charge(folder: Path, request: Request) -> KeyStream:
    """Return the stream of a charge that stands and has no outcome here.

    Raises:
        PolicyRefusal: It is gone, and with it perhaps an outcome that has left.
    """
    path = _secret(folder, request)
    if not path.exists():
        raise PolicyRefusal(
            RefusalCode.REPLAYED,
            f"Round {request.round} ({request.kind}) is charged, and neither its secret nor its outcome is stored: "
            "older files were put back, and it may have been released. It is not computed again; the run goes on "
            "without it.",
        )
    return KeyStream(path.read_bytes())


def stored_reply(folder: Path, request: Request, digest: str, released: Released) -> Reply | None:
    """Return the reply that this very request got before, if it is still stored.

    Raises:
        PolicyRefusal: The round was answered to another request, or its answer is no longer stored.
    """
    path = _path(folder, request.run_id, request.kind, request.round)
    if path.exists():
        stored_digest, _, frame = path.read_bytes().partition(b"\n")
        if stored_digest == digest.encode():
            path.with_suffix(".secret").unlink(missing_ok=True)  # a kill may have left it beside its outcome
            return unpack_reply(frame)
        raise PolicyRefusal(RefusalCode.REPLAYED, f"Round {request.round} was already answered to another request.")
    if (request.run_id, request.kind, request.round) in released:
        raise PolicyRefusal(RefusalCode.REPLAYED, f"Round {request.round} was answered; its reply is no longer stored.")
    return None


def store_reply(folder: Path, reply: Reply, digest: str) -> None:
    """Store the one outcome of a charge, and forget the charge's secret.

    Raises:
        StorageError: The disk does not take it; the secret stays, so that the same outcome comes again.
    """
    path = _path(folder, reply.run_id, reply.kind, reply.round)
    write_atomic(path, digest.encode() + b"\n" + pack_reply(reply), 0o600)
    path.with_suffix(".secret").unlink(missing_ok=True)


def forget_old_replies(folder: Path, request: Request, released: Released) -> None:
    """Keep the last replies of a run and of the last few runs, and every one that is not in the journal yet.

    A reply that was forgotten is not computed again: its line in the journal makes the same request a replay.

    Guarantees:
        - bounded: However many runs there are, a few runs' replies stay, of so many bytes at most.
    """
    of_run = (number for run_id, kind, number in released if (run_id, kind) == (request.run_id, request.kind))
    old = sorted(number for number in of_run if number < request.round)[: 1 - KEPT_REPLIES]
    names = {_name(request.run_id, request.kind, number) for number in old}
    for path in folder.iterdir():  # few files, however many rounds there were
        if path.name in names:
            path.unlink(missing_ok=True)
    _forget_old_runs(folder, request.run_id, released)


def _forget_old_runs(folder: Path, run_id: str, released: Released) -> None:
    run_of = {_name(*key): key[0] for key in released}
    left = [(path.stat(), path) for path in folder.glob("*.reply") if path.name in run_of]
    kept, held_bytes = {run_id}, 0
    for status, path in sorted(left, key=lambda one: one[0].st_mtime_ns, reverse=True):
        run, held_bytes = run_of[path.name], held_bytes + status.st_size
        if len(kept) < KEPT_RUNS:
            kept.add(run)
        if run not in kept or held_bytes > KEPT_BYTES:
            path.unlink(missing_ok=True)


def _secret(folder: Path, request: Request) -> Path:
    return _path(folder, request.run_id, request.kind, request.round).with_suffix(".secret")


def _path(folder: Path, run_id: str, kind: Kind, round_: int) -> Path:
    return folder / _name(run_id, kind, round_)


def _name(run_id: str, kind: Kind, round_: int) -> str:
    return f"{run_id}-{kind.value}-{round_:06d}.reply"
