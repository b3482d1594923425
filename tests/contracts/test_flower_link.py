"""What server/link, control, bundle, executor and run_process rely on in Flower 1.41's internals."""

import datetime as dt
import inspect
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec

from tests.coordinator_home import signed_headers


def test_superlink_is_an_application_made_of_these_values() -> None:
    from flwr.superlink.config_loader import SuperLinkLifespanConfig
    from flwr.superlink.main import create_app

    assert list(inspect.signature(create_app).parameters) == ["config", "superlink_lifespan_class"]
    assert set(inspect.signature(SuperLinkLifespanConfig).parameters) == {
        *("control_address", "health_server_address", "host", "port", "insecure", "certificates"),
        *("superexec_auth_secret", "authn_plugin", "event_log_plugin", "fleet_event_log_plugin", "enable_event_log"),
        *("artifact_provider", "enable_supernode_auth", "fleet_api_type", "fleet_api_address", "simulation"),
        *("ssl_ca_certfile", "ssl_certfile", "ssl_keyfile", "database", "isolation", "runtime_dependency_install"),
    }, "server/link: a new value decides something that we have not looked at"


def test_every_path_is_of_one_of_the_four_apis() -> None:
    from flwr.supercore.protobuf.translation import PROTOBUF_REQUEST_TYPES

    apis = {path.rsplit("/", 1)[0] for _, path in PROTOBUF_REQUEST_TYPES}
    assert apis == {"/v1/fleet", "/v1/control", "/v1/runtime"}, "server/link decides by these prefixes"
    fleet = {path.rsplit("/", 1)[1] for _, path in PROTOBUF_REQUEST_TYPES if path.startswith("/v1/fleet/")}
    assert fleet == {
        *("register-node", "activate-node", "deactivate-node", "unregister-node", "send-node-heartbeat"),
        *("pull-messages", "push-messages", "get-run", "get-fab", "push-object", "pull-object"),
        "confirm-message-received",
    }, "a new path is open to every enrolled site"


def test_a_node_signs_the_headers_that_the_gate_checks() -> None:
    """Flower's own client makes the same headers as the tests do, and its server accepts both."""
    from flwr.common.constant import TIMESTAMP_HEADER
    from flwr.supercore.constant import FLEET_HTTP_PUBLIC_KEY_HEADER, FLEET_HTTP_SIGNATURE_HEADER

    headers = signed_headers(ec.generate_private_key(ec.SECP384R1()))
    assert {TIMESTAMP_HEADER, FLEET_HTTP_PUBLIC_KEY_HEADER, FLEET_HTTP_SIGNATURE_HEADER} <= set(headers)
    source = inspect.getsource(__import__("flwr.superlink.routers.fleet.node_auth", fromlist=["x"]).authenticate_node)
    assert 'timestamp.encode("ascii")' in source
    assert "get_node_id_by_public_key(public_key)" in source


def test_arrays_travel_in_chunks_below_the_gates_bound() -> None:
    from flwr.common.constant import FAB_MAX_SIZE, FLWR_PRIVATE_MAX_ARRAY_CHUNK_SIZE

    from server.link import ADMIN_LIMITS, PUBLIC_LIMITS

    assert PUBLIC_LIMITS.of("/v1/fleet/push-object") >= FLWR_PRIVATE_MAX_ARRAY_CHUNK_SIZE + (1 << 20)
    assert ADMIN_LIMITS.body_bytes >= FAB_MAX_SIZE + (1 << 20)


