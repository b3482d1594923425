"""What a relay trusts: the pinned authority, few others by choice, and no environment."""

import datetime as dt
from pathlib import Path

import pytest

from client.paths import Home
from client.trust import extra_ca, trusted
from common.certificates import authority_certificate, new_key, server_certificate
from common.errors import ConfigError, StorageError

NOW = dt.datetime.now(dt.UTC)
KEY = new_key()
PINNED, EXTRA = authority_certificate(KEY, "ours", NOW), authority_certificate(new_key(), "proxy", NOW)


@pytest.fixture
def home(tmp_path: Path) -> Home:
    (tmp_path / "proxy.pem").write_bytes("Zürich\n".encode() + EXTRA)
    return Home(tmp_path)


def name(home: Home, path: str) -> None:
    (home.folder / "site.toml").write_text(f'data = "x"\nextra_ca = "{path}"\n')


def test_pinned_alone(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(home.folder / "proxy.pem"))
    assert trusted(home, PINNED) == PINNED  # no site.toml, as in a relay's own home
    (home.folder / "site.toml").write_text('data = "x"\n')
    assert trusted(home, PINNED) == PINNED


def test_an_extra_authority_is_added_without_what_stands_beside_it(home: Home) -> None:
    name(home, str(home.folder / "proxy.pem"))
    assert extra_ca(home) == (EXTRA,)
    assert trusted(home, PINNED) == PINNED + b"\n" + EXTRA
    trusted(home, PINNED).decode("ascii")  # as Flower decodes it


def test_never_all_the_world(home: Home) -> None:
    name(home, str(home.folder / "proxy.pem"))
    (home.folder / "proxy.pem").write_bytes(EXTRA * 5)
    with pytest.raises(ConfigError, match="at most 4"):
        trusted(home, PINNED)
    (home.folder / "proxy.pem").write_bytes(EXTRA * 200)
    with pytest.raises(ConfigError, match="65536 bytes"):
        trusted(home, PINNED)


def test_an_extra_authority_that_others_can_change_is_not_trusted(home: Home) -> None:
    name(home, str(home.folder / "ca" / "proxy.pem"))
    (home.folder / "ca").mkdir(0o755)
    file = (home.folder / "proxy.pem").rename(home.folder / "ca" / "proxy.pem")
    for path, mode, fix in (
        (file, 0o646, "chmod go-w"),
        (file, 0o664, "chmod go-w"),
        (file.parent, 0o777, "chmod o-w"),
    ):
        before = path.stat().st_mode
        path.chmod(mode)
        with pytest.raises(StorageError, match=f"{fix} {path}$"):
            trusted(home, PINNED)
        path.chmod(before)
    assert extra_ca(home) == (EXTRA,)


def test_an_extra_ca_that_is_none(home: Home) -> None:
    name(home, str(home.folder / "proxy.pem"))
    server = server_certificate(KEY, PINNED, new_key(), "127.0.0.1", NOW)
    for content in (b"", b"none", server, EXTRA + server, KEY):
        (home.folder / "proxy.pem").write_bytes(content)
        with pytest.raises(ConfigError, match="extra_ca"):
            trusted(home, PINNED)


@pytest.mark.parametrize("path", ["proxy.pem", "/nowhere/proxy.pem"])
def test_a_path_that_leads_nowhere(home: Home, path: str) -> None:
    name(home, path)
    with pytest.raises(ConfigError, match="extra_ca"):
        trusted(home, PINNED)


@pytest.mark.parametrize("text", ["extra_ca = 3", "extra_ca = ", "\xff"])
def test_a_site_file_that_does_not_read(home: Home, text: str) -> None:
    (home.folder / "site.toml").write_text(text, encoding="latin-1")
    with pytest.raises(ConfigError, match=r"site\.toml"):
        trusted(home, PINNED)
