"""The relay: forwards each message, turns every failure into a code, and holds neither torch nor patient code."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from flwr.app import Context, Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity

from client.app import find_agent, make_app
from common import wire
from common.errors import RefusalCode, WireError
from common.greeting import hello_settings
from common.messages import Kind, Reply, Request

TaskIdentity.run_id, TaskIdentity.task_id, TaskIdentity.node_id = 1, 1, 1

ROOT = Path(__file__).resolve().parents[2]
SECRET = "DOE^JANE in /export/dicom/4711.dcm"
REQUESTS = {
    Kind.HELLO: Request(Kind.HELLO, "run-1", 0, "{}", hello_settings()),
    Kind.WARMUP: Request(Kind.WARMUP, "run-1", 0, "{}", {"look": "public"}),
    Kind.TRAIN: Request(Kind.TRAIN, "run-1", 2, "{}", {"d_steps_per_g_step": 3}, {"w": np.arange(4, dtype=np.float32)}),
    Kind.GRADIENT: Request(
        Kind.GRADIENT,
        "run-1",
        2,
        "{}",
        {"cohort_sites": 3, "cohort_patients": 90},
        {"w": np.arange(4, dtype=np.float32)},
    ),
}


def context(**node):
    return Context(run_id=1, node_id=7, node_config=node, state=RecordDict(), run_config={})


def message(request):
    sent = wire.encode_request(request, 7, 60.0)
    sent.metadata.__dict__["_message_id"] = "the-message"
    return sent


def relayed(transport, sent):
    return make_app(lambda _: transport)(sent, context())


def failing(error):
    def ask(request):
        raise error

    return ask


@pytest.mark.parametrize("kind", Kind)
def test_forwards_the_request_and_the_reply(kind):
    seen = []

    def ask(request):
        seen.append(request)
        return Reply(kind, "run-1", request.round, None, {"epsilon_spent": 1.5}, {"w": np.ones(3, np.float32)})

    reply = wire.decode_reply(relayed(ask, message(REQUESTS[kind])))
    (request,) = seen
    assert (request.kind, request.run_id, request.round) == (kind, "run-1", REQUESTS[kind].round)
    assert (request.proposal, dict(request.settings)) == ("{}", dict(REQUESTS[kind].settings))
    assert all((request.arrays[name] == array).all() for name, array in REQUESTS[kind].arrays.items())
    assert (reply.refusal, dict(reply.fields)) == (None, {"epsilon_spent": 1.5})
    assert (reply.arrays["w"] == 1).all()


def test_forwards_a_refusal():
    code = RefusalCode.OVER_BUDGET
    reply = wire.decode_reply(relayed(lambda r: Reply(r.kind, r.run_id, r.round, code), message(REQUESTS[Kind.TRAIN])))
    assert reply.refusal is code


ERRORS = {
    "the agent's answer does not decode": (WireError(SECRET), RefusalCode.BAD_REQUEST),
    "no agent": (FileNotFoundError(2, SECRET), RefusalCode.UNREACHABLE),
    "a slow agent": (TimeoutError(SECRET), RefusalCode.UNREACHABLE),
    "a fault": (KeyError(SECRET), RefusalCode.INTERNAL),
    "no memory": (MemoryError(SECRET), RefusalCode.INTERNAL),
    "a value": (ValueError(SECRET), RefusalCode.INTERNAL),
}


@pytest.mark.parametrize("kind", Kind)
@pytest.mark.parametrize("what", ERRORS)
def test_a_failure_is_a_code_without_its_text(what, kind):
    error, code = ERRORS[what]
    answered = relayed(failing(error), message(REQUESTS[kind]))
    reply = wire.decode_reply(answered)
    assert not answered.has_error()
    assert (reply.kind, reply.refusal, dict(reply.fields), dict(reply.arrays)) == (kind, code, {}, {})
    assert_says_nothing(answered)


def assert_says_nothing(answered):
    said = repr(answered.content) + repr(answered.metadata) + repr(dict(answered.content["header"]))
    for word in ("DOE", "export", "4711", "Error", "Traceback"):
        assert word not in said


def test_a_failure_to_find_the_agent_is_a_code_too():
    def connect_to_agent(context):
        raise RuntimeError(SECRET)

    answered = make_app(connect_to_agent)(message(REQUESTS[Kind.HELLO]), context())
    assert wire.decode_reply(answered).refusal is RefusalCode.INTERNAL
    assert_says_nothing(answered)


def test_a_message_that_does_not_decode_never_reaches_the_agent():
    sent = message(REQUESTS[Kind.TRAIN])
    sent.content["header"]["extra"] = SECRET
    asked = []
    answered = relayed(asked.append, sent)
    assert wire.decode_reply(answered).refusal is RefusalCode.BAD_REQUEST
    assert asked == []
    assert_says_nothing(answered)


def test_a_message_of_the_wrong_type_is_answered_as_what_it_was_sent_as():
    sent = Message(
        wire.encode_request(REQUESTS[Kind.HELLO], 7, 60.0).content,
        dst_node_id=7,
        message_type=wire.MESSAGE_TYPES[Kind.TRAIN],
    )
    sent.metadata.__dict__["_message_id"] = "the-message"
    asked = []

    def ask(request):
        asked.append(request.kind)
        return Reply(request.kind, request.run_id, request.round)

    assert wire.decode_reply(relayed(ask, sent)).kind in Kind
    assert asked in ([], [Kind.HELLO])  # the agent goes by the header; the message type only routes


def test_without_a_socket_in_the_node_configuration_there_is_no_agent():
    with pytest.raises(OSError, match="agent-socket"):
        find_agent(context())


def test_the_relay_loads_neither_torch_nor_patient_code():
    code = "import sys, json, client.app; print(json.dumps(sorted(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    loaded = set(json.loads(done.stdout))
    assert "client.app" in loaded
    for name in ("torch", "pydicom", "opacus", "PIL", "client.agent", "client.dp", "client.home", "client.intake"):
        assert name not in loaded
