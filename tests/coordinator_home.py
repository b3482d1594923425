"""A coordinator's home on free ports, and the processes of it, as tests want them."""

import datetime as dt
import socket
import ssl
import subprocess
import sys
import time
from base64 import b64encode
from pathlib import Path

import httpx
import pytest
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.supercore.protobuf.constants import PROTOBUF_MEDIA_TYPE

from common.crypto import SigningKey
from common.files import write_atomic
from common.flower_environment import flower_environment
from common.node_keys import node_public_pem
from server.cli import main
from server.consortium import Consortium, FederationConfig, SiteRecord, load_consortium, read_settings
from server.enrol import create_consortium

ROOT = Path(__file__).resolve().parents[1]


def free_port() -> int:
    """Return a port of loopback that nobody uses."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def make_home(folder: Path) -> Consortium:
    """Make a coordinator's home for 127.0.0.1 on free ports."""
    port, control_port = free_port(), free_port()
    settings = FederationConfig(name="lab", host="127.0.0.1", port=port, control_port=control_port)
    create_consortium(folder, settings, dt.datetime.now(dt.UTC))
    return load_consortium(folder.absolute())


def openssh(key: ec.EllipticCurvePrivateKey) -> bytes:
    """Return the public half as OpenSSH writes it."""
    return key.public_key().public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)


def enrol(consortium: Consortium, name: str, revoked: bool = False, key=None) -> ec.EllipticCurvePrivateKey:
    """Write an enrolled site and return its node key."""
    key, now = key or ec.generate_private_key(ec.SECP384R1()), dt.datetime.now(dt.UTC)
    identity = SigningKey.generate().verify_key.to_bytes().hex()
    node_key = openssh(key).decode()
    times = {"created": now, "enrolled": now, "revoked": now if revoked else None}
    record = SiteRecord(name=name, identity=identity, node_key=node_key, **times)
    write_atomic(consortium.site(name), record.model_dump_json().encode())
    return key


def exit_of(*arguments: str | Path) -> int:
    """Run a command of the coordinator in this process and return its exit code."""
    with pytest.raises(SystemExit) as stopped:
        main([str(argument) for argument in arguments])
    return int(stopped.value.code or 0)


def signed_headers(key: ec.EllipticCurvePrivateKey, age_s: float = 0.0) -> dict[str, str]:
    """Make the headers with which a node of this key asks the Fleet API."""
    stamp = (dt.datetime.now(dt.UTC) - dt.timedelta(seconds=age_s)).isoformat()
    signature = key.sign(stamp.encode(), ec.ECDSA(hashes.SHA256()))
    public = b64encode(node_public_pem(openssh(key))).decode()
    return {
        "content-type": PROTOBUF_MEDIA_TYPE,
        "flwr-timestamp": stamp,
        "flwr-public-key": public,
        "flwr-signature": b64encode(signature).decode(),
    }


def environment(consortium: Consortium) -> dict[str, str]:
    """Return the environment of a process of this home that imports this checkout."""
    return flower_environment(consortium.folder) | {"PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"}


def start(consortium: Consortium, module: str, **extra: str) -> subprocess.Popen[bytes]:
    """Start one of the coordinator's modules on this home; its output goes to a log of its own."""
    log = (consortium.logs / f"test-{module}.log").open("ab")
    with log:
        command = [sys.executable, "-m", module, str(consortium.folder)]
        return subprocess.Popen(command, env=environment(consortium) | extra, stdout=log, stderr=log, cwd=ROOT)


def end(process: subprocess.Popen[bytes], timeout_s: float = 20.0) -> int:
    """End a process that a test started, and return its exit code."""
    process.terminate()
    try:
        return process.wait(timeout_s)
    except subprocess.TimeoutExpired:
        process.kill()
        return process.wait()


def client(consortium: Consortium, admin: bool = False) -> httpx.Client:
    """Return an HTTP client of one of the listeners that trusts this home's CA."""
    settings = read_settings(consortium)
    port = settings.control_port if admin else settings.port
    trust = ssl.create_default_context(cafile=str(consortium.ca_pem))
    return httpx.Client(base_url=f"https://127.0.0.1:{port}", verify=trust, trust_env=False, timeout=10.0)


def wait_until_up(consortium: Consortium, timeout_s: float = 40.0) -> None:
    """Wait until both listeners answer, and the public one knows whom to let in: before it asks all to come again."""
    deadline = time.monotonic() + timeout_s
    for admin in (True, False):
        with client(consortium, admin) as http:
            while True:
                try:
                    if http.get("/health").status_code == 200:
                        break
                except httpx.TransportError:
                    if time.monotonic() > deadline:
                        raise
                time.sleep(0.2)
    with client(consortium) as http:
        while http.post("/v1/fleet/pull-messages").status_code == httpx.codes.SERVICE_UNAVAILABLE:
            assert time.monotonic() < deadline
            time.sleep(0.1)
