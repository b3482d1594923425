"""Ledger, journal and stored replies of one home held against each other, and the export that travels alone."""

import dataclasses
import json
import shutil
from datetime import UTC, datetime

import numpy as np
import pytest

from client import journal
from client.agent import answer, open_site
from client.channel import pack_reply, unpack_reply
from client.home import Home
from client.ledger import ChargeRequest
from client.verify import EXPORT_FORM, export_journal, read_export, verify_home
from common.crypto import SigningKey, load_key
from common.errors import StorageError, WireError
from common.messages import Kind, Reply
from common.privacy import Charge
from common.seal import content_digest
from tests.tiny_site import warmup_request

NOW = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)


@pytest.fixture(scope="module")
def used_template(tiny_template, tiny_proposal, tmp_path_factory):
    folder = tmp_path_factory.mktemp("used") / "home"
    shutil.copytree(tiny_template, folder)
    assert answer(open_site(Home(folder)), warmup_request(proposal=tiny_proposal)).refusal is None
    return folder


@pytest.fixture
def used(used_template, tmp_path):
    """Return a home that answered one warm-up."""
    shutil.copytree(used_template, tmp_path / "used")
    return Home(tmp_path / "used")


def key_of(home):
    return load_key(home.key)


def verified(home):
    return verify_home(home, key_of(home).verify_key)


def release(home, round_=1, run="run-1"):
    fields = {"epsilon_spent": 1.0, "epsilon_allowed": 8.0}
    reply = Reply(Kind.TRAIN, run, round_, None, fields, {"w": np.ones(3, np.float32)})
    journal.append(home.journal, key_of(home), reply, 1.0, NOW)
    return reply


def charge(home, round_=1, digest="ab"):
    open_site(home).ledger.charge(ChargeRequest("run-1", round_, Kind.TRAIN, digest), Charge(1e5, 1.0, 1), 8.0, 1e-5)


def test_a_home_that_was_never_used(tiny_home):
    assert dataclasses.astuple(verified(tiny_home)) == (0, 0, 0, 0, ())


def test_a_home_that_answered(used):
    assert dataclasses.astuple(verified(used)) == (1, 1, 1, 0, ())


def test_no_release_without_a_charge(used):
    release(used)
    assert verified(used).findings == ("round 1 (train) of run run-1 was released without a charge",)
    charge(used)
    assert verified(used).findings == ()


def test_one_release_per_charge(used):
    charge(used)
    first = release(used)
    body = journal.entries(used.journal, key_of(used).verify_key)[-1]
    other = dataclasses.replace(first, fields={**first.fields, "epsilon_spent": 2.0})
    chain = journal.Chain(used.journal, journal.NAME, key_of(used).verify_key, key_of(used))
    with chain.locked():  # what `journal.append` refuses
        chain.append({**chain.bodies[-1], "sha256": content_digest(other)})
    assert body.sha256 == content_digest(first)
    assert verified(used).findings == ("round 1 (train) of run run-1 was released 2 times",)


def test_a_charge_without_a_release_is_counted_and_no_finding(used):
    charge(used)
    found = verified(used)
    assert (found.unreleased, found.findings) == (1, ())


def test_a_journal_put_back_shows_as_charges_without_a_release(used):
    older = {path: path.read_bytes() for path in used.journal.iterdir()}
    for number in (1, 2):
        charge(used, number)
        release(used, number)
    assert verified(used).unreleased == 0
    for path, content in older.items():
        path.write_bytes(content)
    assert verified(used).unreleased == 2


def change(home, edit):
    (path,) = home.replies.glob("*.reply")
    digest, _, frame = path.read_bytes().partition(b"\n")
    path.write_bytes(edit(digest, frame))


def louder(digest, frame):
    reply = unpack_reply(frame)
    return digest + b"\n" + pack_reply(dataclasses.replace(reply, arrays={"embedding": reply.arrays["embedding"] * 2}))


def of_another_run(digest, frame):
    return digest + b"\n" + pack_reply(dataclasses.replace(unpack_reply(frame), run_id="run-2"))


