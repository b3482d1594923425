"""The command's own process."""

import subprocess
import sys
from pathlib import Path

import pytest

from client import entry
from client.pull import command
from common.errors import ExitCode
from tests.real_pacs import REPOSITORY, write_home, write_list

pytestmark = pytest.mark.filterwarnings(
    "ignore:Exception ignored in. <socket.socket:pytest.PytestUnraisableExceptionWarning"
)

WEB: dict[str, object] = {"kind": "dicomweb", "url": "http://127.0.0.1:1/dicom-web"}
DIMSE: dict[str, object] = {"kind": "dimse", "host": "127.0.0.1", "port": 1, "aet": "A", "our_aet": "B"}

LOADED = """
import sys
from client.pull import command, dimse, web
print(sorted({name.split(".")[0] for name in sys.modules} & {"torch", "flwr", "opacus", "scipy"}))
"""


def test_process_holds_no_torch_and_no_flower() -> None:
    ran = subprocess.run([sys.executable, "-c", LOADED], capture_output=True, text=True, cwd=REPOSITORY, check=True)
    assert ran.stdout == "[]\n"


@pytest.mark.parametrize(
    ("flags", "code"),
    [
        (["--from", "web", "--echo"], 13), (["--from", "dimse", "--echo"], 13), (["--from", "other", "--echo"], 3),
        (["--from", "web"], 3), (["--from", "web", "--echo", "--dry-run"], 3), (["--echo"], 2),
        (["--from", "web", "--list", "LIST"], 13), (["--from", "web", "--list", "/none.csv"], 4),
    ],
)  # fmt: skip
def test_exit_codes(
    flags: list[str], code: int, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("client.pull.command._be_quiet", lambda: None)  # signals and warnings of this process
    monkeypatch.setattr("client.pull.command.log_to", lambda _: None)
    home = write_home(tmp_path / "home", web=WEB, dimse=DIMSE)
    named = [str(write_list(tmp_path / "l.csv", "CANARY")) if flag == "LIST" else flag for flag in flags]
    with pytest.raises(SystemExit) as ended:
        entry.main(["pull", str(home), *named])
    assert ended.value.code == code
    assert "CANARY" not in "".join(capsys.readouterr())


def test_help_states_the_code_of_the_pacs() -> None:
    codes = "".join((command.pull.__doc__ or "").partition("Exits")[1:])
    assert f"{ExitCode.PACS:d} the PACS is out of reach" in " ".join(codes.split())
    assert f"**{ExitCode.PACS:d} the PACS is out of reach" in (REPOSITORY / "docs" / "pull.md").read_text()


def test_missing_extra_names_the_pip_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pynetdicom", None)
    monkeypatch.setattr("client.pull.command._be_quiet", lambda: None)
    monkeypatch.setattr("client.pull.command.log_to", lambda _: None)
    with pytest.raises(SystemExit) as ended:
        entry.main(["pull", str(write_home(tmp_path / "home", dimse=DIMSE)), "--from", "dimse", "--echo"])
    assert ended.value.code == 9
    assert "pip install 'fedmedgan[pacs]'" in capsys.readouterr().err
