"""A coordinator's home with a CA of its own on free ports, and the processes of it, as tests want them."""

import datetime as dt
import ipaddress
import json
import secrets
import socket
import ssl
import subprocess
import sys
import time
from base64 import b64encode
from pathlib import Path

import httpx
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from flwr.supercore.protobuf.constants import PROTOBUF_MEDIA_TYPE

from common.crypto import SigningKey, node_key_pem
from common.files import write_atomic
from common.flower_environment import flower_environment
from server.consortium import Consortium, load_consortium, read_settings

ROOT = Path(__file__).resolve().parents[1]


def free_port() -> int:
    """Return a port of loopback that nobody uses."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def make_home(folder: Path) -> Consortium:
    """Make a coordinator's home for 127.0.0.1."""
    for part in ("sites", "logs", "runs"):
        (folder / part).mkdir(parents=True)
    write_atomic(folder / "control.token", secrets.token_hex(32).encode(), 0o600)
    write_atomic(folder / "superexec.secret", secrets.token_bytes(32), 0o600)
    values = f'host = "127.0.0.1"\nport = {free_port()}\ncontrol_port = {free_port()}\ndatabase = "link.db"\n'
    write_atomic(folder / "federation.toml", values.encode())
    write_certificates(folder)
    return load_consortium(folder.absolute())


def write_certificates(folder: Path) -> None:
    """Write a new CA and a server certificate of it for 127.0.0.1 and localhost."""
    ca_key, server_key = (ec.generate_private_key(ec.SECP384R1()) for _ in range(2))
    ca = _certificate("test CA", ca_key.public_key(), "test CA", ca_key, [x509.BasicConstraints(True, 0)])
    names = [x509.DNSName("localhost"), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]
    server = _certificate("link", server_key.public_key(), "test CA", ca_key, [x509.SubjectAlternativeName(names)])
    pem = serialization.Encoding.PEM
    write_atomic(folder / "ca.pem", ca.public_bytes(pem))
    private = server_key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    write_atomic(folder / "server.key", private, 0o600)
    write_atomic(folder / "server.pem", server.public_bytes(pem))


def _certificate(name, key, issuer, issuer_key, extensions):
    now = dt.datetime.now(dt.UTC)
    builder = (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)]))
        .issuer_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, issuer)]))
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - dt.timedelta(minutes=5))
        .not_valid_after(now + dt.timedelta(days=1))
    )
    for extension in extensions:
        builder = builder.add_extension(extension, critical=False)
    return builder.sign(issuer_key, hashes.SHA256())


def openssh(key: ec.EllipticCurvePrivateKey) -> bytes:
    """Return the public half as OpenSSH writes it."""
    return key.public_key().public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)


def enrol(consortium: Consortium, name: str, revoked: bool = False, key=None) -> ec.EllipticCurvePrivateKey:
    """Write an enrolled site and return its node key."""
    key = key or ec.generate_private_key(ec.SECP384R1())
    site = {
        "name": name,
        "identity": SigningKey.generate().verify_key.to_bytes().hex(),
        "node_public_key": openssh(key).decode(),
        "revoked": revoked,
    }
    write_atomic(consortium.sites / f"{name}.json", json.dumps(site).encode())
    return key


def signed_headers(key: ec.EllipticCurvePrivateKey, age_s: float = 0.0) -> dict[str, str]:
    """Make the headers with which a node of this key asks the Fleet API."""
    stamp = (dt.datetime.now(dt.UTC) - dt.timedelta(seconds=age_s)).isoformat()
    signature = key.sign(stamp.encode(), ec.ECDSA(hashes.SHA256()))
    public = b64encode(node_key_pem(openssh(key))).decode()
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
    """Wait until both listeners answer."""
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
