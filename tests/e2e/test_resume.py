"""kill -9 at any point, resume, and end with the same generator bit for bit."""

import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.e2e.conftest import ENVIRONMENT, simulate

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.xdist_group("finished_run")]

ROOT = Path(__file__).resolve().parents[2]


def _start(*arguments: str | Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "simulations.cli", *map(str, arguments)]
    environment = ENVIRONMENT | {"PYTHONPATH": str(ROOT)}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_killed_at_random_points_ends_with_the_same_generator(
    finished_run: Path, small_config: Path, tmp_path: Path
) -> None:
    whole_s, out, clock = 12.0, tmp_path / "run", random.Random(7)
    kills, arguments = 0, ["--config", small_config, "--out", out]
    while True:
        process = _start(*arguments)
        try:
            # imports take seconds in which nothing happens; after them every moment is as likely
            _, errors = process.communicate(timeout=clock.uniform(3.0, whole_s) if kills < 5 else 240)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.communicate()
            kills += 1
            if (out / "run.json").exists():
                arguments = ["--resume", "--out", out]
            continue
        assert process.returncode == 0, errors
        break
    assert kills >= 2
    for name in ("generator.safetensors",):
        assert (out / name).read_bytes() == (finished_run / name).read_bytes()
    assert (out / "metrics.jsonl").read_text().count("\n") == 4


def test_resume_of_a_finished_run_changes_nothing(finished_run: Path, tmp_path: Path) -> None:
    out = tmp_path / "copy"
    shutil.copytree(finished_run, out, symlinks=True)
    before = (out / "generator.safetensors").read_bytes()
    done = simulate("--resume", "--out", out)
    assert done.returncode == 0, done.stderr
    assert (out / "generator.safetensors").read_bytes() == before


def test_interrupt_finishes_the_round_and_says_how_to_resume(small_config: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    process = _start("--config", small_config, "--out", out, "--rounds", "40")
    deadline = time.monotonic() + 120
    while not list((out / "checkpoints").glob("*")) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=120)
    assert process.returncode == 130, stderr
    assert "finishing the round" in stderr
    assert f"--resume --out {out}" in stdout
    lines = (out / "metrics.jsonl").read_text().splitlines()
    assert 1 <= len(lines) < 41
    assert f"round-{len(lines) - 1:06d}.safetensors" in {path.name for path in (out / "checkpoints").iterdir()}


def test_resume_with_another_configuration_names_the_keys(finished_run: Path) -> None:
    done = simulate("--resume", "--out", finished_run, "--epsilon", "3", "--rounds", "9")
    assert done.returncode == 6
    assert "privacy.epsilon = 8.0 there, 3.0 here" in done.stderr
    assert "federation.rounds = 3 there, 9 here" in done.stderr


def test_start_in_a_run_folder_is_refused(finished_run: Path, small_config: Path) -> None:
    done = simulate("--config", small_config, "--out", finished_run)
    assert done.returncode == 6
    assert "--resume" in done.stderr
