"""Who is let in by a greeting, and what is said of the others, over a grid in this process."""

import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp

from common import wire
from common.config import Config
from common.config_text import build_config
from common.crypto import SigningKey
from common.errors import FederationError, RefusalCode, StorageError
from common.greeting import parse_hello
from common.messages import PACKAGE_VERSION, PROTOCOL_VERSION, Kind, Reply, Request
from common.seal import Trust, sign_reply
from server import exchange, roster
from server.app import Job, federate
from server.exchange import Link, as_registered, open_link
from server.registered import Registered
from server.roster import Roster, gather, greet
from server.run_folder import open_run
from simulations.local_grid import FIRST_NODE_ID, LocalGrid
from tests.function_sites import SMALL_RUN, greeting

CONFIG: Config = build_config({}, {**SMALL_RUN, "federation.connect_timeout_s": 120.0})
Answer = Callable[[Message], Message]
KEYS = {name: SigningKey(name.encode()[:1] * 32) for name in ("a", "b", "c", "st-mary")}


def _says(name: str, arrays: dict[str, np.ndarray] | None = None, **changes: object) -> Answer:
    def answer(message: Message) -> Message:
        request = wire.decode_request(message)
        assert parse_hello(request.settings) == PACKAGE_VERSION
        fields = greeting(name, 100, CONFIG).as_fields() | changes
        reply = Reply(Kind.HELLO, request.run_id, 0, None, fields, arrays or {})
        return wire.encode_reply(sign_reply(KEYS[name], request, reply), message)

    return answer


def _header(**header: object) -> Answer:
    """Answer as a site of another protocol, whose messages have these two in common with ours."""

    def answer(message: Message) -> Message:
        records = {"header": ConfigRecord({"kind": "hello", **header}), "other": ArrayRecord()}
        return Message(RecordDict(records), reply_to=message)

    return answer


def _grid(*answers: Answer) -> LocalGrid:
    app = ClientApp()

    @app.query("hello")
    def hello(message: Message, context: Context) -> Message:
        return answers[int(context.node_config["partition-id"])](message)

    return LocalGrid(app, len(answers))


def _greet(*answers: Answer, nodes: dict[int, str] | None = None) -> Roster:
    return greet(Link(_grid(*answers), None, nodes or {}), CONFIG, "run", Roster())


def test_members_are_who_says_well_what_they_are() -> None:
    roster = _greet(_says("b"), _says("a", package="0.0.9"))
    assert list(roster.members) == ["a", "b"]
    assert roster.members["a"].greeting.package == "0.0.9"  # another release of the same protocol takes part
    assert (roster.members["b"].node_id, roster.left_out) == (FIRST_NODE_ID, {})


@pytest.mark.parametrize(
    ("theirs", "package", "fix"),
    [(1, None, "update the site"), (2, "0.0.9", "update the site"), (99, "7.1", "update this coordinator")],
)
def test_a_site_of_another_protocol_is_named_with_both_versions(theirs: int, package: str | None, fix: str) -> None:
    header = {"protocol": theirs} | ({"package": package} if package else {})
    roster = _greet(_says("a"), _header(**header), nodes={FIRST_NODE_ID + 1: "st-mary"})
    assert set(roster.members) == {"a"}
    told = f" (fedmedgan {package})" if package else ""
    assert roster.left_out == {
        "st-mary": f"it speaks protocol {theirs}{told}, this coordinator protocol {PROTOCOL_VERSION} (fedmedgan "
        f"{PACKAGE_VERSION}): {fix}"
    }


def test_a_relay_of_another_protocol_is_named_though_it_only_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    """What this release answers to a hello that it cannot read, seen by a coordinator of the next protocol."""

    def refuse(message: Message) -> Message:
        return wire.encode_reply(Reply(Kind.HELLO, "", 0, RefusalCode.BAD_REQUEST), message)

    grid = _grid(refuse)
    deliver = grid._deliver

    def by_this_release(message: Message) -> Message:
        with monkeypatch.context() as older:
            older.setattr(wire, "PROTOCOL_VERSION", PROTOCOL_VERSION - 1)
            return deliver(message)

    monkeypatch.setattr(grid, "_deliver", by_this_release)
    (reason,) = greet(Link(grid), CONFIG, "run", Roster()).left_out.values()
    assert f"protocol {PROTOCOL_VERSION - 1} (fedmedgan {PACKAGE_VERSION})" in reason


