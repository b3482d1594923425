"""What a run learns of its sites before it asks them anything: versions, and how many rounds each will join.

Shown at the start of a run and whenever somebody new comes, and kept as `handshake.json` in the run folder. Out of
scope: asking (server/roster), how a site comes to its verdict (client/hello).
"""

import json
import re
import time
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import final

from common.config import Config
from common.errors import PolicyRefusal, RefusalCode
from common.files import write_atomic
from common.greeting import Greeting, Verdict, pays_for_warm_up, planned_rounds
from common.messages import PACKAGE_VERSION, PROTOCOL_VERSION
from common.wire import Release
from server.run_folder import RunFolder

VERSION = 1
ALL_REFUSE = "Every site refuses this run for good"
FEW_REMAIN = "Too few sites are left for this run"
"""So the messages of a run begin that going on with is of no use by itself."""
_FIXES = {
    RefusalCode.OVER_BUDGET.value: "the site's budget does not pay for it; propose less (a lower privacy.epsilon, "
    "or with rounds of training a lower warmup.share) in a new run, or its privacy officer allows more, then `resume`",
    RefusalCode.POLICY.value: "its policy forbids what is proposed; change the configuration and start a new run",
    RefusalCode.NO_DATA.value: "it has imported nothing for these classes, size and channels; the site imports, then "
    "`resume`; or change [image] and start a new run",
}
_NAMED = 3
"""Sites that a line of many names."""

_WHY = {
    Verdict.OK: "",
    Verdict.OVER_BUDGET: "budget",
    Verdict.POLICY: "policy",
    Verdict.NO_DATA: "no images imported for these classes, size and channels",
    Verdict.BAD_REQUEST: "it cannot plan this run",
}


@final
@dataclass(frozen=True)
class Handshake:
    """Sites that said something new, to be shown.

    Attributes:
        sites: What they said, by name.
        left_out: Why others take no part.
        first: Whether this is the run's first, with a heading.
        compact: Whether one line for all of them is enough: within one machine they are all of this release.
        run_id: The run, as the sites' ledgers and journals name it.
    """

    sites: Mapping[str, Greeting]
    left_out: Mapping[str, str]
    first: bool
    compact: bool
    run_id: str = ""


@final
@dataclass
class Met:
    """What all sites of a run said last, since this process started.

    Attributes:
        folder: The run's; `handshake.json` in it is written whenever something changes.
        config: The run's configuration.
        compact: As in `Handshake`.
        sites: What the members said, by name.
        left_out: Why others take no part.
        began: When this process began to look for sites.
    """

    folder: RunFolder
    config: Config
    compact: bool
    sites: dict[str, Greeting] = field(default_factory=dict[str, Greeting])
    left_out: dict[str, str] = field(default_factory=dict[str, str])
    began: float = field(default_factory=time.monotonic)


def meet(met: Met, sites: Mapping[str, Greeting], left_out: Mapping[str, str]) -> Iterator[Handshake]:
    """Yield what is new in a greeting, if anything is, after it was written down.

    Args:
        met: What is known; changed.
        sites: What the members say.
        left_out: Why others take no part.

    Raises:
        StorageError: The file cannot be written.
    """
    said = {name: greeting for name, greeting in sites.items() if met.sites.get(name) != greeting}
    why = {name: reason for name, reason in left_out.items() if met.left_out.get(name) != reason}
    if said or why:
        first = not met.sites and not met.left_out
        met.sites |= said
        met.left_out = {name: reason for name, reason in (met.left_out | why).items() if name not in said}
        _write(met)
        yield Handshake(said, why, first, met.compact, met.folder.run_id)


def all_refuse(codes: Mapping[str, str]) -> PolicyRefusal:
    """Return the error of a run that every site refuses, by the codes of the sites: who must do what."""
    return _refused(f"{ALL_REFUSE} ({listed(codes)})", codes)


def few_remain(codes: Mapping[str, str], left: int, least: int) -> PolicyRefusal:
    """Return the error of a run that too many sites refuse, by their codes: who must do what."""
    return _refused(
        f"{FEW_REMAIN}: {left}, and at least {least} are needed; for good it is refused by {listed(codes)}", codes
    )


def is_refused(why: str) -> bool:
    """Tell whether a run ended by a refusal for good, by the words of its end."""
    return why.startswith((ALL_REFUSE, FEW_REMAIN))


def listed(codes: Mapping[str, str]) -> str:
    """Write sites with their codes."""
    return ", ".join(f"{site}: {code}" for site, code in codes.items())


def advice(codes: Collection[str]) -> str:
    """Write for each code of a refusal for good who must do what; nothing for others. It ends with a space."""
    return "".join(f"{code}: {fix}. " for code, fix in _FIXES.items() if code in codes)


