import copy
import json
import os
import pickle

import pytest
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

from common.crypto import KeyStream, SigningKey, VerifyKey, is_sealed, load_key, load_verify_key, save_key
from common.errors import PassphraseError, StorageError, WireError
from common.passphrase import Passphrase

SEED = bytes(range(32))


def test_rfc_8032_public_key_and_raw_signature():
    # RFC 8032 section 7.1, test 2; the raw signature is checked through the primitive that the module wraps
    seed = bytes.fromhex("4ccd089b28ff96da9db6c346ec114e0f5b8a319f35aba624da8cf6ed4fb8a6fb")
    public = "3d4017c3e843895a92b70aa74d1b7ebc9c982ccf2ec4968cc0cd55f12af4660c"
    signature = (
        "92a009a9f0d4cab8720e820b5f642540a2b27b5416503f8fb3762223ebdb69da"
        "085ac1e43e15996e458f3613d0f11d8c387b2eaeb4302aeeb00d291612bb0c00"
    )
    key = SigningKey.from_bytes(seed)
    assert key.verify_key.to_bytes().hex() == public
    assert key._key.sign(bytes.fromhex("72")).hex() == signature


def test_sign_and_verify_and_bytes_round_trip():
    key = SigningKey.generate()
    again = SigningKey.from_bytes(key.to_bytes())
    signature = again.sign(b"message", "reply")
    VerifyKey.from_bytes(key.verify_key.to_bytes()).verify(b"message", signature, "reply")
    assert again.verify_key == key.verify_key
    assert len({again.verify_key, key.verify_key}) == 1
    assert SigningKey.generate().verify_key != key.verify_key


@pytest.mark.parametrize(
    ("message", "purpose", "cut"), [(b"other", "reply", 64), (b"message", "ledger", 64), (b"message", "reply", 63)]
)
def test_domain_separated_and_changed_signatures_are_refused(message, purpose, cut):
    key = SigningKey.from_bytes(SEED)
    signature = key.sign(b"message", "reply")
    with pytest.raises(WireError, match="does not fit"):
        key.verify_key.verify(message, signature[:cut], purpose)


def test_domain_separated_purpose_cannot_slide_into_the_message():
    key = SigningKey.from_bytes(SEED)
    with pytest.raises(WireError):
        key.verify_key.verify(b"ymessage", key.sign(b"message", "reply"), "repl")


def test_wrong_key_lengths_are_refused():
    with pytest.raises(WireError):
        SigningKey(b"short")
    with pytest.raises(WireError):
        VerifyKey(b"short")
    with pytest.raises(ValueError, match="32 bytes"):
        KeyStream(b"short")


@pytest.mark.parametrize("secret", [SigningKey.from_bytes(SEED), KeyStream(SEED)])
def test_redacted_repr(secret):
    assert repr(secret) == str(secret) == f"{type(secret).__name__}(<redacted>)"


def test_nist_sp_800_38a_aes_256_ctr_vector():
    # F.5.5, output block 1; NIST's counter starts at f0f1...ff where ours starts at zero
    key = bytes.fromhex("603deb1015ca71be2b73aef0857d77811f352c073b6108d72d9810a30914dff4")
    counter = bytes.fromhex("f0f1f2f3f4f5f6f7f8f9fafbfcfdfeff")
    first = bytes.fromhex("0bdf7df1591716335e9a8b15c860c502")
    stream = KeyStream(key)
    stream._encryptor = Cipher(algorithms.AES(stream._key), modes.CTR(counter)).encryptor()
    assert stream.read(16) == first
    assert KeyStream(key).read(16) == Cipher(algorithms.AES(key), modes.ECB()).encryptor().update(bytes(16))  # noqa: S305
    # the hash key H of test case 13 of the GCM specification: AES-256 of a zero block under a zero key
    assert KeyStream(bytes(32)).read(16).hex() == "dc95c078a2408989ad48a21492842087"


def test_reads_continue_and_never_reused():
    whole = KeyStream(SEED).read(3 << 20)
    stream = KeyStream(SEED)
    parts = b"".join(stream.read(size) for size in (0, 1, 15, 16, 1 << 20, (2 << 20) - 32))
    assert parts == whole
    blocks = {whole[start : start + 16] for start in range(0, len(whole), 16)}
    assert len(blocks) == len(whole) // 16