HOSTILE_HEADERS = {
    "none": {},
    "a text": {"protocol": "1"},
    "true": {"protocol": True},
    "negative": {"protocol": -1},
    "huge": {"protocol": 2**31},
    "a float": {"protocol": 1.0},
    "a list": {"protocol": [1, 2]},
}


@pytest.mark.parametrize("what", HOSTILE_HEADERS)
def test_a_header_without_a_version_is_malformed(what: str) -> None:
    roster = _greet(_header(**HOSTILE_HEADERS[what]))
    assert roster == Roster({}, {f"node {FIRST_NODE_ID}": "no valid answer to the greeting (malformed-reply)"})


@pytest.mark.parametrize("package", ["x" * 10**6, "1.0\nst-anne left out", "\x1b[2J", 7])
def test_what_a_header_says_of_its_package_cannot_write_lines(package: object) -> None:
    (reason,) = _greet(_header(protocol=1, package=package)).left_out.values()
    assert reason.startswith("it speaks protocol 1, this coordinator")
    assert reason.isprintable()
    assert len(reason) < 200


WRONG = {
    "a verdict of its own": {"verdict": "maybe"},
    "no patients": {"declared_patients": 0},
    "true patients": {"declared_patients": True},
    "more patients than there are": {"declared_patients": 10**9},
    "rounds below none": {"rounds_allowed": -1},
    "a name with lines": {"site": "a\nb"},
    "another protocol in the fields": {"protocol": PROTOCOL_VERSION - 1},
    "a field more": {"loss": 0.3},
    "a long text": {"capabilities": "local " * 40},
}


@pytest.mark.parametrize("what", WRONG)
def test_a_greeting_that_does_not_read_costs_the_site_its_place(what: str) -> None:
    roster = _greet(_says("a"), _says("b", None, **WRONG[what]))
    assert set(roster.members) == {"a"}
    assert list(roster.left_out.values()) == ["no valid answer to the greeting (malformed-reply)"]


def test_a_greeting_with_arrays_costs_the_site_its_place() -> None:
    roster = _greet(_says("a", {f"w{number}": np.zeros(9, np.float32) for number in range(500)}))
    assert list(roster.left_out.values()) == ["no valid answer to the greeting (malformed-reply)"]


def test_a_hostile_greeting_of_a_million_arrays_is_refused() -> None:
    def flood(message: Message) -> Message:
        arrays = ArrayRecord({str(number): Array("f4", (), "numpy.ndarray", b"") for number in range(10**5)})
        header = ConfigRecord({"protocol": PROTOCOL_VERSION, "kind": "hello"})
        return Message(RecordDict({"header": header, "arrays": arrays}), reply_to=message)

    assert not _greet(flood).members


def test_a_taken_name_is_left_out() -> None:
    roster = _greet(_says("a"), _says("a"))
    assert roster.members["a"].node_id == FIRST_NODE_ID
    assert list(roster.left_out.values()) == ["its name, a, is taken: one site, one node"]


def test_a_site_that_reads_the_proposal_otherwise_is_left_out_with_both_versions() -> None:
    roster = _greet(_says("a", package="0.0.9", proposal_sha256="0" * 64))
    (reason,) = roster.left_out.values()
    ours = f"this coordinator has fedmedgan {PACKAGE_VERSION}: update the site"
    assert reason == f"its fedmedgan 0.0.9 reads the configuration otherwise, {ours}"


def test_a_run_of_sites_of_another_protocol_ends_with_both_versions(tmp_path: Path) -> None:
    config = build_config({}, {**SMALL_RUN, "warmup.share": 0.5})
    now = _registered("st-mary", "b", "c")
    job = Job(config, open_run(tmp_path / "run", config, resume=False), registered=lambda: now)
    job.stop.set()  # no wait between the attempts
    with pytest.raises(FederationError, match=rf"st-mary: it speaks protocol 1, .* protocol {PROTOCOL_VERSION} "):
        list(federate(_grid(*[_header(protocol=1)] * 3), job))


def _registered(*names: str) -> Registered:
    """The nodes of the grid, each let in as one of these sites."""
    trust = Trust(SigningKey(bytes(32)), {name: KEYS[name].verify_key for name in names if name in KEYS})
    return Registered(trust, {FIRST_NODE_ID + number: name for number, name in enumerate(names)})


def _gather(now: list[Registered], *answers: Answer) -> list[Roster]:
    """Look who is here once for each of these states of the coordinator's home, one after the other."""
    left, found = list(now), list[Roster]()
    link = open_link(_grid(*answers), lambda: left[0])
    for _ in now:
        roster = found[-1] if found else Roster()
        with pytest.raises(StopIteration) as ended:
            next(gather(link, CONFIG, "run", roster))
        link, roster = ended.value.value
        found.append(roster)
        del left[0]
    return found