def _refused(what: str, codes: Mapping[str, str]) -> PolicyRefusal:
    told = f"{what}. {advice(codes.values())}Each site's agent.log has the details."
    return PolicyRefusal(RefusalCode.POLICY, told)


def lines(config: Config, handshake: Handshake) -> list[str]:
    """Write a handshake as lines of text: a site each, or if it is compact one for all."""
    heading = (
        f"handshake: protocol {PROTOCOL_VERSION}, fedmedgan {PACKAGE_VERSION}, configuration {config.digest()[:12]}"
    )
    if not handshake.compact:
        heading += f", run {handshake.run_id} in the sites' ledgers"
    first = [heading] if handshake.first else []
    missing = [f"  {name}  left out: {reason}" for name, reason in handshake.left_out.items()]
    if handshake.compact:
        return first + _in_one(config, handshake.sites) + missing
    wide = max(map(len, handshake.sites), default=0)
    rows: list[str] = []
    for name, said in handshake.sites.items():
        other = "" if said.package == PACKAGE_VERSION else f", here {PACKAGE_VERSION}"
        about = f"{said.declared_patients} patients  fedmedgan {said.package}{other}"
        rows.append(f"  {name:{wide}}  {about}  {extent(config, said)}")
    return first + rows + missing


def extent(config: Config, said: Greeting) -> str:
    """Write how much of a run a site joins, and why not all of it.

    >>> site = Greeting("st-mary", 200, 3, "0.1.0", "", "local", Verdict.OVER_BUDGET, 61)
    >>> extent(Config.model_validate({"federation": {"rounds": 100}}), site)
    'will join 60 of 100 rounds: budget'
    """
    rounds, warmup = config.federation.rounds, config.warmup.share > 0
    why = f": {_WHY[said.verdict]}" if _WHY[said.verdict] else ""
    allowed = min(said.rounds_allowed, planned_rounds(config))
    if not pays_for_warm_up(config, said):
        return f"will not join the warm-up{why}"
    if allowed == 0:
        return f"will not join{why}"
    if allowed == config.warmup_releases:
        return f"will join the warm-up alone{why}"
    return f"will join {allowed - warmup} of {rounds} rounds{why}"


def other_protocol(release: Release) -> str:
    """Write why a site of another protocol takes no part: both versions, and which side is behind."""
    theirs = f" (fedmedgan {release.package})" if release.package else ""
    behind = "the site" if release.protocol < PROTOCOL_VERSION else "this coordinator"
    return (
        f"it speaks protocol {release.protocol}{theirs}, this coordinator protocol {PROTOCOL_VERSION} (fedmedgan "
        f"{PACKAGE_VERSION}): update {behind}"
    )


def other_proposal(config: Config, said: Greeting) -> str | None:
    """Write why a site that reads another proposal than was sent takes no part; None if both read the same."""
    if said.proposal_sha256 == config.digest():
        return None
    known = said.capabilities.split()
    unknown = [name for name in (config.train.algorithm, config.model.name) if name not in known]
    reads = f"has no {' and no '.join(unknown)}" if unknown else "reads the configuration otherwise"
    ours, theirs = _order(PACKAGE_VERSION), _order(said.package)
    fix = "update the site" if theirs < ours else "update this coordinator" if theirs > ours else "report it"
    return f"its fedmedgan {said.package} {reads}, this coordinator has fedmedgan {PACKAGE_VERSION}: {fix}"


def _write(met: Met) -> None:
    tree = {
        "version": VERSION,
        "run": met.folder.path.name,
        "run_id": met.folder.run_id,
        "protocol": PROTOCOL_VERSION,
        "package": PACKAGE_VERSION,
        "config_sha256": met.config.digest(),
        "rounds": planned_rounds(met.config),
        "sites": {name: greeting.as_fields() for name, greeting in sorted(met.sites.items())},
        "left_out": dict(sorted(met.left_out.items())),
    }
    write_atomic(met.folder.path / "handshake.json", (json.dumps(tree, indent=1) + "\n").encode())


def _in_one(config: Config, sites: Mapping[str, Greeting]) -> list[str]:
    groups: dict[str, list[str]] = {}
    for name, said in sites.items():
        groups.setdefault(extent(config, said), []).append(name)
    parts = [
        f"{', '.join(names) if len(names) <= _NAMED else f'{len(names)} sites'} {words}"
        for words, names in sorted(groups.items(), key=lambda group: -len(group[1]))
    ]
    return [f"  {'; '.join(parts)}"] if parts else []


def _order(package: str) -> tuple[int, ...]:
    """Return the numbers of a package version before anything else in it."""
    found = re.match(r"\d{1,9}(\.\d{1,9})*", package)
    return tuple(map(int, found[0].split("."))) if found else ()
