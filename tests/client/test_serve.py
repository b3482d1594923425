"""The agent behind its socket: what goes in and comes out as bytes, and that nothing ends the loop but `stop`."""

import dataclasses
import socket
import stat
import struct
import tempfile
import threading
import time
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from client import serve as serving
from client.agent import open_site
from client.channel import MAGIC, connect, pack_request, read_frame, unpack_reply
from client.doctor import machine
from client.doctor.findings import Status
from client.serve import serve
from common.errors import RefusalCode, StorageError
from common.greeting import hello_settings
from common.messages import PROTOCOL_VERSION, Kind, Reply, Request
from common.seal import content_digest, seal_request
from tests.pinned import COORDINATOR, pin
from tests.tiny_site import warmup_request

HELLO = Request(Kind.HELLO, "run-1", 0, "", hello_settings())


@contextmanager
def served(site):
    """Serve a site from a thread; the socket's folder is short, for its path holds 107 bytes at most."""
    with tempfile.TemporaryDirectory() as folder:
        path, stop = Path(folder) / "agent.sock", threading.Event()
        thread = threading.Thread(target=serve, args=(site, path, stop), daemon=True)
        thread.start()
        while not is_up(path):
            assert thread.is_alive()
        try:
            yield path
        finally:
            stop.set()
            thread.join(5)
            assert not thread.is_alive()
            assert not path.exists()


def is_up(path):
    try:
        connect(path, 5.0)(HELLO)
    except OSError:
        return False
    return True


def send(path, content):
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.settimeout(5.0)
        connection.connect(str(path))
        connection.sendall(content)
        connection.shutdown(socket.SHUT_WR)
        return unpack_reply(read_frame(connection, 60.0))


def test_hello_over_the_socket(tiny_home):
    with served(open_site(tiny_home)) as path:
        reply = connect(path, 5.0)(HELLO)
    assert reply.refusal is None
    assert (reply.fields["site"], reply.fields["protocol"]) == ("st-mary", PROTOCOL_VERSION)


def test_socket_is_for_owner_and_group_only(tiny_home):
    with served(open_site(tiny_home)) as path:
        assert stat.S_IMODE(path.stat().st_mode) == 0o660


def test_a_socket_is_seen_once_it_can_be_asked(tiny_home, monkeypatch):
    """Who finds the path finds mode 660 and an agent: never the moment between bind and listen."""
    with tempfile.TemporaryDirectory() as folder:
        path, stop, seen = Path(folder) / "agent.sock", threading.Event(), []

        class Watched(socket.socket):
            def listen(self, *backlog):
                seen.append(path.exists())
                super().listen(*backlog)
                modes = [stat.S_IMODE(one.stat().st_mode) for one in path.parent.iterdir()]
                seen.append(modes == [0o660] and not path.exists())
                stop.set()

        monkeypatch.setattr(serving.socket, "socket", Watched)
        serve(open_site(tiny_home), path, stop)
        assert seen == [False, True]
        assert not list(Path(folder).iterdir())


@pytest.mark.parametrize("name", ["s", "agent.sock"])
def test_a_path_of_107_bytes_is_served(tiny_home, name):
    with tempfile.TemporaryDirectory() as folder:
        long = Path(folder) / ("x" * (107 - len(folder) - len(name) - 2))
        long.mkdir()
        path, stop = long / name, threading.Event()
        assert len(bytes(path)) == 107
        thread = threading.Thread(target=serve, args=(open_site(tiny_home), path, stop), daemon=True)
        thread.start()
        while not is_up(path):
            assert thread.is_alive()
        assert [one.name for one in long.iterdir()] == [name]
        stop.set()
        thread.join(20)


def test_a_socket_that_came_meanwhile_is_left_to_its_agent(tiny_home, monkeypatch):
    with tempfile.TemporaryDirectory() as folder, socket.socket(socket.AF_UNIX) as other:
        path = Path(folder) / "s"
        other.bind(str(path))
        monkeypatch.setattr(serving, "_is_free", lambda _path: True)  # as it was a moment before
        with pytest.raises(StorageError, match="Could not make the socket"):
            serve(open_site(tiny_home), path, threading.Event())
        assert [one.name for one in Path(folder).iterdir()] == ["s"]


