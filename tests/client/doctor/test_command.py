"""`fedmedgan-site doctor` as a person types it: lines, codes, the JSON file."""

import datetime as dt
import json
import shutil
from pathlib import Path

import pytest

from client.cli import main
from client.doctor.findings import Status, exit_code, failed, look, passed, summary, to_do, warned
from client.home import Home
from client.joining import leave
from common.certificates import authority_certificate, new_key
from common.errors import ExitCode
from tests.coordinator_home import free_port
from tests.pinned import pin


@pytest.fixture
def doctor(tiny_home: Home, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    """Return a call that gives the exit code and the first word of each check's line."""
    tiny_home.folder.chmod(0o700)
    for name in ("https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)

    def call(*more: str | Path):
        with pytest.raises(SystemExit) as ended:
            main(["doctor", str(tiny_home.folder), *map(str, more)])
        lines = capsys.readouterr().out.splitlines()
        return ended.value.code, {line.split("  ")[1].split(":")[0]: line.split(" ")[0] for line in lines[:-2]}

    return call


def test_a_new_site_could_not_take_part(doctor, tiny_home: Home) -> None:
    before = {path: path.stat().st_mtime_ns for path in tiny_home.folder.rglob("*")}
    code, found = doctor()
    assert code == ExitCode.ENROLMENT
    assert [name for name, status in found.items() if status == "FAIL"] == ["joined"]
    assert found["socket"] == "WARN"
    assert "tls" not in found  # nobody to connect to
    assert {path: path.stat().st_mtime_ns for path in tiny_home.folder.rglob("*")} == before


def test_a_site_that_has_left_is_told_how_to_come_back(doctor, tiny_home: Home, tmp_path: Path) -> None:
    pin(tiny_home)
    leave(tiny_home.folder)
    code, found = doctor("--json", tmp_path / "doctor.json")
    assert (code, found["keys"], found["joined"]) == (ExitCode.ENROLMENT, "PASS", "FAIL")
    (joined,) = [
        one for one in json.loads((tmp_path / "doctor.json").read_text())["findings"] if one["name"] == "joined"
    ]
    assert "has left its federation" in joined["said"]
    for word in ("fedmedgan-site enrol", "--readmit", "join", "start"):
        assert word in joined["fix"]
    assert "backup" not in (tmp_path / "doctor.json").read_text()


def test_a_node_key_that_is_gone_is_no_leaving(doctor, tiny_home: Home) -> None:
    pin(tiny_home, free_port(), authority_certificate(new_key(), "test", dt.datetime.now(dt.UTC)))
    tiny_home.node_key.unlink()
    code, found = doctor()
    assert (code, found["keys"]) == (ExitCode.STORAGE, "FAIL")


def test_one_failure_hides_no_other_and_the_first_gives_the_code(doctor, tiny_home: Home, tmp_path: Path) -> None:
    pin(tiny_home, free_port(), authority_certificate(new_key(), "test", dt.datetime.now(dt.UTC)))
    (tiny_home.folder / "site.toml").write_text('data = "/nowhere"\n')
    for vault in tiny_home.folder.glob("vault-*"):
        shutil.rmtree(vault)
    code, found = doctor("--json", tmp_path / "doctor.json")
    assert code == ExitCode.UNREADABLE
    assert [name for name, status in found.items() if status == "FAIL"] == ["data", "tls"]
    assert (found["health"], found["clock"]) == ("SKIP", "SKIP")
    assert (found["joined"], found["dns"], found["proxy"]) == ("PASS", "PASS", "PASS")
    told = json.loads((tmp_path / "doctor.json").read_text())
    assert (tmp_path / "doctor.json").stat().st_mode & 0o777 == 0o600
    assert told["exit_code"] == ExitCode.UNREADABLE
    assert {one["name"]: one["status"] for one in told["findings"]} == found
    (tls,) = [one for one in told["findings"] if one["name"] == "tls"]
    assert "refused, it may not be started" in tls["said"]
    assert [one["exit_code"] for one in told["findings"] if one["status"] == "FAIL"] == [15, 8]


def test_a_proxy_that_cannot_be_used_is_one_finding(doctor, tiny_home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTPS_PROXY", "socks5://127.0.0.1:1080")
    pin(tiny_home, free_port(), authority_certificate(new_key(), "test", dt.datetime.now(dt.UTC)), "fed.example.org")
    code, found = doctor()
    assert (code, found["proxy"]) == (ExitCode.CONFIG, "FAIL")
    assert "dns" not in found


def test_a_damaged_policy_and_no_home(doctor, tiny_home: Home) -> None:
    tiny_home.policy.write_text("nothing")
    code, found = doctor()
    assert (code, found["policy"], "budget" in found) == (ExitCode.CONFIG, "FAIL", False)
    shutil.rmtree(tiny_home.folder)
    assert doctor()[0] == ExitCode.STORAGE


def test_one_cause_is_told_once(doctor, tiny_home: Home, tmp_path: Path) -> None:
    tiny_home.key.unlink()
    code, _ = doctor("--json", tmp_path / "doctor.json")
    told = [one for one in json.loads((tmp_path / "doctor.json").read_text())["findings"] if one["status"] == "FAIL"]
    assert (code, told[0]["name"]) == (told[0]["exit_code"], "keys")
    assert {"records", "budget"} <= {one["name"] for one in told if one["said"] == "see keys."}
    full = [one["said"] for one in told if one["said"] != "see keys."]
    assert len(set(full)) == len(full)


def test_json_stands_outside_the_home(doctor, tiny_home: Home) -> None:
    assert doctor("--json", tiny_home.policy) == (ExitCode.CONFIG, {})  # refused before anything is looked at
    assert "site" in tiny_home.policy.read_text()


def test_findings() -> None:
    def denied():
        raise PermissionError(13, "Permission denied", "/data/smith.dcm")

    finding = look("data", denied)
    assert (finding.status, finding.exit_code) == (Status.FAIL, ExitCode.STORAGE)
    assert "Permission denied" in finding.line
    assert "smith" not in finding.line
    assert failed("a", "b\nc", "d", ExitCode.DATA).line == "FAIL  a: b c d"
    assert exit_code([passed("a", ""), warned("b", "", "")]) is ExitCode.OK
    joined = failed("joined", "no federation yet.", "", ExitCode.ENROLMENT)
    assert summary([passed("a", ""), warned("b", "", ""), joined, to_do("imported", "no training set.", "")]) == (
        "could not take part now: joined (no federation yet); imported (no training set)"
    )
    assert summary([passed("a", ""), warned("b", "", "")]) == "could take part now"
