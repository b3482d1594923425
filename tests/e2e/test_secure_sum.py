"""A whole run with secure-sum as a user starts it: three hospitals, a few rounds; resumed, told, recomputed."""

import json
import math
import shutil
import signal
import time
import tomllib
from pathlib import Path

import pytest
from safetensors.numpy import load_file

from common.files import write_atomic
from tests.e2e.conftest import SMALL, simulate
from tests.e2e.test_epsilon_recomputed import recompute
from tests.e2e.test_resume import _start

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.xdist_group("secure_sum")]

TOGETHER = (
    SMALL.replace("steps_per_round = 3", 'algorithm = "secure-sum"\nsteps_per_round = 1')
    .replace("rounds = 3", "rounds = 5")
    .replace("batch_patients = 8", "batch_patients = 16")
)
DISTRIBUTED = TOGETHER.replace("[warmup]", "colluding_sites = 1\n\n[warmup]")


def _run(folder: Path, text: str) -> Path:
    write_atomic(folder / "run.toml", text.encode())
    done = simulate("--config", folder / "run.toml", "--out", folder / "run")
    assert done.returncode == 0, done.stderr
    return folder / "run"


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _run(tmp_path_factory.mktemp("together"), TOGETHER)


@pytest.fixture(scope="module")
def distributed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _run(tmp_path_factory.mktemp("distributed"), DISTRIBUTED)


def test_epsilon_is_what_the_public_records_say(together: Path, distributed: Path) -> None:
    for run in (together, distributed):
        stated = json.loads((run / "privacy.json").read_text())
        recomputed = recompute(run)
        assert set(recomputed) == set(stated["sites"])
        for site, value in recomputed.items():
            assert 0.9 * 8.0 < value <= 8.0
            assert value == pytest.approx(stated["sites"][site]["epsilon_spent"], rel=2e-3)


def test_sample_rate_is_that_of_all_sites(together: Path) -> None:
    batch = tomllib.loads((together / "config.toml").read_text())["privacy"]["batch_patients"]
    for line in (together / "metrics.jsonl").read_text().splitlines()[1:]:
        releases = json.loads(line)["sites"].values()
        total = sum(release["declared_patients"] for release in releases)
        assert {(release["sample_rate"], release["steps"]) for release in releases} == {(batch / total, 1)}


def test_the_card_says_what_the_guarantee_rests_on(together: Path, distributed: Path) -> None:
    alone, shared = (json.loads((run / "privacy.json").read_text()) for run in (together, distributed))
    for card, parts in ((alone, 1), (shared, 2)):
        numbers = card["secure_sum"]
        assert (numbers["cohort_sites"], numbers["noise_shares"]) == (3, parts)
        assert numbers["noise_multiplier_of_a_share"] == numbers["noise_multiplier"] / math.sqrt(parts)
        releases = [release for site in card["sites"].values() for release in site["releases"]]
        of_rounds = [release for release in releases if release["kind"] == "gradient"]
        assert {release["noise_multiplier"] for release in of_rounds} == {numbers["noise_multiplier"]}
        assert "secure-sum" in card["mechanism"]["training"]
    assert alone["secure_sum"]["assumption"].startswith("none")
    assert "whatever" not in shared["trust_model"]
    assert "at most 1 of 3 sites" in shared["trust_model"]
    assert "in simulation only" in (distributed / "report.html").read_text()


def test_killed_after_a_round_it_ends_with_the_same_bytes(together: Path, tmp_path: Path) -> None:
    """Go back to the checkpoint before the last and finish again: the sites' last replies are still stored."""
    out = tmp_path / "copy"
    shutil.copytree(together, out, symlinks=True)
    (out / "checkpoints" / "round-000005.safetensors").unlink()
    for name in ("generator.safetensors", "generator.json", "privacy.json"):
        (out / name).unlink()
    done = simulate("--resume", "--out", out)
    assert done.returncode == 0, done.stderr
    for name in ("generator.safetensors", "checkpoints/round-000005.safetensors"):
        assert (out / name).read_bytes() == (together / name).read_bytes()
    assert (out / "metrics.jsonl").read_text().count("\n") == 6


def test_stopped_halfway_it_ends_with_the_same_bytes(together: Path, tmp_path: Path) -> None:
    """Some rounds in one process, the rest in another: what Adam and the average remember is in the checkpoint."""
    write_atomic(tmp_path / "run.toml", TOGETHER.encode())
    out = tmp_path / "run"
    process = _start("--config", tmp_path / "run.toml", "--out", out)
    while process.poll() is None and not (out / "checkpoints" / "round-000002.safetensors").exists():
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not (out / "generator.safetensors").exists()
    done = simulate("--resume", "--out", out)
    assert done.returncode == 0, done.stderr
    ours, theirs = (load_file(run / "generator.safetensors") for run in (out, together))
    assert {name: array.tobytes() for name, array in ours.items()} == {n: a.tobytes() for n, a in theirs.items()}


def test_a_configuration_that_does_not_fit_is_refused_by_name(tmp_path: Path) -> None:
    for text, words in (
        (TOGETHER.replace("steps_per_round = 1", "steps_per_round = 2"), "train.steps_per_round = 1"),
        (TOGETHER + '\n[server]\naggregation = "median"\n', "[server]"),
        (SMALL.replace("[warmup]", "colluding_sites = 1\n\n[warmup]"), "privacy.colluding_sites"),
        (DISTRIBUTED.replace("colluding_sites = 1", "colluding_sites = 3"), "below the number of sites, 3"),
    ):
        write_atomic(tmp_path / "run.toml", text.encode())
        done = simulate("--config", tmp_path / "run.toml", "--dry-run")
        assert done.returncode == 3, done.stderr
        assert words in done.stderr
