"""Real images by `--data`: chest X-rays by patient, digits by image. Skipped where the shared data are absent."""

import json
import re
from pathlib import Path

import pytest

from tests.e2e.conftest import simulate

pytestmark = [pytest.mark.e2e, pytest.mark.slow]

DATA = Path(__file__).resolve().parents[2].parent / "shared" / "data"
KERMANY = DATA / "kermany_cxr" / "kermany64.npz"
MNIST = DATA / "mnist" / "mnist.npz"


@pytest.mark.skipif(not KERMANY.exists(), reason="needs ../shared/data/kermany_cxr")
def test_chest_x_rays_at_epsilon_10_are_of_use(tmp_path: Path) -> None:
    (tmp_path / "short.toml").write_text("[warmup]\nsteps = 200\n\n[performance]\nthreads = 1\n")
    out = tmp_path / "run"
    flags = ["--data", KERMANY, "--sites", "5", "--size", "32", "--epsilon", "10", "--rounds", "1", "--out", out]
    done = simulate("--config", tmp_path / "short.toml", *flags, timeout_s=290)
    assert done.returncode == 0, done.stderr
    evaluation = json.loads((out / "evaluation.json").read_text())
    assert evaluation["held_out_patients"] == 283
    assert evaluation["tstr_auc"] > 0.93  # a shorter fit than the default's, which reaches 0.97


@pytest.mark.skipif(not MNIST.exists(), reason="needs ../shared/data/mnist")
def test_digits_are_their_own_patients() -> None:
    done = simulate("--data", MNIST, "--sites", "4", "--size", "28", "--model", "mlp", "--dry-run")
    assert done.returncode == 0, done.stderr
    rows = re.findall(r"hospital-\d+\s*│\s*(\d+)\s*│\s*(\d+)", done.stdout)
    assert len(rows) == 4
    assert all(patients == images for patients, images in rows)
    assert sum(int(patients) for patients, _ in rows) == 48_000
