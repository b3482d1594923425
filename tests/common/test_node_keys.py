import pytest

from common.certificates import new_key
from common.errors import EnrolmentError, StorageError
from common.node_keys import load_node_key, new_node_key, node_public_key, node_public_pem


def test_node_keys_have_one_form():
    private = new_node_key()
    public = node_public_key(private)
    assert public.startswith(b"ecdsa-sha2-nistp384 ")
    assert node_public_pem(public).startswith(b"-----BEGIN PUBLIC KEY-----")
    assert load_node_key(private).curve.name == "secp384r1"
    for wrong in (public + b"\n", public + b" me@home", b"", private, b"ssh-ed25519 AAAA", b"x" * 10_000):
        with pytest.raises(EnrolmentError, match="fedmedgan-site enrol"):
            node_public_pem(wrong)
    for wrong in (b"SECRET", new_key(), public):
        with pytest.raises(StorageError) as refused:
            load_node_key(wrong)
        assert "SECRET" not in str(refused.value)