def test_one_site_its_own_node() -> None:
    """Whoever has a site's key and another site's node must not go on where st-mary was shut out."""
    (roster,) = _gather([_registered("b", "a")], _says("a"), _says("a"))
    assert {name: member.node_id for name, member in roster.members.items()} == {"a": FIRST_NODE_ID + 1}
    assert roster.left_out == {"b": "its node answers as a: one site, its own node"}


def test_revoked_is_out() -> None:
    """At the next look, while its node is still connected, and and at each one after."""
    both, one = _registered("a", "b"), _registered("a", "b")
    one = Registered(Trust(one.trust.key, {"b": KEYS["b"].verify_key}), one.nodes)
    first, second, third = _gather([both, one, one], _says("a"), _says("b"))
    assert (set(first.members), first.left_out) == ({"a", "b"}, {})
    assert (set(second.members), second.left_out) == ({"b"}, {"a": "it was revoked"})
    assert (set(third.members), third.left_out) == ({"b"}, {"a": "it was revoked"})


def test_a_site_that_is_enrolled_or_gets_a_new_node_in_mid_run_takes_part() -> None:
    before, after = _registered("a", "b"), _registered("x", "b", "c", "a")
    alone = Registered(before.trust, {FIRST_NODE_ID: "a"})
    first, second, third = _gather([alone, before, after], _says("a"), _says("b"), _says("c"), _says("a"))
    unknown = "no enrolled site has this node"
    assert (set(first.members), set(first.left_out.values())) == ({"a"}, {unknown})
    assert {name: member.node_id - FIRST_NODE_ID for name, member in second.members.items()} == {"a": 0, "b": 1}
    assert {name: member.node_id - FIRST_NODE_ID for name, member in third.members.items()} == {"a": 3, "b": 1, "c": 2}


def test_a_home_that_cannot_be_read_for_a_moment_changes_nothing() -> None:
    def damaged() -> Registered:
        raise StorageError("a record was changed by hand")

    now = _registered("a", "b")
    link = replace(open_link(_grid(_says("a"), _says("b")), lambda: now), registered=damaged)
    assert set(greet(as_registered(link), CONFIG, "run", Roster()).members) == {"a", "b"}
    with pytest.raises(StorageError, match="changed by hand"):  # at the start nobody is let in on half a list
        open_link(link.grid, damaged)


CODES = ("timeout", "flower-3", "flower-4")
"""Of the coordinator's own clock, and of the link's."""


def _silent_run(
    monkeypatch: pytest.MonkeyPatch,
    rounds: int,
    answers: Callable[[int, int], str],
    *,
    looks: Collection[int] = (),
    round_s: float = 1.0,
) -> tuple[list[list[float]], list[Roster]]:
    """Look who is here once a round; `answers` says of node and round "", "silent", or "gone".

    `looks` are those of the numbers with which no round begins. Returns how long each look waited for the silent, and
    what it came to.
    """
    now, waits, rosters, number = _registered("a", "b", "c"), list[list[float]](), [Roster()], 0
    nodes = list(now.nodes)
    says = _grid(*[_says(name) for name in now.nodes.values()])

    def ask(link: Link, requests: dict[int, Request], timeout_s: float) -> Iterator[exchange.Answer]:
        silent = {node_id for node_id in requests if answers(node_id - FIRST_NODE_ID, number) == "silent"}
        waits[-1] += [timeout_s] if silent else []
        heard = {node_id: request for node_id, request in requests.items() if node_id not in silent}
        yield from exchange.ask(link, heard, timeout_s)
        yield from (exchange.Answer(node_id, None, code) for node_id, code in zip(sorted(silent), CODES, strict=False))

    link = open_link(says, lambda: now)
    monkeypatch.setattr(roster, "ask", ask)
    monkeypatch.setattr(roster, "time", SimpleNamespace(monotonic=lambda: number * round_s, sleep=time.sleep))
    for number in range(rounds):
        present = [node_id for node_id in nodes if answers(node_id - FIRST_NODE_ID, number) != "gone"]
        monkeypatch.setattr(says, "get_node_ids", lambda present=present: present)
        waits.append([])
        with pytest.raises(StopIteration) as ended:
            next(gather(link, CONFIG, "run", rosters[-1], begins=number not in looks))
        link, found = ended.value.value
        rosters.append(found)
    return waits, rosters[1:]


