import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from client.ledger import ChargeRequest, open_ledger, read_ledger
from common.crypto import SigningKey
from common.errors import PolicyRefusal, RefusalCode, StorageError
from common.messages import Kind
from common.privacy import Charge, epsilon

KEY = SigningKey.from_bytes(bytes(range(32)))
DELTA = 1e-5
ROUND = Charge(5.0, 0.1, 10)
ROOT = Path(__file__).resolve().parents[2]

# charges rounds first... and prints each once it stands
CHILD = """
import resource, sys
from pathlib import Path
from client.ledger import ChargeRequest, open_ledger
from common.crypto import SigningKey
from common.errors import FedmedganError
from common.messages import Kind
from common.privacy import Charge
folder, first, count, bound, limit = Path(sys.argv[1]), *map(float, sys.argv[2:])
ledger = open_ledger(folder, SigningKey.from_bytes(bytes(range(32))))
if limit:
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(limit), int(limit)))
print("open", flush=True)
sys.stdin.readline()
for number in range(int(first), int(first + count)):
    request = ChargeRequest("run", number, Kind.TRAIN, f"{number:064x}")
    try:
        ledger.charge(request, Charge(5.0, 0.1, 10), bound, 1e-5)
        print(number, flush=True)
    except FedmedganError as error:
        print(type(error).__name__, flush=True)
        break
"""

# forks one ledger process for each line it reads, so that imports are paid for once; one writes until it is killed
NURSERY = """
import os, sys
from pathlib import Path
from client.ledger import ChargeRequest, open_ledger
from common.crypto import SigningKey
from common.messages import Kind
from common.privacy import Charge
for line in sys.stdin:
    receive, send = os.pipe()
    victim = os.fork()
    if victim:
        os.write(1, f"born {victim}\\n".encode())
        os.write(send, b"!")
        os.waitpid(victim, 0)
        os.write(1, b"dead\\n")
        os.close(receive)
        os.close(send)
        continue
    os.read(receive, 1)
    ledger = open_ledger(Path(sys.argv[1]), SigningKey.from_bytes(bytes(range(32))), Path(sys.argv[2]))
    for number in range(int(line), int(line) + 10_000):
        request = ChargeRequest("run", number, Kind.TRAIN, f"{number:064x}")
        ledger.charge(request, Charge(50.0, 1.0, 1), 1e9, 1e-5)
        os.write(1, f"{number}\\n".encode())
"""


