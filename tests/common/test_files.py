import os
import resource
import signal
import subprocess
import sys
import time

import pytest

from common.errors import StorageError, WireError
from common.files import (
    append_durably,
    make_folder,
    make_own_folder,
    open_regular,
    read_bounded,
    read_credential,
    read_secret,
    write_atomic,
)


def test_write_atomic_sets_mode_and_content(tmp_path) -> None:
    path = tmp_path / "file"
    write_atomic(path, b"content", 0o600)
    assert path.read_bytes() == b"content"
    assert path.stat().st_mode & 0o777 == 0o600
    assert os.listdir(tmp_path) == ["file"]


_WRITER = """
import sys
from pathlib import Path
from common.files import write_atomic
path, number = Path(sys.argv[1]), 0
while True:
    number = (number + 1) % 256
    write_atomic(path, bytes([number]) * 200_000)
"""


def test_old_or_new_after_kill(tmp_path) -> None:
    path = tmp_path / "file"
    for attempt in range(12):
        process = subprocess.Popen([sys.executable, "-c", _WRITER, str(path)])
        while attempt == 0 and not path.exists():
            time.sleep(0.01)
        time.sleep(0.25 + 0.013 * attempt)
        process.send_signal(signal.SIGKILL)
        process.wait()
        content = path.read_bytes()
        assert len(content) == 200_000
        assert len(set(content)) == 1


_FULL = """
import resource, signal, sys
from pathlib import Path
from common.errors import StorageError
from common.files import append_durably, write_atomic
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
path = Path(sys.argv[1])
for call in (lambda: write_atomic(path, b"new" * 10_000), lambda: append_durably(path, b"x" * 10_000)):
    try:
        call()
    except StorageError as error:
        print(error)
"""


def test_old_survives_full_disk(tmp_path) -> None:
    path = tmp_path / "file"
    write_atomic(path, b"old")
    done = subprocess.run([sys.executable, "-c", _FULL, str(path)], capture_output=True, text=True, check=True)
    assert "Could not write file (30000 bytes)" in done.stdout
    assert "Free space" in done.stdout
    assert path.read_bytes().startswith(b"old")
    assert os.listdir(tmp_path) == ["file"]


def test_append_durably_appends_whole_lines(tmp_path) -> None:
    path = tmp_path / "log"
    for number in range(3):
        append_durably(path, b"%d\n" % number)
    assert path.read_bytes() == b"0\n1\n2\n"
    assert path.stat().st_mode & 0o777 == 0o600


def test_folder_that_is_a_file_is_a_clear_error(tmp_path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(StorageError, match="Could not make the folder"):
        make_folder(tmp_path / "file" / "below")


def test_missing_folder_is_a_clear_error(tmp_path) -> None:
    with pytest.raises(StorageError, match="Could not write"):
        write_atomic(tmp_path / "none" / "file", b"")
    assert resource.getrlimit(resource.RLIMIT_FSIZE)  # the limit of the test above was set in its own process


def test_read_bounded_stops_at_the_bound(tmp_path):
    (tmp_path / "file").write_bytes(b"12345")
    assert read_bounded(tmp_path / "file", 5) == b"12345"
    with pytest.raises(WireError, match="at most 4 bytes"):
        read_bounded(tmp_path / "file", 4)
    for gone in (tmp_path / "gone", tmp_path):
        with pytest.raises(StorageError, match="Could not read"):
            read_bounded(gone, 4)


def test_read_secret_wants_it_secret(tmp_path):
    path = tmp_path / "secret"
    write_atomic(path, b"12345", 0o600)
    assert read_secret(path, 5) == b"12345"
    with pytest.raises(WireError, match="at most 4 bytes"):
        read_secret(path, 4)
    for mode in (0o640, 0o604, 0o620, 0o610):
        path.chmod(mode)
        with pytest.raises(StorageError, match="chmod 600"):
            read_secret(path, 5)
    with pytest.raises(StorageError, match="Could not read"):
        read_secret(tmp_path / "gone", 5)


def test_a_credential_is_read_from_the_folder_that_the_service_manager_names(tmp_path, monkeypatch) -> None:
    monkeypatch.delenv("CREDENTIALS_DIRECTORY", raising=False)
    assert read_credential("passphrase", 10) is None
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(tmp_path))
    assert read_credential("passphrase", 10) is None
    path = tmp_path / "passphrase"
    write_atomic(path, b"0123456789", 0o600)
    assert read_credential("passphrase", 10) == b"0123456789"
    with pytest.raises(WireError, match="at most 9 bytes"):
        read_credential("passphrase", 9)
    for mode in (0o604, 0o620, 0o644, 0o660):
        path.chmod(mode)
        with pytest.raises(StorageError, match="chmod 600"):
            read_credential("passphrase", 10)
    path.unlink()
    path.mkdir()  # what cannot be read is not the same as what was never handed over
    with pytest.raises(StorageError, match="credentials"):
        read_credential("passphrase", 10)


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to own a file as root and as another")
def test_a_credential_of_roots_may_show_the_mask_of_an_access_list(tmp_path, monkeypatch) -> None:
    """systemd: `-r--r-----+ root root`, the service's user in the access list; the group there is root's own."""
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(tmp_path))
    write_atomic(tmp_path / "passphrase", b"0123456789", 0o440)
    assert read_credential("passphrase", 10) == b"0123456789"
    os.chown(tmp_path / "passphrase", 0, 12345)
    with pytest.raises(StorageError, match="chmod 600"):
        read_credential("passphrase", 10)


def test_an_open_folder_is_closed(tmp_path):
    folder = tmp_path / "open"
    folder.mkdir()
    folder.chmod(0o777)
    assert make_own_folder(folder).stat().st_mode & 0o777 == 0o700


def test_neither_waits_nor_endless(tmp_path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "zeros").symlink_to("/dev/zero")
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_bytes(b"content")
    (tmp_path / "link").symlink_to("file")
    for name in ("pipe", "zeros", "folder"):
        with pytest.raises(OSError, match="not a regular file"):
            open_regular(tmp_path / name)
        with pytest.raises(StorageError, match="not a regular file"):
            read_bounded(tmp_path / name, 100)
        with pytest.raises(StorageError, match="not a regular file"):
            read_secret(tmp_path / name, 100)
    assert read_bounded(tmp_path / "link", 100) == b"content"
