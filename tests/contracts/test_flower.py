"""What the federation relies on in Flower 1.41, pinned. A change here says which of our modules to look at."""

import inspect

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.server.strategy.aggregate import aggregate_krum, aggregate_median, aggregate_trimmed_avg
from flwr.serverapp import Grid, ServerApp
from flwr.supercore.task_identity import TaskIdentity

TaskIdentity.run_id, TaskIdentity.task_id, TaskIdentity.node_id = 1, 1, 1


def _message(kind: str) -> Message:
    return Message(RecordDict({"header": ConfigRecord({"a": 1})}), dst_node_id=5, message_type=kind, ttl=30.0)


def _context() -> Context:
    return Context(run_id=1, node_id=5, node_config={}, state=RecordDict(), run_config={})


def test_version_is_the_pinned_one() -> None:
    from importlib.metadata import version

    assert version("flwr") == "1.41.0"


def test_named_actions_reach_their_handler() -> None:
    app = ClientApp()
    seen = []
    for register, name in ((app.query, "hello"), (app.train, "round")):

        def handle(message: Message, context: Context, name: str = name) -> Message:
            seen.append(name)
            return Message(RecordDict(), reply_to=message)

        register(name)(handle)
    app(_message("train.round"), _context())
    app(_message("query.hello"), _context())
    assert seen == ["round", "hello"]


def test_unregistered_action_raises() -> None:
    with pytest.raises(ValueError):
        ClientApp()(_message("train.other"), _context())


def test_other_categories_cannot_be_sent() -> None:
    with pytest.raises((ValueError, TypeError)):
        _message("private.round")


def test_reply_points_at_the_message_it_answers() -> None:
    message = _message("train.round")
    message.metadata.__dict__["_message_id"] = "id-1"
    assert Message(RecordDict(), reply_to=message).metadata.reply_to_message_id == "id-1"
    assert Message(Error(2, "text"), reply_to=message).metadata.reply_to_message_id == "id-1"


def test_ttl_of_a_message_is_ours() -> None:
    assert _message("train.round").metadata.ttl == 30.0


def test_arrays_travel_as_npy_without_pickle() -> None:
    record = ArrayRecord({"w": Array(np.ones(3, np.float32))})
    assert record["w"].stype == "numpy.ndarray"
    assert record["w"].data.startswith(b"\x93NUMPY\x01\x00")
    with pytest.raises(ValueError):
        Array(np.array([object()], dtype=object)).numpy()


def test_server_app_runs_our_main_with_our_grid() -> None:
    app, seen = ServerApp(), []

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        seen.append((grid, context))

    grid, context = object(), _context()
    app(grid, context)
    assert seen == [(grid, context)]


def test_robust_rules_by_hand() -> None:
    updates = [([np.array([float(v)])], 1) for v in (1, 2, 3, 4, 100)]
    assert aggregate_median(updates)[0].tolist() == [3.0]
    assert aggregate_trimmed_avg(updates, 0.2)[0].tolist() == [3.0]
    assert aggregate_krum(updates, 1, 0)[0].tolist() in ([2.0], [3.0])


def test_run_simulation_takes_apps_and_a_backend() -> None:
    from flwr.simulation import run_simulation

    names = list(inspect.signature(run_simulation).parameters)
    assert names[:5] == ["server_app", "client_app", "num_supernodes", "backend_name", "backend_config"]


def test_node_keys_are_what_flower_reads(tmp_path) -> None:
    """common/certificates makes them, server/link registers them, client/relay shows them."""
    from argparse import Namespace

    from flwr.cli.supernode.register import try_load_public_key
    from flwr.supercore.primitives.asymmetric import bytes_to_public_key, uses_nist_ec_curve
    from flwr.supernode.cli.flower_supernode import _try_setup_client_authentication

    from common.node_keys import new_node_key, node_public_key, node_public_pem

    private, public = tmp_path / "node.key", tmp_path / "node.pub"
    private.write_bytes(new_node_key())
    public.write_bytes(node_public_key(private.read_bytes()) + b"\n")
    arguments = Namespace(auth_supernode_private_key=str(private), auth_supernode_public_key=None)
    pair = _try_setup_client_authentication(arguments)
    assert pair is not None
    pem = node_public_pem(public.read_bytes().strip())
    assert try_load_public_key(public) == pem
    assert bytes_to_public_key(pem) == pair[1]
    assert uses_nist_ec_curve(pair[1])