def trickle(connection, content):
    """Send a byte at a time, each before any pause would be noticed, until the peer has had enough."""
    try:
        for byte in content:
            connection.send(bytes([byte]))
            time.sleep(0.02)
    except OSError:
        return
    connection.close()


def test_a_peer_that_trickles_is_cut_off(tiny_home, monkeypatch):
    """The bound is on the whole request: at 20 ms a byte this one would take hours."""
    monkeypatch.setattr(serving, "REQUEST_TIMEOUT_S", 0.5)
    with served(open_site(tiny_home)) as path, socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as slow:
        slow.connect(str(path))
        threading.Thread(target=trickle, args=(slow, FRAME[:16] + bytes(10**6)), daemon=True).start()
        assert connect(path, 60.0)(HELLO).refusal is None


def test_who_looks_whether_an_agent_answers_is_no_alarm(tiny_home, caplog):
    """`doctor`, which reads the answer, and an agent that waits for this one's end, which goes away at once."""
    caplog.set_level("INFO", serving.LOG.name)
    with served(open_site(tiny_home)) as path:
        caplog.clear()
        assert send(path, b"").refusal is RefusalCode.BAD_REQUEST
        assert not serving._is_free(path)
        assert machine.check_socket(path).status is Status.PASS
        assert connect(path, 5.0)(HELLO).refusal is None
    said = [(record.levelname, record.getMessage()) for record in caplog.records]
    assert [one for one in said if not one[1].startswith("hello of")] == [("INFO", serving.LOOKED)] * 3


def test_an_old_socket_is_replaced(tiny_home, tmp_path):
    with tempfile.TemporaryDirectory() as folder:
        path, stop = Path(folder) / "agent.sock", threading.Event()
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as dead:
            dead.bind(str(path))
        thread = threading.Thread(target=serve, args=(open_site(tiny_home), path, stop), daemon=True)
        thread.start()
        while not is_up(path):
            assert thread.is_alive()
        stop.set()
        thread.join(5)
        assert not thread.is_alive()


FRAME = pack_request(HELLO)
GARBAGE = {
    "nothing": b"",
    "bytes": bytes(range(256)) * 4,
    "HTTP": b"GET / HTTP/1.1\r\nHost: site\r\n\r\n",
    "half a frame": FRAME[:-3],
    "half a prefix": FRAME[:5],
    "a body of 2^63": struct.pack("<8sIQ", MAGIC, 2, 2**63) + b"{}",
    "no JSON": struct.pack("<8sIQ", MAGIC, 2, 0) + b"{]",
    "other keys": struct.pack("<8sIQ", MAGIC, 2, 8) + b"{}" + bytes(8),
    "unknown kind": FRAME.replace(b'"hello"', b'"hallo"'),
    "round is text": FRAME.replace(b'"round": 0', b'"round":""'),
}


def test_garbage_gets_a_code_and_the_loop_goes_on(tiny_home):
    with served(open_site(tiny_home)) as path:
        for name, content in GARBAGE.items():
            assert send(path, content) == Reply(Kind.HELLO, "", 0, RefusalCode.BAD_REQUEST), name
        assert connect(path, 5.0)(HELLO).refusal is None


def test_a_peer_that_leaves_at_once_does_not_end_the_loop(tiny_home):
    with served(open_site(tiny_home)) as path:
        for _ in range(3):
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
                connection.connect(str(path))
                connection.sendall(FRAME)
        assert connect(path, 5.0)(HELLO).refusal is None


def test_a_flood_costs_time_and_no_budget(tiny_home, tiny_proposal):
    """From a broken-in relay: what it recorded, again; questions of its own; garbage; connections left open."""
    pin(tiny_home)
    site = open_site(tiny_home, coordinator=COORDINATOR.verify_key)
    asked = warmup_request(proposal=tiny_proposal)
    recorded = seal_request(COORDINATOR, asked, time.time() + 600, site.key.verify_key)
    own = [dataclasses.replace(asked, run_id=f"own-{number}") for number in range(40)]
    own += [dataclasses.replace(recorded, run_id=f"changed-{number}") for number in range(40)]
    with served(site) as path, ExitStack() as held:
        ask = connect(path, 30.0)
        first = ask(recorded)
        assert first.refusal is None
        for number in range(8):  # of the sixteen that may wait
            idle = held.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
            idle.connect(str(path))
            idle.shutdown(socket.SHUT_WR)
            assert {ask(question).refusal for question in own[number::8]} == {RefusalCode.BAD_REQUEST}
            assert send(path, GARBAGE["bytes"]).refusal is RefusalCode.BAD_REQUEST
            assert content_digest(ask(recorded)) == content_digest(first)
        assert [entry.request.run_id for entry in site.ledger.entries] == [asked.run_id]
        assert ask(seal_request(COORDINATOR, HELLO, time.time() + 600)).refusal is None


