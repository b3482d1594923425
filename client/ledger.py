"""What was spent on this data set: charged before training, fsynced, never refunded.

One ledger per data set, forever: across runs, configurations, restarts and versions. Out of scope: whether a proposal
fits the policy (client/policy), what left the site (client/journal).
"""

from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, final

from client.chain import Body, Chain
from common.crypto import SigningKey, VerifyKey
from common.errors import ConfigError, PolicyRefusal, RefusalCode, StorageError
from common.messages import Kind
from common.privacy import Charge, epsilon

NAME = "ledger"


@final
@dataclass(frozen=True)
class ChargeRequest:
    """What a charge is for.

    Attributes:
        run_id: The run.
        round: The round; the warm-up's are 0 and its refinements.
        kind: What was asked.
        request_digest: SHA-256 of the request, in hexadecimal.
    """

    run_id: str
    round: int
    kind: Kind
    request_digest: str


@final
@dataclass(frozen=True)
class Entry:
    """One line of the ledger.

    Attributes:
        time: When it was charged, UTC, ISO 8601.
        request: What for.
        charge: How much.
    """

    time: str
    request: ChargeRequest
    charge: Charge


@final
class Ledger:
    """The open ledger of one data set; made by `open_ledger`.

    Guarantees:
        - never_undercounts: Every charge that was returned is in the file, whatever is killed and when.
        - never_over_budget: Two processes cannot both charge the last of it.
        - charged_once: The same request is charged once; a different request for the same round is refused.
        - refused_before_written: A charge over budget leaves the file as it was.
        - roll_back_is_seen: With a copy of the head outside the folder, an older ledger put back whole is refused.
    """

    def __init__(self, chain: Chain) -> None:
        """Read the entries of a verified chain.

        Raises:
            StorageError: A line does not say what a ledger line says.
        """
        self._chain = chain
        self._entries: list[Entry] = []
        self._catch_up()

    @property
    def entries(self) -> tuple[Entry, ...]:
        """All lines in order."""
        return tuple(self._entries)

    @property
    def charges(self) -> tuple[Charge, ...]:
        """All charges in order."""
        return tuple(entry.charge for entry in self._entries)

    def spent(self, delta: float) -> float:
        """Return epsilon at `delta` of everything ever charged."""
        return epsilon(self.charges, delta)

    def require_within(self, max_epsilon: float, delta: float) -> None:
        """Refuse whatever is asked, paid for or not, once more is spent than the policy now allows.

        Raises:
            PolicyRefusal: More is spent.
            StorageError: The ledger was changed.
        """
        with self._chain.locked():
            self._catch_up()
        spent = self.spent(delta)
        if not spent <= max_epsilon:
            raise PolicyRefusal(
                RefusalCode.OVER_BUDGET,
                f"Expected epsilon <= {max_epsilon:g} at delta = {delta:g}, {spent:.4f} is spent already: max_epsilon "
                "of policy.toml was lowered below it. Nothing is released any more.",
            )

    def charge(
        self,
        request: ChargeRequest,
        charge: Charge,
        max_epsilon: float,
        delta: float,
        prepare: Callable[[], object] = lambda: None,
    ) -> float:
        """Charge one request durably, or refuse it before anything is written.

        Args:
            request: What the charge is for. If it stands already with the same digest, nothing more is charged.
            charge: How much.
            max_epsilon: The policy's bound on everything ever charged.
            delta: The policy's delta.
            prepare: Done right before a new charge is written, never for one that stands already.

        Returns:
            Epsilon of everything charged, this one with it.

        Raises:
            PolicyRefusal: Over budget, or another request was charged for the same run, round and kind.
            StorageError: The disk does not take the line, or the ledger was changed.
        """
        with self._chain.locked():
            self._catch_up()
            standing = self._standing(request)
            if standing is not None:
                _refuse_another(standing, request, charge)
                return self.spent(delta)
            after = _affordable([*self.charges, charge], max_epsilon, delta)
            entry = Entry(datetime.now(UTC).isoformat(timespec="seconds"), request, charge)
            prepare()
            self._chain.append(_body(entry))
            self._entries.append(entry)
            return after

    def _catch_up(self) -> None:
        self._entries += [_entry(body) for body in self._chain.bodies[len(self._entries) :]]

    def _standing(self, request: ChargeRequest) -> Entry | None:
        key = (request.run_id, request.round, request.kind)
        same = (
            entry for entry in self._entries if (entry.request.run_id, entry.request.round, entry.request.kind) == key
        )
        return next(same, None)


def open_ledger(folder: Path, key: SigningKey, head_copy: Path | None = None) -> Ledger:
    """Open a data set's ledger and verify all of it; start one where there is none.

    Args:
        folder: Of the ledger.
        key: The site's private key.
        head_copy: A second head, outside the home; every charge is written to it as well before `charge` returns.

    Raises:
        StorageError: It cannot be read, or it was truncated, edited, reordered, rolled back behind the copy of its head
            or signed by another key; or that copy is missing.
    """
    return Ledger(Chain(folder, NAME, key.verify_key, key, head_copy))


def read_ledger(folder: Path, verify_key: VerifyKey, head_copy: Path | None = None) -> Ledger:
    """Open a ledger for reading; a missing one is an error and is not started.

    Raises:
        StorageError: As for `open_ledger`.
    """
    return Ledger(Chain(folder, NAME, verify_key, copy=head_copy))


def _affordable(charges: list[Charge], max_epsilon: float, delta: float) -> float:
    try:
        after = epsilon(charges, delta)
    except ConfigError as error:  # more steps than can be accounted for
        raise PolicyRefusal(RefusalCode.OVER_BUDGET, str(error)) from error
    if not after <= max_epsilon:
        spent, alone = epsilon(charges[:-1], delta), epsilon(charges[-1:], delta)
        raise PolicyRefusal(
            RefusalCode.OVER_BUDGET,
            f"Expected epsilon <= {max_epsilon:g} at delta = {delta:g} after this charge, got {after:.4f}: "
            f"{max(0.0, max_epsilon - spent):.4f} is left of the data set's budget ({spent:.4f} is spent), and this "
            f"charge alone asks for {alone:.4f}. Ask the coordinator for a smaller run; only the privacy officer can "
            "raise max_epsilon of policy.toml.",
        )
    return after


def _refuse_another(standing: Entry, request: ChargeRequest, charge: Charge) -> None:
    if standing.request == request and standing.charge == charge:
        return
    raise PolicyRefusal(
        RefusalCode.REPLAYED,
        f"Round {request.round} ({request.kind}) of this run was charged for another request or other noise. "
        "One round releases one output: start a new run.",
    )


def _body(entry: Entry) -> dict[str, Any]:
    return {
        "time": entry.time,
        "run_id": entry.request.run_id,
        "round": entry.request.round,
        "kind": entry.request.kind.value,
        "request_digest": entry.request.request_digest,
        "noise_multiplier": entry.charge.noise_multiplier,
        "sample_rate": entry.charge.sample_rate,
        "steps": entry.charge.steps,
    }


def _entry(body: Body) -> Entry:
    try:
        entry = Entry(
            body["time"],
            ChargeRequest(body["run_id"], body["round"], Kind(body["kind"]), body["request_digest"]),
            Charge(body["noise_multiplier"], body["sample_rate"], body["steps"]),
        )
        if _body(entry) == dict(body):
            return entry
    except (KeyError, ValueError, TypeError, ConfigError):
        pass  # said below
    raise StorageError("A line of the ledger is of another version. Use the version of fedmedgan that wrote it.")
