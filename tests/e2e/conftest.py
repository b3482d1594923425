"""A small federation that the end-to-end tests run as a user would: by the command line, in processes of their own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from common.files import write_atomic

SMALL = """
[image]
size = 28

[privacy]
epsilon = 8.0
batch_patients = 8
min_patients = 10

[warmup]
steps = 6
batch_size = 32

[model]
name = "mlp"
generator_width = 16
discriminator_width = 8

[train]
steps_per_round = 3
d_steps_per_g_step = 2
generator_batch = 8

[federation]
rounds = 3

[performance]
threads = 1

[simulation]
sites = 3
phantom_patients = 90
partition = "iid"
"""

ENVIRONMENT = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1", "COLUMNS": "160", "FLWR_TELEMETRY_ENABLED": "0"}


@pytest.fixture(scope="session")
def small_config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("config") / "small.toml"
    write_atomic(path, SMALL.encode())
    return path


def simulate(
    *arguments: str | Path, cwd: Path | None = None, path: str = "", timeout_s: float = 240
) -> subprocess.CompletedProcess[str]:
    """Run `fedmedgan-simulate` and return what it printed; never raises on an exit code."""
    command = [sys.executable, "-m", "simulations.cli", *map(str, arguments)]
    root = str(Path(__file__).resolve().parents[2])
    environment = ENVIRONMENT | {"PYTHONPATH": os.pathsep.join([path, root]) if path else root}
    return subprocess.run(
        command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=timeout_s, check=False
    )


@pytest.fixture(scope="session")  # its tests are one xdist_group: each process that runs one of them makes it anew
def finished_run(small_config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("finished") / "run"
    done = simulate("--config", small_config, "--out", out)
    assert done.returncode == 0, done.stderr
    return out
