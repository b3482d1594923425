"""What client/fleet and client/relay rely on in Flower's internals, pinned. A change here says what broke."""

import inspect
from pathlib import Path

import httpx
import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, RecordDict
from flwr.app.message import make_message
from flwr.common.constant import ErrorCode
from flwr.proto.fleet_pb2 import DeactivateNodeRequest
from flwr.proto.message_pb2 import ObjectTree
from flwr.supercore import telemetry
from flwr.supercore.constant import TaskType
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree, iterate_object_tree
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents, pull_objects, push_objects
from flwr.supercore.retry.http_retry import _RETRYABLE_TRANSPORT_ERRORS, make_simple_http_retry_invoker
from flwr.supercore.run import Run, RunNotRunningException
from flwr.supercore.task_identity import TaskIdentity
from flwr.supernode import fleet_http_connection
from flwr.supernode.fleet_http_client import FleetHttpClient
from flwr.supernode.fleet_http_connection import http_request_response
from flwr.supernode.node_auth_http_interceptor import NodeAuthHttpInterceptor

from client import fleet
from common.flower_environment import flower_environment


def message(content: RecordDict) -> Message:
    TaskIdentity.run_id, TaskIdentity.task_id, TaskIdentity.node_id = 7, 8, 1
    made = Message(content, dst_node_id=5, message_type="train.round", ttl=30.0, group_id="3")
    made.metadata.__dict__["_message_id"] = made.object_id
    return made


def test_connection_takes_address_ca_and_key_and_yields_these_eight() -> None:
    """client/fleet unpacks them by position: `_Line`."""
    names = list(inspect.signature(http_request_response).parameters)
    assert names[:4] == ["server_address", "insecure", "root_certificates", "authentication_keys"]
    source = inspect.getsource(http_request_response)
    yielded = source.split("yield (")[1].split(")")[0]
    parts = [part.strip() for part in yielded.split(",") if part.strip()]
    assert parts == [
        "node.node_id",
        "receive",
        "send",
        "get_run",
        "get_fab",
        "pull_object",
        "push_object",
        "confirm_message_received",
    ]


def test_connection_leaves_the_link_at_the_end_and_ends_the_process_on_refusal() -> None:
    """client/fleet.join catches SystemExit, and relies on DeactivateNode for a quick restart."""
    source = inspect.getsource(http_request_response)
    assert "client.DeactivateNode(" in source.split("finally:")[1]
    assert "flwr_exit(" in source
    assert "os.kill(os.getpid(), signal.SIGINT)" in source  # a refused heartbeat; relay stops on SIGINT


def test_nothing_of_the_connection_reports_to_flower() -> None:
    """Telemetry is read from the environment at import; the connection itself sends none."""
    assert "event(" not in inspect.getsource(fleet_http_connection)
    assert 'os.getenv("FLWR_TELEMETRY_ENABLED"' in inspect.getsource(telemetry)
    assert flower_environment(Path("home"))["FLWR_TELEMETRY_ENABLED"] == "0"


def test_retries_end_at_once_where_a_text_speaks_of_tls() -> None:
    giveup = make_simple_http_retry_invoker().should_giveup
    assert giveup is not None
    assert giveup(httpx.ConnectError("[SSL: UNEXPECTED_EOF_WHILE_READING] EOF occurred in violation of protocol"))
    assert not giveup(httpx.ConnectError(fleet._CUT))
    assert not isinstance(httpx.ProxyError(""), _RETRYABLE_TRANSPORT_ERRORS)


def test_a_message_travels_as_parts_and_is_whole_again() -> None:
    """What Fleet.content and Fleet.send do with a tree and its parts."""
    arrays = {"w": Array(np.arange(6, dtype=np.float32))}
    sent = message(RecordDict({"arrays": ArrayRecord(arrays), "header": ConfigRecord({"a": 1})}))
    parts = {name: part.deflate() for name, part in get_all_nested_objects(sent).items()}
    tree = get_object_tree(sent)
    ids = [part.object_id for part in iterate_object_tree(tree)]
    assert set(fleet._object_ids(tree)) == set(ids) == set(parts)
    pulled = pull_objects(ids, parts.__getitem__, max_time=1.0, max_tries_per_object=None, initial_backoff=0.05)
    back = inflate_object_from_contents(tree.object_id, pulled)
    assert isinstance(back, Message)
    assert back.content["header"] == ConfigRecord({"a": 1})
    assert make_message(sent.metadata, back.content).metadata.message_id == sent.object_id
    pushed: dict[str, bytes] = {}
    push_objects(get_all_nested_objects(sent), pushed.__setitem__, object_ids_to_push=set(ids[:2]))
    assert set(pushed) == set(ids[:2])


def test_a_reply_goes_back_to_where_its_envelope_came_from() -> None:
    asked = message(RecordDict())
    for reply in (Message(RecordDict(), reply_to=asked), Message(Error(2, "word"), reply_to=asked)):
        about = reply.metadata
        assert (about.run_id, about.src_node_id, about.reply_to_message_id) == (7, 5, asked.metadata.message_id)


def test_codes_and_task_types() -> None:
    assert (ErrorCode.LOAD_CLIENT_APP_EXCEPTION, ErrorCode.CLIENT_APP_RAISED_EXCEPTION, ErrorCode.INVALID_FAB) == (
        1,
        2,
        7,
    )
    assert set(TaskType) == {
        "flwr-serverapp",
        "flwr-clientapp",
        "flwr-simulation",
        "flwr-agentapp",
        "flwr-model",
        "flwr-connector",
    }
    assert Run.create_empty(1).primary_task_type == TaskType.SERVER_APP
    # passes `except Exception`: client/relay names it first
    assert issubclass(RunNotRunningException, BaseException)


def test_trees_of_any_size_are_bounded_before_anything_is_fetched() -> None:
    wide = ObjectTree(object_id="a", children=[ObjectTree(object_id="b")] * (fleet.MAX_OBJECTS + 1))
    with pytest.raises(fleet.WireError, match="parts"):
        fleet._object_ids(wide)


def test_a_node_can_sign_itself_off() -> None:
    """client/fleet.sign_off: else a killed node is refused for a minute."""
    assert list(inspect.signature(FleetHttpClient.from_server_address).parameters)[:4] == [
        "server_address",
        "insecure",
        "root_certificates",
        "interceptors",
    ]
    assert list(inspect.signature(NodeAuthHttpInterceptor).parameters) == ["private_key", "public_key"]
    assert DeactivateNodeRequest(node_id=2**63).node_id == 2**63
    assert FleetHttpClient.DeactivateNode
