"""`pacs.toml`."""

from datetime import time
from pathlib import Path

import pytest

from client.pull.sources import DimseSource, WebSource, find_source, load_secret, read_sources
from common.errors import ConfigError, StorageError

DIMSE = 'kind = "dimse"\nhost = "pacs"\nport = 104\naet = "PACS"\nour_aet = "US"\n'
WEB = 'kind = "dicomweb"\nurl = "https://pacs.example/dicom-web"\n'


def write(folder: Path, text: str) -> Path:
    (folder / "pacs.toml").write_text(text)
    return folder


def test_both_kinds(tmp_path: Path) -> None:
    home = write(tmp_path, f'[sources.night]\n{DIMSE}hours = "20:00-06:00"\n[sources.web]\n{WEB}')
    sources = read_sources(home)
    night, web = find_source(sources, "night"), find_source(sources, "web")
    assert isinstance(night, DimseSource)
    assert night.window == (time(20), time(6))
    assert isinstance(web, WebSource)
    assert web.window is None
    with pytest.raises(ConfigError, match="Expected one of night, web as --from, got 'day'"):
        find_source(sources, "day")


@pytest.mark.parametrize(
    "more",
    [
        'method = "move"\n', 'method = "move"\nlisten = "0.0.0.0"\nlisten_port = 11112\n', "per_minute = 1\n",
        'hours = "20-6"\n', 'hours = "20:00-20:00"\n', 'hours = "25:00-06:00"\n', 'tls_cert = "c"\ntls_key = "k"\n',
        'tls_ca = "c"\ntls_cert = "c"\n', "unknown = 1\n", 'method = "move"\nlisten = "host"\nlisten_port = 1\n',
        'method = "move"\nlisten = "10.0.0.1"\nlisten_port = 1\ntls_ca = "c"\n',
    ],
)  # fmt: skip
def test_wrong_values_are_named(more: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="Expected other values"):
        read_sources(write(tmp_path, f"[sources.a]\n{DIMSE}{more}"))


@pytest.mark.parametrize("title", ["", " X", "A" * 17, "A\\B", "Ä"])
def test_titles_are_those_of_the_standard(title: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError):
        read_sources(write(tmp_path, f"[sources.a]\n{DIMSE.replace('US', title.replace(chr(92), chr(92) * 2))}"))


@pytest.mark.parametrize(
    "text",
    [
        WEB.replace("https://", "https://u:canary@"), WEB + 'user = "u"\npassword = "canary"\n', WEB + 'user = "u"\n',
        WEB + 'token = "canary"\n', WEB + 'user = "u"\npassword_file = "f"\ntoken_file = "f"\n',
        WEB.replace("https", "http") + 'token_file = "f"\n', WEB.replace("dicom-web", "?x=canary"),
        WEB.replace("https", "file"), WEB.replace("dicomweb", "canary"),
    ],
)  # fmt: skip
def test_no_secret_in_the_file(text: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        read_sources(write(tmp_path, f"[sources.a]\n{text}"))
    assert "canary" not in str(caught.value)
    assert caught.value.__cause__ is None


def test_files_that_are_no_toml(tmp_path: Path) -> None:
    for text in ("[", "x" * 70_000):
        with pytest.raises(ConfigError, match=r"docs/pull\.md says"):
            read_sources(write(tmp_path, text))


def test_secrets_are_their_owners_alone(tmp_path: Path) -> None:
    path = tmp_path / "token"
    path.write_text("canary\n")
    path.chmod(0o644)
    with pytest.raises(StorageError, match="mode 600"):
        load_secret(str(path))
    path.chmod(0o600)
    secret = load_secret(str(path))
    assert secret.get_secret_value() == "canary"
    assert "canary" not in repr(secret)
    path.write_text("\n")
    with pytest.raises(ConfigError):
        load_secret(str(path))