def test_an_exception_stays_inside(tiny_home, tiny_proposal):
    """The exception names a patient and a path; the reply has a code and nothing else."""

    def crash(purpose):
        raise KeyError(f"DOE^JANE in /export/dicom for {purpose}")

    request = warmup_request(proposal=tiny_proposal)
    with served(open_site(tiny_home, crash)) as path:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
            connection.connect(str(path))
            connection.sendall(pack_request(request))
            frame = read_frame(connection, 60.0)
        assert connect(path, 5.0)(HELLO).refusal is None
    assert unpack_reply(frame) == Reply(Kind.WARMUP, "run-1", 0, RefusalCode.INTERNAL)
    for word in (b"DOE", b"export", b"KeyError", b"Traceback"):
        assert word not in frame


@pytest.mark.parametrize("part", ["ledger", "journal", "replies", "images"])
def test_an_unreadable_home_is_a_code(tiny_home, tiny_proposal, part):
    site = open_site(tiny_home)
    request = warmup_request(proposal=tiny_proposal)
    with served(site) as path:
        folder = {"ledger": tiny_home.ledger, "journal": tiny_home.journal, "replies": tiny_home.replies}
        if part == "images":
            (tiny_home.vault(tiny_proposal.image.classes, 28) / "manifest").write_bytes(b"damaged")
        else:
            folder[part].rename(tiny_home.folder / "away")
            folder[part].write_bytes(b"no folder")
        reply = connect(path, 5.0)(request)
        assert reply == Reply(Kind.WARMUP, "run-1", 0, RefusalCode.INTERNAL)
        assert connect(path, 5.0)(HELLO).refusal is None


def test_a_refusal_travels_as_its_code(tiny_home, tiny_proposal):
    with served(open_site(tiny_home)) as path:
        ask = connect(path, 5.0)
        assert ask(dataclasses.replace(HELLO, kind=Kind.TRAIN)) == Reply(
            Kind.TRAIN, "run-1", 0, RefusalCode.BAD_REQUEST
        )


def test_a_path_that_is_no_socket_is_left_alone(tiny_home, tmp_path):
    path = tmp_path / "precious"
    path.write_text("mine")
    with pytest.raises(StorageError, match="something else"):
        serve(open_site(tiny_home), path, threading.Event())
    assert path.read_text() == "mine"


def test_a_socket_that_another_agent_answers_on_is_left_to_it(tiny_home):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "s"
        with socket.socket(socket.AF_UNIX) as other:
            other.bind(str(path))
            other.listen()
            with pytest.raises(StorageError, match="answers on"):
                serve(open_site(tiny_home), path, threading.Event())
            assert path.is_socket()
        stop = threading.Event()
        stop.set()
        serve(open_site(tiny_home), path, stop)  # what the other left when it was killed is replaced
        assert not path.exists()


def test_an_agent_that_ends_is_waited_for(tiny_home, monkeypatch):
    """A `start` that was killed leaves an agent at work; the next one's takes the socket when it is free."""
    monkeypatch.setattr(serving, "_PROBE_S", 0.1)
    with tempfile.TemporaryDirectory() as folder:
        path, stop = Path(folder) / "s", threading.Event()
        with socket.socket(socket.AF_UNIX) as other:
            other.bind(str(path))
            other.listen()
            agent = threading.Thread(target=serve, args=(open_site(tiny_home), path, stop, 60.0))
            agent.start()
            other.accept()[0].close()
            other.accept()[0].close()  # asked twice: it waits
            path.unlink()
        deadline = time.monotonic() + 20
        while not path.is_socket():
            assert time.monotonic() < deadline
            time.sleep(0.05)
        stop.set()
        agent.join(20)
        assert not path.exists()
