"""Which sites the link lets in, against a stand-in for its control API."""

import threading
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.proto.control_pb2 import ListRunsRequest, ListRunsResponse, StartRunRequest, StartRunResponse
from flwr.proto.run_pb2 import Run as FlowerRun

from common.crypto import SigningKey
from common.errors import EnrolmentError, StorageError
from common.files import write_atomic
from common.node_keys import node_public_pem
from server.consortium import Consortium, EnrolledSite
from server.control import (
    NODE_GONE,
    Changes,
    connect,
    follow,
    list_nodes,
    list_runs,
    read_run,
    register_sites,
    stop_run,
    submit,
)
from server.own_secrets import is_token, read_authority_pem, read_secret, read_token
from server.supervise import supervise
from tests.coordinator_home import make_home, openssh


class FakeControl:
    """Keeps nodes as Flower does: a key that was put out stays used."""

    def __init__(self) -> None:
        self.nodes: list[SimpleNamespace] = []

    def ListNodes(self, request):  # noqa: N802
        return SimpleNamespace(nodes_info=list(self.nodes))

    def RegisterNode(self, request):  # noqa: N802
        if any(node.public_key == request.public_key for node in self.nodes):
            response = httpx.Response(409, request=httpx.Request("POST", "https://link"))
            raise httpx.HTTPStatusError("used", request=response.request, response=response)
        self.nodes.append(
            SimpleNamespace(
                public_key=request.public_key,
                name=request.name,
                node_id=len(self.nodes) + 1,
                status="registered",
                online_until=0.0,
                last_deactivated_at="",
            )
        )

    def UnregisterNode(self, request):  # noqa: N802
        self.nodes[request.node_id - 1].status = NODE_GONE


def site(name: str, key: ec.EllipticCurvePrivateKey, revoked: bool = False) -> EnrolledSite:
    return EnrolledSite(name, SigningKey.generate().verify_key, openssh(key), revoked)


@pytest.fixture
def keys() -> dict[str, ec.EllipticCurvePrivateKey]:
    return {name: ec.generate_private_key(ec.SECP384R1()) for name in ("a", "b", "c")}


def test_sites_are_let_in_once(keys) -> None:
    control, sites = FakeControl(), {name: site(name, keys[name]) for name in ("a", "b")}
    assert register_sites(control, sites) == Changes(["a", "b"], [], [])
    assert register_sites(control, sites) == Changes([], [], [])
    assert [(node.name, node.online) for node in list_nodes(control)] == [("a", False), ("b", False)]


def test_revoked_stays_out(keys) -> None:
    control, sites = FakeControl(), {name: site(name, keys[name]) for name in ("a", "b")}
    register_sites(control, sites)
    assert register_sites(control, sites | {"b": site("b", keys["b"], revoked=True)}) == Changes([], ["b"], [])
    again = sites | {"c": site("c", keys["c"])}
    assert register_sites(control, again) == Changes(["c"], [], ["b"])  # and the new one is not kept out by it
    assert register_sites(control, {"x": site("x", keys["b"])}) == Changes([], ["a", "c"], ["x"])
    assert list_nodes(control) == []


def test_a_site_with_a_new_key_loses_the_old_one(keys) -> None:
    control = FakeControl()
    register_sites(control, {"a": site("a", keys["a"])})
    assert register_sites(control, {"a": site("a", keys["b"])}) == Changes(["a"], ["a"], [])
    assert [node.public_key for node in control.nodes if node.status != NODE_GONE] == [
        node_public_pem(openssh(keys["b"]))
    ]


def test_a_key_that_does_not_decode_changes_nothing(keys) -> None:
    control = FakeControl()
    broken = EnrolledSite("b", SigningKey.generate().verify_key, b"ssh-rsa AAAA", False)
    with pytest.raises(EnrolmentError, match="fedmedgan-site enrol"):
        register_sites(control, {"a": site("a", keys["a"]), "b": broken})
    assert control.nodes == []


def test_secrets_of_others_eyes_are_refused(tmp_path) -> None:
    consortium = Consortium(tmp_path)
    with pytest.raises(StorageError, match="Restore"):
        read_token(consortium)
    write_atomic(consortium.control_token, b"a" * 64 + b"\n", 0o640)
    with pytest.raises(StorageError, match="mode 600"):
        read_token(consortium)
    consortium.control_token.chmod(0o600)
    assert read_token(consortium) == "a" * 64
    write_atomic(consortium.superexec_secret, b"short", 0o600)
    with pytest.raises(StorageError, match="32 bytes"):
        read_secret(consortium)


