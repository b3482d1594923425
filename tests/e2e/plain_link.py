"""Flower's own SuperLink on loopback with TLS and node authentication, and a bundle that asks a site.

The bundle's `client/` is hostile: whoever imports it leaves a canary file.
"""

import datetime
import hashlib
import ipaddress
import json
import os
import socket
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.cli.build import build_fab_from_disk
from flwr.common.serde import fab_to_proto, user_config_to_proto
from flwr.proto.control_pb2 import RegisterNodeRequest, StartRunRequest
from flwr.supercore.control import ControlHttpClient
from flwr.supercore.fab import Fab
from flwr.supercore.interceptors import RuntimeVersionHttpInterceptor

from common.flower_environment import flower_environment

ROOT = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent

PROJECT = """
[project]
name = "asker"
version = "1.0.0"
description = "asks"
license = "Apache-2.0"
[tool.flwr.app]
publisher = "nobody"
fab-include = ["server/**", "client/**"]
[tool.flwr.app.components]
serverapp = "server.app:app"
clientapp = "client.app:app"
[tool.flwr.app.config]
out = ""
plan = ""
pause = 0.0
"""

ASKER = """
import json
import time
from pathlib import Path

import numpy as np
from flwr.app import Message, RecordDict
from flwr.serverapp import ServerApp

from common import wire
from common.crypto import SigningKey
from common.greeting import hello_settings
from common.messages import Kind, Request
from common.seal import seal_request

app = ServerApp()
COORDINATOR = SigningKey(bytes(range(32)))


def sealed(request, node, ttl):
    return wire.encode_request(seal_request(COORDINATOR, request, time.time() + ttl), node, ttl)


def question(what, node, ttl):
    if what == "unknown":
        return Message(RecordDict(), dst_node_id=node, message_type="query.secrets", ttl=ttl)
    if what == "garbage":
        return Message(RecordDict(), dst_node_id=node, message_type="query.hello", ttl=ttl)
    if what == "large":
        arrays = {"discriminator.w": np.random.default_rng(0).normal(size=(5, 1 << 20)).astype(np.float32)}
        return sealed(Request(Kind.TRAIN, "run-1", 1, "{}", {}, arrays), node, ttl)
    if what == "foreign":
        request = Request(Kind.HELLO, "run-1", 0, "")
        return wire.encode_request(seal_request(SigningKey.generate(), request, time.time() + ttl), node, ttl)
    if what == "unsigned":
        return wire.encode_request(Request(Kind.HELLO, "run-1", 0, "", hello_settings()), node, ttl)
    return sealed(Request(Kind.HELLO, "run-1", 0, "", hello_settings()), node, ttl)


@app.main()
def main(grid, context):
    out, plan = Path(context.run_config["out"]), context.run_config["plan"].split(",")
    while not list(grid.get_node_ids()):
        time.sleep(0.1)
    (node,) = grid.get_node_ids()
    answers = []
    for what in plan:
        started = time.monotonic()
        (message_id,) = grid.push_messages([question(what, node, 40.0)])
        got = []
        while not got and time.monotonic() - started < 40:
            time.sleep(0.05)
            got = list(grid.pull_messages([message_id]))
        answer = {"what": what, "seconds": time.monotonic() - started, "error": None, "reply": None}
        if not got:
            answer["error"] = "timeout"
        elif got[0].has_error():
            answer["error"], answer["reason"] = got[0].error.code, got[0].error.reason
        else:
            reply = wire.decode_reply(got[0])
            answer["reply"] = {"refusal": reply.refusal, "fields": dict(reply.fields)}
        answers.append(answer)
        part = out.with_suffix(".part")
        part.write_text(json.dumps(answers))
        part.rename(out)
        time.sleep(context.run_config["pause"])
"""

HOSTILE = """
from pathlib import Path
Path({canary!r}).write_text("imported")
from flwr.clientapp import ClientApp
app = ClientApp()
"""