def test_the_names_of_the_largest_messages_parts_pass_the_gate() -> None:
    """An envelope lists its parts, of a whole gigabyte some 220; only a part itself has content."""
    from flwr.common.constant import FLWR_PRIVATE_MAX_ARRAY_CHUNK_SIZE
    from flwr.proto.fleet_pb2 import PushMessagesRequest
    from flwr.proto.message_pb2 import ObjectTree
    from flwr.supercore.protobuf.translation import PROTOBUF_REQUEST_TYPES

    from common.wire import MAX_TOTAL_BYTES
    from server.link import PUBLIC_LIMITS

    count = 8 + MAX_TOTAL_BYTES // FLWR_PRIVATE_MAX_ARRAY_CHUNK_SIZE
    tree = ObjectTree(object_id="0" * 64, children=[ObjectTree(object_id="0" * 64)] * count)
    assert (
        PushMessagesRequest(message_object_trees=[tree]).ByteSize() < PUBLIC_LIMITS.of("/v1/fleet/push-messages") / 1.5
    )
    fields = {
        path: {field.type for field in kind.DESCRIPTOR.fields}
        for (_, path), kind in PROTOBUF_REQUEST_TYPES.items()
        if path.startswith("/v1/fleet/")
    }
    assert {path for path, types in fields.items() if 12 in types} == {  # 12: bytes
        *("/v1/fleet/push-object", "/v1/fleet/register-node", "/v1/fleet/activate-node"),
    }, "a path of large bodies needs a bound of its own in server/link"


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of what Flower uses
def test_a_key_is_known_only_while_it_is_registered(tmp_path: Path) -> None:
    from flwr.superlink.config_loader import get_federation_manager, get_objectstore_linkstate_factories

    manager = get_federation_manager(is_simulation=False)
    _, states = get_objectstore_linkstate_factories(str(tmp_path / "link.db"), manager)
    state = states.state()
    assert state.get_node_id_by_public_key(b"key") is None
    node = state.create_node("owner", "name", b"key", 30.0, name="st-mary")
    assert state.get_node_id_by_public_key(b"key") == node
    state.delete_node("owner", node)
    assert state.get_node_id_by_public_key(b"key") is None
    with pytest.raises(ValueError):  # server/control.register_sites says so to whoever enrols it again
        state.create_node("owner", "name", b"key", 30.0, name="st-mary")


def test_the_server_app_runs_in_our_process() -> None:
    from flwr.superlink.runtime import run_serverapp

    assert set(inspect.signature(run_serverapp).parameters) == {
        *("runtime_api_address", "log_queue", "token", "insecure", "certificates", "parent_pid"),
        "runtime_dependency_install",
    }
    source = inspect.getsource(run_serverapp)
    assert source.index("if runtime_dependency_install") < source.index("install_app_dependencies(")


def test_tasks_name_their_bundle() -> None:
    from flwr.proto.task_pb2 import Task
    from flwr.supercore.constant import TaskType

    assert Task(fab_hash="ab").fab_hash == "ab"
    assert TaskType.SERVER_APP


@pytest.mark.parametrize(
    ("module", "name", "off"),
    [
        ("flwr.supercore.telemetry", "FLWR_TELEMETRY_ENABLED", "0"),
        ("flwr.supercore.constant", "FLWR_DISABLE_UPDATE_CHECK", "1"),
        ("flwr.common.constant", "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION", "1"),
        ("flwr.common.constant", "FLWR_INTERNAL_GRPC_CONTROL_API", "0"),
        ("flwr.common.constant", "FLWR_INTERNAL_GRPC_FLEET_API", "0"),
    ],
)
def test_switches_of_the_environment_still_exist(module: str, name: str, off: str, tmp_path: Path) -> None:
    import importlib

    from common.flower_environment import flower_environment

    assert hasattr(importlib.import_module(module), name)
    assert flower_environment(tmp_path)[name] == off


def test_clock_window_is_as_documented() -> None:
    from flwr.common.constant import SYSTEM_TIME_TOLERANCE, TIMESTAMP_TOLERANCE
    from flwr.supercore.date import now

    assert (SYSTEM_TIME_TOLERANCE, TIMESTAMP_TOLERANCE) == (5, 300)
    assert now().tzinfo == dt.UTC