def test_silence_costs_little(monkeypatch: pytest.MonkeyPatch) -> None:
    for silent in ((1,), (1, 2)):
        waits, rosters = _silent_run(monkeypatch, 40, lambda node, _: "silent" if node in silent else "")  # noqa: B023
        asked = {number: wait for number, wait in enumerate(waits) if wait}
        assert asked == {
            0: [CONFIG.federation.connect_timeout_s],
            1: [5.0],
            3: [10.0],
            7: [20.0],
            15: [40.0],
            23: [40.0],
            31: [40.0],
            39: [40.0],
        }
        assert sum(map(sum, waits[1:])) <= 5.0 * len(waits[1:])
        assert all(set(roster.members) == set("abc") - {"abc"[node] for node in silent} for roster in rosters)
        told = [roster.left_out["b"].split()[-5] for roster in rosters]
        assert told == ["1", *["2"] * 2, *["4"] * 4, *["8"] * 33]
    assert (
        rosters[0].left_out["b"]
        == "no valid answer to the greeting (timeout); it is asked again after 1 round or 10 min"
    )


def test_silent_ones_in_turns_cost_no_more_than_the_longest(monkeypatch: pytest.MonkeyPatch) -> None:
    waits, _ = _silent_run(
        monkeypatch, 40, lambda node, number: "" if not node else "gone" if number < node else "silent"
    )
    assert max(map(sum, waits[3:])) <= 40.0


def test_who_was_silent_is_heard_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Within eight rounds; at once where its node went away and came back."""
    _, rosters = _silent_run(monkeypatch, 32, lambda node, number: "silent" if node == 1 and number < 24 else "")
    assert [number for number, roster in enumerate(rosters) if "b" in roster.members] == [31]

    def gone(node: int, number: int) -> str:
        return "" if node != 1 or number > 25 else "gone" if number == 25 else "silent"

    _, rosters = _silent_run(monkeypatch, 28, gone)
    assert [number for number, roster in enumerate(rosters) if "b" in roster.members] == [26, 27]


def test_who_was_silent_is_asked_again_after_minutes_however_long_the_rounds_are(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its relay stays connected, so that nothing else tells that its agent is well again."""
    waits, rosters = _silent_run(
        monkeypatch, 20, lambda node, number: "silent" if node == 1 and number < 18 else "", round_s=3600.0
    )
    assert waits[8:18] == [[5.0]] * 10  # and each asking costs no more than the rounds that it sat out
    assert [number for number, roster in enumerate(rosters) if "b" in roster.members] == [18, 19]
    _, rosters = _silent_run(
        monkeypatch, 34, lambda node, number: "silent" if node == 1 and number < 24 else "", round_s=200.0
    )
    assert min(number for number, roster in enumerate(rosters) if "b" in roster.members) <= 24 + 3


def test_looks_while_too_few_are_able_are_no_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    """The silent are what such looks wait for: all of them ask, and none makes the silent sit out for longer."""
    looks = range(2, 20)
    waits, rosters = _silent_run(monkeypatch, 23, lambda node, _: "silent" if node == 1 else "", looks=looks)
    assert [waits[number] for number in looks] == [[5.0]] * len(looks)
    assert {rosters[number].silent[FIRST_NODE_ID + 1].rounds for number in looks} == {2}
    assert [waits[number] for number in (20, 21, 22)] == [[], [10.0], []]


def test_where_too_few_are_left_the_silent_are_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the attempts at a round would be over before an agent that starts anew can answer."""
    waits, _ = _silent_run(monkeypatch, 5, lambda node, number: "silent")
    assert [wait[-1] for wait in waits] == [120.0] * 5


def test_long_nonsense_is_silence_and_a_quick_refusal_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = [_says("a"), _says("b", verdict="maybe")]
    quick = _gather([_registered("a", "b")] * 2, *answers)
    assert [roster.left_out["b"] for roster in quick] == ["no valid answer to the greeting (malformed-reply)"] * 2
    monkeypatch.setattr(roster, "AGAIN_S", 0.0)
    (slow,) = _gather([_registered("a", "b")], *answers)
    assert slow.left_out["b"].endswith("(malformed-reply); it is asked again after 1 round or 10 min")


def test_within_one_machine_load_shuts_nobody_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(roster, "AGAIN_S", 0.0)
    assert not _greet(_says("a"), _says("b", verdict="maybe")).silent