def test_never_reused_by_copy_label_or_fork():
    stream = KeyStream(SEED)
    with pytest.raises(TypeError):
        copy.deepcopy(stream)
    with pytest.raises(TypeError):
        pickle.dumps(stream)
    stream.derive("noise")
    with pytest.raises(ValueError, match="fresh label"):
        stream.derive("noise")
    stream._process = os.getpid() + 1  # as a forked child would find it
    with pytest.raises(RuntimeError, match="fork"):
        stream.read(1)
    with pytest.raises(RuntimeError, match="fork"):
        stream.derive("other")


def test_derived_streams_are_independent():
    stream, again = KeyStream(SEED), KeyStream(SEED)
    again.read(1000)
    first, second = stream.derive("a"), stream.derive("b")
    assert first.read(64) == again.derive("a").read(64)
    heads = {first.read(64), second.read(64), stream.read(64), second.derive("a").read(64)}
    assert len(heads) == 4
    assert KeyStream.from_os().read(32) != KeyStream.from_os().read(32)


def test_hkdf_vector_of_a_derived_stream():
    # computed with another library (pycryptodome); a change here changes every simulated run
    assert KeyStream(bytes(32)).derive("noise").read(8).hex() == "a4450784deeed494"


def test_key_file_round_trip(tmp_path):
    key = SigningKey.generate()
    path = tmp_path / "site.key"
    save_key(path, key)
    assert path.stat().st_mode & 0o777 == 0o600
    assert load_key(path).to_bytes() == key.to_bytes()
    assert (load_verify_key(path), is_sealed(path)) == (key.verify_key, False)


def test_a_key_under_a_passphrase(tmp_path):
    key, path, asked = SigningKey.generate(), tmp_path / "site.key", []

    def ask():
        asked.append(1)
        return Passphrase("correct horse battery staple")

    save_key(path, key, ask())
    assert path.stat().st_mode & 0o777 == 0o600
    assert key.to_bytes().hex() not in path.read_text()
    assert (load_verify_key(path), is_sealed(path)) == (key.verify_key, True)
    assert len(asked) == 1
    assert load_key(path, ask).to_bytes() == key.to_bytes()
    assert len(asked) == 2
    with pytest.raises(PassphraseError, match="fedmedgan-site passphrase"):
        load_key(path)
    with pytest.raises(PassphraseError, match="does not open"):
        load_key(path, lambda: Passphrase("another one, and long"))
    tree = json.loads(path.read_text())
    path.write_text(json.dumps(tree | {"public": SigningKey.generate().verify_key.to_bytes().hex()}))
    with pytest.raises(PassphraseError, match="file was changed"):
        load_key(path, ask)
    path.write_text(json.dumps(tree | {"log2_n": 30}))
    with pytest.raises(WireError, match="another way"):
        load_key(path, ask)


def test_asked_only_where_needed(tmp_path):
    save_key(tmp_path / "site.key", SigningKey.generate())
    load_key(tmp_path / "site.key", lambda: pytest.fail("asked"))


def test_key_file_that_others_can_read_is_refused(tmp_path):
    path = tmp_path / "site.key"
    save_key(path, SigningKey.generate())
    path.chmod(0o640)
    with pytest.raises(StorageError, match="chmod 600"):
        load_key(path)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"[]",
        b"\xff",
        json.dumps({"version": 2, "kind": "ed25519-private", "key": SEED.hex()}).encode(),
        json.dumps({"version": 1, "kind": "ed25519-private", "key": SEED.hex(), "more": 1}).encode(),
        json.dumps({"version": 1, "kind": "ed25519-private", "key": "00"}).encode(),
        json.dumps({"version": 1, "kind": "ed25519-private", "key": 7}).encode(),
        json.dumps({"version": 2, "kind": "ed25519-private", "public": SEED.hex()}).encode(),
        b"[" * 4000,
        b" " * 5000,
    ],
)
def test_malformed_key_files_are_refused_without_their_content(tmp_path, content):
    path = tmp_path / "site.key"
    path.write_bytes(content)
    path.chmod(0o600)
    with pytest.raises(WireError):
        load_verify_key(path)
    with pytest.raises(WireError) as caught:
        load_key(path)
    assert SEED.hex() not in str(caught.value)


def test_missing_key_file(tmp_path):
    with pytest.raises(StorageError, match="Could not read"):
        load_key(tmp_path / "none.key")