def _deafness_ends_no_run(states: Any, is_alive: Callable[[], bool]) -> None:
    from server.outage import DEAF_S, keep_runs, keep_unheard_runs

    for silent_s, alive in ((0.0, False), (DEAF_S + 1.0, True)):
        keep_runs(states, -1.0)
        keep_unheard_runs(states, time.monotonic() - silent_s)
        assert is_alive() == alive


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of what Flower uses
def test_an_outage_ends_no_run(tmp_path: Path) -> None:
    """Flower fails a run whose heartbeat is overdue at the next call; after keep_runs it does not, and then it does."""
    from flwr.common.constant import HEARTBEAT_DEFAULT_INTERVAL, HEARTBEAT_PATIENCE, MAX_RETRY_DELAY
    from flwr.supercore.constant import NOOP_FEDERATION_ID, TaskType
    from flwr.superlink.config_loader import get_federation_manager, get_objectstore_linkstate_factories

    from server.outage import PATIENCE_S, keep_runs

    assert HEARTBEAT_PATIENCE * HEARTBEAT_DEFAULT_INTERVAL == 60
    assert PATIENCE_S >= 3 * MAX_RETRY_DELAY + 60
    manager = get_federation_manager(is_simulation=False)
    _, states = get_objectstore_linkstate_factories(str(tmp_path / "link.db"), manager)
    state = states.state()
    run_id = state.create_run(None, None, None, {}, NOOP_FEDERATION_ID, None, None, TaskType.SERVER_APP)
    (task,) = state.get_tasks(run_ids=[run_id])
    token = state.claim_task(task.task_id)
    assert token is not None
    assert state.activate_task(task.task_id)
    keep_runs(states, -1.0)  # as after an outage
    assert state.get_task_by_token(token) is None
    keep_runs(states)
    assert state.acknowledge_task_heartbeat(task.task_id)
    assert state.get_task_by_token(token) is not None
    _deafness_ends_no_run(states, lambda: state.get_task_by_token(token) is not None)
    keep_runs(states, -1.0)
    assert not state.acknowledge_task_heartbeat(task.task_id)
    (task,) = state.get_tasks(run_ids=[run_id])
    assert task.status.sub_status == "failed"


def test_the_grid_waits_for_a_link_that_is_away_and_gives_up_in_a_handshake() -> None:
    """So the round loop waits by itself only for what the grid gives up (server/exchange.patiently)."""
    import httpx
    from flwr.supercore.retry import make_simple_http_retry_invoker

    invoker = make_simple_http_retry_invoker()
    assert invoker.max_tries is None
    assert invoker.max_time is None
    invoker.wait_function = lambda seconds: None
    errors = [httpx.ConnectError("Connection refused")] * 20 + [httpx.ConnectError("[SSL] EOF")]

    def call() -> None:
        raise errors.pop(0)

    with pytest.raises(httpx.ConnectError, match="SSL"):
        invoker.invoke(call)
    assert not errors


def test_the_lifespan_of_the_server_app_begins_after_flowers_preparations() -> None:
    """What is mirrored from there on (server/run_process) is what the run prints, not what unpacking does."""
    from flwr.superlink.runtime import run_serverapp

    source = inspect.getsource(run_serverapp)
    assert source.index("install_from_fab(") < source.index("context = run_(")


def test_the_grid_fetches_parts_by_a_function_that_the_runs_process_replaces() -> None:
    """What the replacement raises passes the grid, but for ObjectPullError, which becomes that one answer's error."""
    from flwr.supercore.inflatable.inflatable_utils import pull_objects
    from flwr.superlink.grid import http_grid

    from server.run_process import pull_reply

    assert http_grid.pull_objects.__code__ is pull_objects.__code__, "server/run_process replaces it in a run's process"
    assert "pull_objects" in http_grid.HttpGrid.pull_messages.__code__.co_names
    source = inspect.getsource(http_grid.HttpGrid.pull_messages)
    call = source.split("pull_objects(")[1].split("except")[0]
    names = list(inspect.signature(pull_reply).parameters)
    assert (
        [word for word in names if f"{word}=" in call] == names == list(inspect.signature(pull_objects).parameters)[:2]
    )
    assert [line.strip() for line in source.splitlines() if line.strip().startswith("except ")] == [
        "except ObjectPullError as e:",
        "except httpx.HTTPStatusError as e:",
    ]