@dataclass(frozen=True)
class Link:
    port: int
    folder: Path

    @property
    def ca(self) -> bytes:
        return (self.folder / "ca.pem").read_bytes()

    def control(self) -> ControlHttpClient:
        version = RuntimeVersionHttpInterceptor(component_name="flwr CLI")
        return ControlHttpClient.from_server_address(f"127.0.0.1:{self.port}", False, self.ca, [version])

    def register(self, public_key: bytes, name: str = "st-mary") -> int:
        with self.control() as control:
            return control.RegisterNode(RegisterNodeRequest(public_key=public_key, name=name)).node_id

    def submit(self, plan: list[str], out: Path, pause_s: float = 0.0) -> str:
        """Start a run that asks what `plan` names; return its bundle's digest."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Flower uses a deprecated name of pathspec's
            fab = build_fab_from_disk(self.folder / "asker")
        digest = hashlib.sha256(fab).hexdigest()
        config = {"out": str(out), "plan": ",".join(plan), "pause": pause_s}
        request = StartRunRequest(
            fab=fab_to_proto(Fab(digest, fab, {})), override_config=user_config_to_proto(config), federation=""
        )
        with self.control() as control:
            assert control.StartRun(request).run_id
        return digest


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def write_certificates(folder: Path) -> None:
    now = datetime.datetime.now(datetime.UTC)

    def sign(
        name: str, key: ec.EllipticCurvePrivateKey, signer: ec.EllipticCurvePrivateKey, ca: bool
    ) -> x509.Certificate:
        builder = (
            x509.CertificateBuilder()
            .subject_name(x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)]))
            .issuer_name(x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "test CA")]))
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(minutes=5))
            .not_valid_after(now + datetime.timedelta(days=1))
            .add_extension(x509.BasicConstraints(ca=ca, path_length=None), critical=True)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(signer.public_key()), critical=False)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        )
        if not ca:
            address = x509.IPAddress(ipaddress.ip_address("127.0.0.1"))
            builder = builder.add_extension(x509.SubjectAlternativeName([address]), critical=False)
        return builder.sign(signer, hashes.SHA256())

    authority, server = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
    pem = serialization.Encoding.PEM
    (folder / "ca.pem").write_bytes(sign("test CA", authority, authority, True).public_bytes(pem))
    (folder / "server.pem").write_bytes(sign("link", server, authority, False).public_bytes(pem))
    secret = server.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    (folder / "server.key").write_bytes(secret)


def write_node_key(path: Path) -> bytes:
    """Write a new node key as enrolment would, and return the public half as the link wants it."""
    key = ec.generate_private_key(ec.SECP384R1())
    form = serialization.PrivateFormat.OpenSSH
    path.write_bytes(key.private_bytes(serialization.Encoding.PEM, form, serialization.NoEncryption()))
    path.chmod(0o600)
    public = serialization.PublicFormat.SubjectPublicKeyInfo
    return key.public_key().public_bytes(serialization.Encoding.PEM, public)


@contextmanager
def plain_link(folder: Path) -> Iterator[Link]:
    """Run Flower's SuperLink; `folder`/canary appears when somebody imports the bundle's client."""
    write_certificates(folder)
    for part, text in (("server", ASKER), ("client", HOSTILE.format(canary=str(folder / "canary")))):
        (folder / "asker" / part).mkdir(parents=True)
        (folder / "asker" / part / "__init__.py").write_text("")
        (folder / "asker" / part / "app.py").write_text(text)
    (folder / "asker" / "pyproject.toml").write_text(PROJECT)
    port, files = free_port(), [str(folder / name) for name in ("ca.pem", "server.pem", "server.key")]
    command = [str(BIN / "flower-superlink"), "--host", "127.0.0.1", "--port", str(port), "--enable-supernode-auth"]
    command += ["--disable-runtime-dependency-installation", "--database", str(folder / "link.db")]
    command += ["--ssl-ca-certfile", files[0], "--ssl-certfile", files[1], "--ssl-keyfile", files[2]]
    environment = flower_environment(folder) | {"PYTHONPATH": str(ROOT)}
    environment["PATH"] = f"{BIN}{os.pathsep}{os.environ['PATH']}"
    with (folder / "link.log").open("w") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, cwd=folder, start_new_session=True)
        try:
            wait_for(lambda: _listens(port), 40, "the link")
            yield Link(port, folder)
        finally:
            process.terminate()
            try:
                process.wait(15)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def wait_for(condition: Callable[[], Any], seconds: float, what: str) -> Any:
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, f"waited {seconds} s for {what}"
        time.sleep(0.1)
    return found


def answers(out: Path, number: int, seconds: float) -> list[dict[str, Any]]:
    """Wait for so many answers of a run."""
    return wait_for(
        lambda: out.exists() and len(found := json.loads(out.read_text())) >= number and found, seconds, out.name
    )


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        probe.settimeout(0.5)
        return probe.connect_ex(("127.0.0.1", port)) == 0