@pytest.mark.parametrize("content", [None, b"", b"junk", "\u00e9".encode(), bytes(20_000)])
def test_a_damaged_authority_is_named(tmp_path, content: bytes | None) -> None:
    """By every command that connects, and by `start` before anything runs."""
    consortium = make_home(tmp_path / "hub")
    whole = consortium.ca_pem.read_bytes()
    assert read_authority_pem(consortium) == whole
    consortium.ca_pem.unlink()
    if content is not None:
        consortium.ca_pem.write_bytes(content + whole if content and not content.isascii() else content)
    with pytest.raises(StorageError, match="every site pins it"), connect(consortium):
        pass
    with pytest.raises(StorageError, match="every site pins it"):
        supervise(consortium, threading.Event())


@pytest.mark.parametrize("header", ["", "a" * 64, "Bearer " + "a" * 63, "Bearer " + "a" * 65, "bearer\u00ff"])
def test_only_the_whole_token_counts(header: str) -> None:
    assert is_token("Bearer " + "a" * 64, "a" * 64)
    assert not is_token(header, "a" * 64)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of what Flower uses
def test_sites_read_no_paths(tmp_path: Path) -> None:
    """A site may ask the link for the values with which a run was submitted."""
    home, asked = tmp_path / "home", list[StartRunRequest]()

    class Taking(FakeControl):
        def StartRun(self, request: StartRunRequest) -> StartRunResponse:  # noqa: N802
            asked.append(request)
            return StartRunResponse(run_id=7)

        def ListRuns(self, request: ListRunsRequest) -> ListRunsResponse:  # noqa: N802
            return ListRunsResponse(run_dict={7: FlowerRun(run_id=7, override_config=asked[-1].override_config)})

    folder = home / "runs" / "run-0001"
    folder.mkdir(parents=True)
    control: Any = Taking()
    assert submit(control, home, folder / "config.toml", folder, resume=False) == 7
    assert str(tmp_path) not in str(asked[0].override_config)
    assert [run.folder for run in list_runs(control, home)] == [folder]
    elsewhere = tmp_path / "kept"
    elsewhere.mkdir()
    submit(control, home, elsewhere / "config.toml", elsewhere, resume=True)
    assert read_run(control, home, 7).folder == elsewhere


@pytest.mark.parametrize("status", ["finished", "running"])
def test_a_run_that_finished_a_moment_before_is_stopped_without_a_word(status: str) -> None:
    class Finished(SimpleNamespace):
        def StopRun(self, request: object) -> None:  # noqa: N802
            response = httpx.Response(409, request=httpx.Request("POST", "https://link"))
            raise httpx.HTTPStatusError("finished", request=response.request, response=response)

        def ListRuns(self, request: ListRunsRequest) -> ListRunsResponse:  # noqa: N802
            run = FlowerRun(run_id=7)
            run.status.status = status
            return ListRunsResponse(run_dict={7: run})

    with nullcontext() if status == "finished" else pytest.raises(httpx.HTTPStatusError):
        stop_run(Finished(), 7)


class Restarted:
    """A link whose stream is cut, and which believes after its restart that the run is in this state."""

    def __init__(self, *states: str) -> None:
        self.states = list(states)

    def StreamLogs(self, request: object) -> Iterator[SimpleNamespace]:  # noqa: N802
        yield SimpleNamespace(log_output="round 1\n", latest_timestamp=1.0)
        if self.states[0] != "finished":
            raise httpx.ReadError("cut")

    def ListRuns(self, request: ListRunsRequest) -> ListRunsResponse:  # noqa: N802
        run = FlowerRun(run_id=7)
        run.status.status = self.states[0]
        return ListRunsResponse(run_dict={7: run})


def test_a_run_whose_process_is_gone_is_not_followed_until_the_link_misses_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.control.RECONNECT_S", 0.0)
    looks = iter([False, True])
    assert list(follow(Restarted("running"), 7, lambda: next(looks))) == ["round 1\n"]


def test_what_a_run_that_ended_had_to_say_is_read_to_its_end() -> None:
    assert list(follow(Restarted("finished"), 7, lambda: True)) == ["round 1\n"]