@pytest.mark.parametrize(
    ("edit", "finding"),
    [
        (louder, "is not what the journal says was released"),
        (of_another_run, "has no charge"),
        (lambda digest, frame: b"00" * 32 + b"\n" + frame, "answers another request"),
        (lambda digest, frame: digest + b"\n" + frame[:-1], "does not read"),
        (lambda digest, frame: b"", "does not read"),
    ],
)
def test_stored_is_released(used, edit, finding):
    change(used, edit)
    (found,) = verified(used).findings
    assert finding in found


def test_a_reply_that_was_stored_and_not_yet_released_is_well(used):
    charge(used, 1, "cd")
    reply = Reply(Kind.TRAIN, "run-1", 1, None, {}, {"w": np.ones(3, np.float32)})
    (used.replies / "run-1-train-000001.reply").write_bytes(b"cd\n" + pack_reply(reply))
    assert (verified(used).findings, verified(used).replies, verified(used).unreleased) == ((), 2, 1)


def exported(home, path):
    path.write_bytes(export_journal(home.journal, key_of(home).verify_key))
    return path


def test_an_export_is_verified_with_nothing_of_the_site(used, tmp_path):
    charge(used)
    release(used)
    expected = journal.entries(used.journal, key_of(used).verify_key)
    path, verify_key = exported(used, tmp_path / "export"), key_of(used).verify_key
    private = key_of(used).to_bytes()
    shutil.rmtree(used.folder)
    assert read_export(path) == (verify_key, expected)
    assert len(expected) == 2
    assert private.hex().encode() not in path.read_bytes()


def test_an_export_of_an_empty_journal(tiny_home, tmp_path):
    assert read_export(exported(tiny_home, tmp_path / "export"))[1] == ()


def test_a_line_that_was_not_acknowledged_is_not_exported(used, tmp_path):
    with (used.journal / "journal.jsonl").open("ab") as lines:
        lines.write(b'{"half a li')
    path = exported(used, tmp_path / "export")
    assert b"half a li" not in path.read_bytes()
    assert len(read_export(path)[1]) == 1


EDITS = {
    "edited": lambda head, lines: head + lines.replace(b'"round":1', b'"round":7'),
    "cut": lambda head, lines: head + lines[: lines.index(b"\n") + 1],
    "emptied": lambda head, lines: head,
    "reordered": lambda head, lines: head + b"".join(reversed(lines.splitlines(keepends=True))),
    "another key": lambda head, lines: (
        json.dumps({**json.loads(head), "verify_key": SigningKey.generate().verify_key.to_bytes().hex()}).encode()
        + b"\n"
        + lines
    ),
    "another head": lambda head, lines: (
        json.dumps({**json.loads(head), "head": {"number": 1}}).encode() + b"\n" + lines
    ),
}


@pytest.mark.parametrize("how", EDITS)
def test_same_checks_for_an_export(used, tmp_path, how):
    for number in (1, 2):
        charge(used, number)
        release(used, number)
    path = exported(used, tmp_path / "export")
    head, _, lines = path.read_bytes().partition(b"\n")
    path.write_bytes(EDITS[how](head + b"\n", lines))
    with pytest.raises(StorageError, match="cannot be trusted") as caught:
        read_export(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff\n",
        b"[]\n",
        b"{}\n",
        b"[" * 5000 + b"\n",
        json.dumps({"form": "another"}).encode(),
        json.dumps({"form": EXPORT_FORM, "verify_key": "00", "head": {}}).encode(),
        json.dumps({"form": EXPORT_FORM, "verify_key": "xx", "head": {}}).encode(),
    ],
)
def test_what_is_no_export(tmp_path, content):
    (tmp_path / "file").write_bytes(content)
    with pytest.raises(WireError, match="journal export"):
        read_export(tmp_path / "file")


def test_an_export_that_is_not_there(tmp_path):
    with pytest.raises(StorageError, match="Could not read"):
        read_export(tmp_path / "none")