def child(folder, first=1, count=1, bound=1e9, limit=0):
    return subprocess.Popen(
        [sys.executable, "-c", CHILD, str(folder), str(first), str(count), str(bound), str(limit)],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def request(number=1, digest="aa", run="run", kind=Kind.TRAIN):
    return ChargeRequest(run, number, kind, digest)


@pytest.fixture
def three(tmp_path):
    ledger = open_ledger(tmp_path, KEY)
    for number in (1, 2, 3):
        ledger.charge(request(number), ROUND, 10.0, DELTA)
    return tmp_path


def lines_of(folder):
    return (folder / "ledger.jsonl").read_bytes().splitlines(keepends=True)


def test_charges_compose_and_survive(tmp_path):
    ledger = open_ledger(tmp_path, KEY)
    assert ledger.spent(DELTA) == 0.0
    warmup = Charge(2.0, 1.0, 1)
    first = ledger.charge(request(0, kind=Kind.WARMUP), warmup, 10.0, DELTA)
    second = ledger.charge(request(1), ROUND, 10.0, DELTA)
    assert first == epsilon([warmup], DELTA)
    assert second == epsilon([warmup, ROUND], DELTA) > first
    again = open_ledger(tmp_path, KEY)
    assert again.charges == ledger.charges == (warmup, ROUND)
    assert again.entries == ledger.entries
    assert again.spent(DELTA) == second
    assert len(read_ledger(tmp_path, KEY.verify_key).entries) == 2


def test_lines_say_what_was_charged(three):
    line = json.loads(lines_of(three)[1])
    assert set(line) == {
        *("version", "number", "time", "run_id", "round", "kind", "noise_multiplier", "sample_rate", "steps"),
        *("request_digest", "previous", "hash", "signature"),
    }
    assert line["previous"] == json.loads(lines_of(three)[0])["hash"]
    assert (three / "ledger.jsonl").stat().st_mode & 0o077 == 0


def test_refused_before_written_when_over_budget(three):
    before = lines_of(three)
    ledger = open_ledger(three, KEY)
    with pytest.raises(PolicyRefusal, match="max_epsilon") as caught:
        ledger.charge(request(4), ROUND, ledger.spent(DELTA) * 1.001, DELTA)
    assert caught.value.code is RefusalCode.OVER_BUDGET
    assert lines_of(three) == before
    with pytest.raises(PolicyRefusal) as caught:
        ledger.charge(request(4), Charge(1e5, 0.1, 499_999), 1e9, DELTA)
    assert caught.value.code is RefusalCode.OVER_BUDGET


def test_a_refusal_says_what_is_left_and_what_is_asked(three):
    ledger, before, large = open_ledger(three, KEY), lines_of(three), Charge(0.5, 1.0, 1)
    spent = ledger.spent(DELTA)
    with pytest.raises(PolicyRefusal) as refusal:
        ledger.charge(request(9, kind=Kind.WARMUP), large, spent + 0.5, DELTA)
    assert refusal.value.code is RefusalCode.OVER_BUDGET
    said = str(refusal.value)
    assert f"0.5000 is left of the data set's budget ({spent:.4f} is spent)" in said
    assert f"this charge alone asks for {epsilon([large], DELTA):.4f}" in said
    assert lines_of(three) == before


def test_never_over_budget_to_the_last_digit(three):
    ledger = open_ledger(three, KEY)
    after = epsilon([*ledger.charges, ROUND], DELTA)
    with pytest.raises(PolicyRefusal):
        ledger.charge(request(4), ROUND, after * (1 - 1e-9), DELTA)
    assert ledger.charge(request(4), ROUND, after, DELTA) == after


def test_charged_once_for_a_retry_and_replays_are_refused(three):
    ledger = open_ledger(three, KEY)
    spent = ledger.spent(DELTA)
    assert ledger.charge(request(2), ROUND, 0.001, DELTA) == spent  # it stands already: no budget is needed
    assert len(ledger.entries) == 3
    for again, charge in ((request(2, "bb"), ROUND), (request(2), Charge(4.0, 0.1, 10))):
        with pytest.raises(PolicyRefusal) as caught:
            ledger.charge(again, charge, 10.0, DELTA)
        assert caught.value.code is RefusalCode.REPLAYED
    ledger.charge(request(2, "bb", run="another"), ROUND, 10.0, DELTA)
    assert len(read_ledger(three, KEY.verify_key).entries) == 4


def test_two_handles_see_each_other(tmp_path):
    first, second = open_ledger(tmp_path, KEY), open_ledger(tmp_path, KEY)
    first.charge(request(1), ROUND, 10.0, DELTA)
    second.charge(request(2), ROUND, 10.0, DELTA)
    assert first.charge(request(3), ROUND, 10.0, DELTA) == epsilon([ROUND] * 3, DELTA)


def edit(folder, change):
    lines = lines_of(folder)
    change(lines)
    (folder / "ledger.jsonl").write_bytes(b"".join(lines))


TAMPERING = {
    "truncated": lambda lines: lines.pop(),
    "emptied": lambda lines: lines.clear(),
    "first removed": lambda lines: lines.pop(0),
    "reordered": lambda lines: lines.insert(0, lines.pop(1)),
    "duplicated": lambda lines: lines.append(lines[-1]),
    "edited": lambda lines: lines.insert(1, lines.pop(1).replace(b'"steps":10', b'"steps":11')),
    "respaced": lambda lines: lines.insert(1, lines.pop(1).replace(b'"steps":10', b'"steps": 10')),
    "no newline at the end": lambda lines: lines.append(lines.pop()[:-1]),
    "not JSON": lambda lines: lines.insert(1, b"{]\n"),
    "a list": lambda lines: lines.insert(1, b"[]\n"),
    "not UTF-8": lambda lines: lines.insert(1, b"\xff\n"),
    "endless": lambda lines: lines.insert(1, b"1" * 10_000 + b"\n"),
}


@pytest.mark.parametrize("how", TAMPERING)
def test_tampering_is_seen(three, how):
    edit(three, TAMPERING[how])
    for look in (lambda: open_ledger(three, KEY), lambda: read_ledger(three, KEY.verify_key)):
        with pytest.raises(StorageError, match=r"restore the folder from a backup"):
            look()


def test_tampering_is_seen_with_a_recomputed_chain(three, tmp_path_factory):
    forged = tmp_path_factory.mktemp("forged")
    other = SigningKey.generate()
    ledger = open_ledger(forged, other)
    for number in (1, 2, 3):
        ledger.charge(request(number), Charge(50.0, 0.1, 10), 10.0, DELTA)
    (three / "ledger.jsonl").write_bytes((forged / "ledger.jsonl").read_bytes())
    with pytest.raises(StorageError, match="not signed by this site's key"):
        open_ledger(three, KEY)
    (three / "ledger.head.json").write_bytes((forged / "ledger.head.json").read_bytes())
    with pytest.raises(StorageError, match=r"head file .* is not this site's"):
        open_ledger(three, KEY)


def test_tampering_is_seen_when_files_are_missing_or_head_is_old(three):
    head = three / "ledger.head.json"
    newest = head.read_bytes()
    (three / "ledger.jsonl").rename(three / "away")
    with pytest.raises(StorageError, match="its tail is missing"):
        open_ledger(three, KEY)
    (three / "away").rename(three / "ledger.jsonl")
    head.unlink()
    with pytest.raises(StorageError, match="head file is missing"):
        open_ledger(three, KEY)
    head.write_bytes(newest)
    ledger = open_ledger(three, KEY)
    for number in (4, 5):
        ledger.charge(request(number), ROUND, 10.0, DELTA)
    head.write_bytes(newest)  # two behind: no crash leaves that
    with pytest.raises(StorageError, match="does not fit"):
        open_ledger(three, KEY)


def test_truncation_under_an_open_ledger_is_seen(three):
    ledger = open_ledger(three, KEY)
    edit(three, TAMPERING["truncated"])
    with pytest.raises(StorageError, match="cut or replaced"):
        ledger.charge(request(4), ROUND, 10.0, DELTA)


def test_one_line_ahead_of_the_head_is_accepted_and_mended(three):
    head = three / "ledger.head.json"
    old = head.read_bytes()
    open_ledger(three, KEY).charge(request(4), ROUND, 10.0, DELTA)
    newest = head.read_bytes()
    head.write_bytes(old)
    assert len(read_ledger(three, KEY.verify_key).entries) == 4
    assert head.read_bytes() == old
    assert len(open_ledger(three, KEY).entries) == 4
    assert head.read_bytes() == newest


@pytest.mark.parametrize("keep", [1, 50, -1])
def test_torn_line_beyond_the_head_is_dropped(three, keep):
    head = (three / "ledger.head.json").read_bytes()
    open_ledger(three, KEY).charge(request(4), ROUND, 10.0, DELTA)
    (three / "ledger.head.json").write_bytes(head)
    edit(three, lambda lines: lines.append(lines.pop()[:keep]))
    assert len(read_ledger(three, KEY.verify_key).entries) == 3
    ledger = open_ledger(three, KEY)
    assert len(ledger.entries) == 3
    assert len(lines_of(three)) == 3
    ledger.charge(request(4), ROUND, 10.0, DELTA)
    assert len(read_ledger(three, KEY.verify_key).entries) == 4


@pytest.fixture
def copied(tmp_path):
    """Return the folder of a ledger of three charges, and the copy of its head."""
    folder, copy = tmp_path / "ledger", tmp_path / "elsewhere.json"
    folder.mkdir()
    ledger = open_ledger(folder, KEY, copy)
    for number in (1, 2, 3):
        ledger.charge(request(number), ROUND, 10.0, DELTA)
    return folder, copy


def files_of(folder):
    return {path: path.read_bytes() for path in folder.iterdir()}


def put_back(files):
    for path, content in files.items():
        path.write_bytes(content)


def test_the_copy_of_the_head_moves_with_every_charge(copied):
    folder, copy = copied
    assert copy.read_bytes() == (folder / "ledger.head.json").read_bytes()
    assert json.loads(copy.read_bytes())["number"] == 3
    assert copy.stat().st_mode & 0o077 == 0
    assert open_ledger(folder, KEY, copy).entries == read_ledger(folder, KEY.verify_key, copy).entries


@pytest.mark.parametrize("newer", [1, 2])
def test_roll_back_is_seen(copied, newer):
    """All files of the ledger put back together: without the copy it cannot be seen, with it it is."""
    folder, copy = copied
    older = files_of(folder)
    ledger = open_ledger(folder, KEY, copy)
    for number in range(4, 4 + newer):
        ledger.charge(request(number), ROUND, 10.0, DELTA)
    put_back(older)
    assert len(open_ledger(folder, KEY).entries) == 3
    before = copy.read_bytes()
    for look in (lambda: open_ledger(folder, KEY, copy), lambda: read_ledger(folder, KEY.verify_key, copy)):
        with pytest.raises(StorageError, match=rf"copy .* says {3 + newer} lines and the file has 3.*an older state"):
            look()
    assert copy.read_bytes() == before
    with pytest.raises(StorageError, match="cut or replaced"):
        ledger.charge(request(9), ROUND, 10.0, DELTA)


def test_roll_back_is_seen_to_the_empty_ledger(copied):
    folder, copy = copied
    for path in folder.iterdir():
        path.unlink()
    with pytest.raises(StorageError, match=r"copy .* says 3 lines and the file has 0"):
        open_ledger(folder, KEY, copy)


def test_roll_back_is_seen_when_another_branch_was_charged(copied):
    folder, copy = copied
    older = files_of(folder)
    open_ledger(folder, KEY, copy).charge(request(4), ROUND, 10.0, DELTA)
    put_back(older)
    open_ledger(folder, KEY).charge(request(5), ROUND, 10.0, DELTA)  # by an agent that was told of no copy
    with pytest.raises(StorageError, match="does not fit"):
        open_ledger(folder, KEY, copy)


def test_a_missing_old_or_foreign_copy_is_refused_and_says_what_to_do(copied):
    folder, copy = copied
    newest = copy.read_bytes()
    copy.unlink()
    for look in (lambda: open_ledger(folder, KEY, copy), lambda: read_ledger(folder, KEY.verify_key, copy)):
        with pytest.raises(StorageError, match=r"is missing\. Mount its disk.*ledger\.head\.json there"):
            look()
    assert not copy.exists()
    copy.write_bytes((folder / "ledger.head.json").read_bytes())  # what the message says
    ledger = open_ledger(folder, KEY, copy)
    for number in (4, 5):
        ledger.charge(request(number), ROUND, 10.0, DELTA)
    copy.write_bytes(newest)  # two behind: no crash leaves that
    with pytest.raises(StorageError, match=r"copy .* does not fit"):
        open_ledger(folder, KEY, copy)
    for content in (b"", b"{}", b"[" * 9000, newest.replace(b'"number":3', b'"number":5')):
        copy.write_bytes(content)
        with pytest.raises(StorageError, match="is not this site's"):
            open_ledger(folder, KEY, copy)


@pytest.mark.parametrize("written", [(), ("line",), ("line", "copy"), ("line", "copy", "head")])
def test_no_crash_blocks_at_any_point_of_a_charge(copied, written):
    folder, copy = copied
    paths = {"line": folder / "ledger.jsonl", "copy": copy, "head": folder / "ledger.head.json"}
    before = {name: path.read_bytes() for name, path in paths.items()}
    open_ledger(folder, KEY, copy).charge(request(4), ROUND, 10.0, DELTA)
    after = paths["head"].read_bytes()
    for name in set(paths) - set(written):
        paths[name].write_bytes(before[name])
    expected = 4 if written else 3
    assert len(read_ledger(folder, KEY.verify_key, copy).entries) == expected
    assert len(open_ledger(folder, KEY, copy).entries) == expected
    assert paths["head"].read_bytes() == copy.read_bytes() == (after if written else before["head"])


def test_no_crash_blocks_between_the_first_copy_and_the_first_head(tmp_path):
    copy = tmp_path / "copy.json"
    (tmp_path / "ledger").mkdir()
    open_ledger(tmp_path / "ledger", KEY, copy)
    (tmp_path / "ledger" / "ledger.head.json").unlink()
    open_ledger(tmp_path / "ledger", KEY, copy).charge(request(1), ROUND, 10.0, DELTA)
    assert len(read_ledger(tmp_path / "ledger", KEY.verify_key, copy).entries) == 1


def test_nothing_is_told_while_the_copy_cannot_be_written(copied):
    folder, copy = copied
    ledger = open_ledger(folder, KEY, copy)
    content = copy.read_bytes()
    copy.unlink()
    for number in (4, 5):
        with pytest.raises(StorageError, match="is missing"):
            ledger.charge(request(number), ROUND, 10.0, DELTA)
    assert len(lines_of(folder)) == 3
    copy.write_bytes(content)
    ledger.charge(request(4), ROUND, 10.0, DELTA)
    assert json.loads(copy.read_bytes())["number"] == 4


def test_verify_without_a_ledger(tmp_path):
    with pytest.raises(StorageError, match="head file is missing"):
        read_ledger(tmp_path, KEY.verify_key)
    with pytest.raises(StorageError, match="Could not lock"):
        read_ledger(tmp_path / "none", KEY.verify_key)


def test_many_threads_charge_each_round_once(tmp_path):
    ledger = open_ledger(tmp_path, KEY)
    threads = [
        threading.Thread(target=ledger.charge, args=(request(number % 4), ROUND, 10.0, DELTA)) for number in range(12)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(read_ledger(tmp_path, KEY.verify_key).entries) == 4


@pytest.mark.slow
def test_never_over_budget_when_two_processes_race(tmp_path):
    bound = epsilon([ROUND] * 3, DELTA)
    racers = [child(tmp_path, first=100 * racer, count=3, bound=bound) for racer in (1, 2)]
    for racer in racers:
        assert racer.stdout.readline() == "open\n"
    for racer in racers:
        racer.stdin.write("\n")
        racer.stdin.flush()
    said = [racer.communicate(timeout=60)[0].split() for racer in racers]
    charged = [word for words in said for word in words if word.isdigit()]
    assert len(charged) == 3
    assert any("PolicyRefusal" in words for words in said)
    assert open_ledger(tmp_path, KEY).spent(DELTA) == bound


@pytest.mark.slow
def test_full_disk_charges_nothing_that_is_not_told(tmp_path):
    open_ledger(tmp_path, KEY).charge(request(0), ROUND, 10.0, DELTA)
    limit = (tmp_path / "ledger.jsonl").stat().st_size + 100  # room for a part of the next line
    said = child(tmp_path, limit=limit).communicate("\n", timeout=60)[0].split()
    assert said == ["open", "StorageError"]
    ledger = open_ledger(tmp_path, KEY)
    assert len(ledger.entries) == 1
    ledger.charge(request(1), ROUND, 10.0, DELTA)
    assert len(read_ledger(tmp_path, KEY.verify_key).entries) == 2


def test_after_a_failed_append_the_same_ledger_goes_on(three):
    ledger = open_ledger(three, KEY)
    lines = three / "ledger.jsonl"
    content = lines.read_bytes()
    lines.write_bytes(content + b'{"half a li')  # what a full disk leaves behind
    ledger.charge(request(4), ROUND, 10.0, DELTA)
    assert lines.read_bytes().startswith(content)
    assert len(read_ledger(three, KEY.verify_key).entries) == 4


@pytest.mark.slow
def test_never_undercounts_under_kill_9(tmp_path, tmp_path_factory):
    """And `no_crash_blocks`: with a copy of the head, the next open always goes through."""
    copy = tmp_path_factory.mktemp("elsewhere") / "head.json"
    moment = random.Random(7)
    acknowledged: set[int] = set()
    nursery = subprocess.Popen(
        [sys.executable, "-c", NURSERY, str(tmp_path), str(copy)],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    for attempt in range(400):
        if attempt >= 40 and len(acknowledged) >= 40:  # enough kills and enough charges, on a slow machine too
            break
        nursery.stdin.write(f"{attempt * 10_000}\n")
        nursery.stdin.flush()
        victim = int(nursery.stdout.readline().removeprefix("born "))
        time.sleep(moment.uniform(0.0, 0.1 + 0.005 * attempt))  # longer and longer, for a slow machine gets there too
        os.kill(victim, signal.SIGKILL)
        for line in nursery.stdout:
            if "dead" in line:  # what the victim said of its last charge may be torn
                break
            acknowledged.add(int(line))
        entries = open_ledger(tmp_path, KEY, copy).entries
        assert json.loads(copy.read_bytes())["number"] == len(entries)
        assert acknowledged <= {entry.request.round for entry in entries}
        assert len(entries) <= len(acknowledged) + attempt + 1  # at most one untold charge for each kill
    nursery.communicate(timeout=30)
    assert len(acknowledged) >= 40
