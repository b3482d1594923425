"""The bundle that `flwr build` makes, and `flwr run .` on Flower's local runtime."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.e2e.conftest import ENVIRONMENT, SMALL

pytestmark = [pytest.mark.e2e, pytest.mark.slow]

ROOT = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """A checkout with everything beside the code that must not end in the bundle."""
    folder = tmp_path / "fedmedgan"
    folder.mkdir()
    for name in ("common", "client", "server", "simulations", "tests"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder / name)
    (folder / "secrets.yaml").write_text("key: secret")
    (folder / "server" / "secrets.yaml").write_text("key: secret")
    (folder / "client" / "patients.json").write_text("{}")
    (folder / "common" / "notes.md").write_text("")
    (folder / "data").mkdir()
    (folder / "data" / "patients.json").write_text("{}")
    return folder


@pytest.fixture
def flower(tmp_path: Path) -> Iterator[dict[str, str]]:
    """An environment for the flwr command; whatever link it starts is ended afterwards."""
    home = tmp_path / "flwr-home"
    yield {
        **ENVIRONMENT,
        "FLWR_HOME": str(home),
        "FLWR_LOCAL_SUPERLINK_HTTP_API_PORT": str(_free_port()),
        "FLWR_LOCAL_CONTROL_API_PORT": str(_free_port()),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
        "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
    }
    ours = [p for p in psutil.process_iter(["environ"]) if (p.info["environ"] or {}).get("FLWR_HOME") == str(home)]
    for process in ours:
        try:
            process.send_signal(signal.SIGTERM)
        except psutil.Error:
            continue
    _, alive = psutil.wait_procs(ours, timeout=10)
    for process in alive:
        process.kill()


def test_bundle_holds_the_code_and_nothing_else(clone: Path, flower: dict[str, str]) -> None:
    build = [BIN / "flwr", "build", "--app", clone]
    subprocess.run(build, cwd=clone, env=flower, check=True, capture_output=True, timeout=120)
    with zipfile.ZipFile(next(clone.glob("*.fab"))) as bundle:
        names = set(bundle.namelist())
    code = {str(p.relative_to(clone)) for tier in ("common", "client", "server") for p in (clone / tier).rglob("*.py")}
    assert names - {".info/CONTENT"} == code | {"pyproject.toml"}


def test_flwr_run_on_the_local_runtime(clone: Path, flower: dict[str, str]) -> None:
    classes = '[image]\nclasses = ["clear", "opacity", "nodule", "effusion"]'
    small = SMALL.replace("[image]", classes).replace("sites = 3", "sites = 2")
    (clone / "small.toml").write_text(small)
    settings = f'config="{clone / "small.toml"}" out="{clone / "out"}"'
    command = [BIN / "flwr", "run", ".", "local", "--stream", "--run-config", settings]
    done = subprocess.run(command, cwd=clone, env=flower, capture_output=True, text=True, timeout=280, check=False)
    deadline = time.monotonic() + 30
    while not (clone / "out" / "report.html").exists() and time.monotonic() < deadline:
        time.sleep(0.2)
    assert (clone / "out" / "report.html").exists(), done.stdout[-3000:] + done.stderr[-3000:]
    info = json.loads((clone / "out" / "generator.json").read_text())
    assert set(info["epsilon_by_site"]) == {"hospital-01", "hospital-02"}
    lines = (clone / "out" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["round"] for line in lines] == [0, 1, 2, 3]
