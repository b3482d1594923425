"""The files of deploy/: what the tools of this machine say of them, and that they draw the line where they must."""

import shutil
import subprocess
import sys
from configparser import ConfigParser
from pathlib import Path

import pytest
import yaml

from client.supervise import FOR_A_PERSON
from common.errors import ExitCode

DEPLOY = Path(__file__).parents[1] / "deploy"
UNITS = sorted((DEPLOY / "systemd").glob("*.service"))
COMPOSE = sorted(DEPLOY.glob("*.compose.yaml"))
NOT_OF = {"agent": (), "relay": (ExitCode.PASSPHRASE,)}
"""Codes for a person that a service cannot end with."""
WORST_EXPOSURE = 25
"""Tenths of systemd's scale from 0 to 10."""


class _Unit(ConfigParser):
    def __init__(self, path: Path) -> None:
        super().__init__(strict=False, interpolation=None, delimiters=("=",), comment_prefixes=("#",))
        self.optionxform = str  # type: ignore[assignment]
        self.read_string(path.read_text())


def unit(name: str) -> dict[str, str]:
    return dict(_Unit(DEPLOY / "systemd" / f"fedmedgan-{name}.service")["Service"])


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="needs systemd-analyze")
@pytest.mark.parametrize("path", UNITS, ids=lambda path: path.stem)
def test_systemd_takes_the_units_and_finds_them_confined(path: Path, tmp_path: Path) -> None:
    copy = tmp_path / path.name  # its command has to exist
    program = path.read_text().split("ExecStart=")[1].split()[0]
    copy.write_text(path.read_text().replace(program, sys.executable))
    verified = subprocess.run(["systemd-analyze", "verify", str(copy)], capture_output=True, text=True)
    assert (verified.returncode, verified.stderr) == (0, "")
    threshold = f"--threshold={WORST_EXPOSURE}"
    command = ["systemd-analyze", "security", "--offline=true", "--no-pager", threshold, str(copy)]
    rated = subprocess.run(command, capture_output=True, text=True)
    assert rated.returncode == 0, rated.stdout


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="needs systemd-analyze")
def test_systemd_takes_the_timer(tmp_path: Path) -> None:
    for name in ("fedmedgan-pull.timer", "fedmedgan-pull.service"):
        text = (DEPLOY / "systemd" / name).read_text()
        (tmp_path / name).write_text(text.replace("/opt/fedmedgan/bin/fedmedgan-site", sys.executable))
    timer = tmp_path / "fedmedgan-pull.timer"
    verified = subprocess.run(["systemd-analyze", "verify", str(timer)], capture_output=True, text=True)
    assert (verified.returncode, verified.stderr) == (0, "")


def test_the_pull_has_the_inbox_and_a_network_and_nothing_of_the_agent() -> None:
    pull, agent, relay = unit("pull"), unit("agent"), unit("relay")
    assert pull["User"] not in (agent["User"], relay["User"])
    assert "SupplementaryGroups" not in pull
    for path in ("/var/lib/fedmedgan", "/var/lib/fedmedgan-relay", "/run/fedmedgan"):
        assert f"-{path}" in pull["InaccessiblePaths"].split()
    assert pull["ReadWritePaths"] == "/var/lib/fedmedgan-inbox"
    assert pull["StateDirectory"] not in (agent["StateDirectory"], relay["StateDirectory"])
    assert "PrivateNetwork" not in pull
    assert pull["SuccessExitStatus"] == str(int(ExitCode.INTERRUPTED))
    folders = (DEPLOY / "systemd" / "fedmedgan-pull.tmpfiles.conf").read_text()
    assert "d /var/lib/fedmedgan-inbox 2750 fedmedgan-pull fedmedgan -" in folders


@pytest.mark.skipif(shutil.which("docker-compose") is None, reason="needs docker-compose")
@pytest.mark.parametrize("path", COMPOSE, ids=lambda path: path.stem)
def test_compose_takes_the_files(path: Path) -> None:
    read = subprocess.run(["docker-compose", "-f", str(path), "config", "-q"], capture_output=True, text=True)
    assert read.returncode == 0, read.stderr


def test_units_draw_the_line() -> None:
    agent, relay = unit("agent"), unit("relay")
    assert agent["PrivateNetwork"] == "yes"
    assert agent["RestrictAddressFamilies"] == "AF_UNIX"
    assert agent["User"] != relay["User"]
    assert relay["InaccessiblePaths"] == "/var/lib/fedmedgan"
    assert {"MemoryMax", "TasksMax"} <= relay.keys()
    assert "ExecStartPre" not in relay  # nothing runs as root for the relay, and no key is copied to a disk
    for name, code in ((name, code) for name in ("agent", "relay") for code in FOR_A_PERSON):
        assert str(int(code)) in unit(name)["RestartPreventExitStatus"].split() or code in NOT_OF[name]
    for name in ("agent", "relay", "pull", "coordinator"):
        service = unit(name)
        assert service["CapabilityBoundingSet"] == ""
        assert (service["NoNewPrivileges"], service["ProtectSystem"], service["UMask"]) == ("yes", "strict", "0077")


def test_compose_draws_the_line() -> None:
    services = yaml.safe_load((DEPLOY / "site.compose.yaml").read_text())["services"]
    agent, relay = services["agent"], services["relay"]
    assert agent["network_mode"] == "none"
    assert not any(volume.startswith("home:") for volume in relay["volumes"])
    assert agent["user"] != relay["user"]
    assert "socket:/run/fedmedgan:ro" in relay["volumes"]  # a socket is written to through the folder all the same
    for service in services.values():
        assert service["cap_drop"] == ["ALL"]
        assert service["read_only"] is True
        assert "no-new-privileges:true" in service["security_opt"]
        assert "ports" not in service
