"""The main job as a user runs it, and what it leaves behind."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.e2e.conftest import simulate

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.xdist_group("finished_run")]


def test_run_folder_is_complete(finished_run: Path) -> None:
    for name in (
        "generator.safetensors",
        "generator.json",
        "metrics.jsonl",
        "privacy.json",
        "config.toml",
        "report.html",
    ):
        assert (finished_run / name).stat().st_size > 0, name
    assert sorted(path.name for path in (finished_run / "checkpoints").iterdir()) == [
        f"round-{number:06d}.safetensors" for number in (1, 2, 3)
    ]
    sheets = {path.name for path in (finished_run / "samples").iterdir()}
    assert {"round-0000.png", "round-0003.png", "class-clear.png", "class-effusion.png"} <= sheets


def test_generator_json_says_what_a_user_needs(finished_run: Path) -> None:
    info = json.loads((finished_run / "generator.json").read_text())
    assert info["image"]["classes"] == ["clear", "opacity", "nodule", "effusion"]
    assert info["value_range"] == [-1.0, 1.0]
    assert len(info["config_digest"]) == 64
    assert set(info["epsilon_by_site"]) == {"hospital-01", "hospital-02", "hospital-03"}
    assert max(info["epsilon_by_site"].values()) <= 8.0


def test_hospitals_read_real_dicom_from_their_own_folders(finished_run: Path) -> None:
    folders = [finished_run / "hospitals" / f"hospital-{n:02d}" / "data" for n in (1, 2, 3)]
    patients = [{path.parent.name for path in folder.rglob("*.dcm")} for folder in folders]
    assert all(patients)
    assert not patients[0] & patients[1]
    assert not patients[1] & patients[2]


def test_report_needs_no_network(finished_run: Path) -> None:
    html = (finished_run / "report.html").read_text()
    assert not re.search(r"""(src|href)\s*=\s*["'](?!data:|#)""", html)
    assert "@import" not in html
    assert "data:image/png;base64," in html


def test_one_line_a_round_without_a_terminal(small_config: Path, tmp_path: Path) -> None:
    done = simulate("--config", small_config, "--out", tmp_path / "run", "--rounds", "2")
    assert done.returncode == 0, done.stderr
    assert [line.split()[1].split("/")[0] for line in done.stdout.splitlines() if line.startswith("round ")] == [
        "0",
        "1",
        "2",
    ]


def test_generate_png_and_npz(finished_run: Path, tmp_path: Path) -> None:
    for form in ("png", "npz"):
        done = simulate(
            "generate",
            finished_run,
            "--count",
            "8",
            "--labels",
            "nodule,clear",
            "--format",
            form,
            "--out",
            tmp_path / form,
        )
        assert done.returncode == 0, done.stderr
    images = sorted((tmp_path / "png").rglob("*.png"))
    assert len(images) == 8
    with Image.open(images[0]) as image:
        assert image.size == (28, 28)
    with np.load(tmp_path / "npz" / "samples.npz", allow_pickle=False) as arrays:
        assert arrays["images"].shape == (8, 28, 28)
        assert arrays["images"].dtype == np.uint8
        assert set(arrays["labels"].tolist()) == {0, 2}


def test_generate_is_reproducible_by_seed(finished_run: Path, tmp_path: Path) -> None:
    for name, seed in (("a", "5"), ("b", "5"), ("c", "6")):
        simulate("generate", finished_run, "--count", "4", "--seed", seed, "--format", "npz", "--out", tmp_path / name)
    first, second, third = ((tmp_path / name / "samples.npz").read_bytes() for name in "abc")
    assert first == second
    assert first != third


def test_dry_run_prints_the_plan_and_writes_nothing(small_config: Path, tmp_path: Path) -> None:
    done = simulate("--config", small_config, "--dry-run", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for word in ("hospital-03", "patients", "q", "sigma", "steps", "epsilon", "bytes per round"):
        assert word in done.stdout
    assert list(tmp_path.iterdir()) == []


def test_print_config_reads_back(small_config: Path, tmp_path: Path) -> None:
    first = simulate("--config", small_config, "--epsilon", "3", "--print-config")
    (tmp_path / "all.toml").write_text(first.stdout)
    second = simulate("--config", tmp_path / "all.toml", "--print-config")
    assert first.stdout == second.stdout
    assert "epsilon = 3.0" in first.stdout


def test_ledger_and_journal_hold_every_release(finished_run: Path) -> None:
    from client import journal
    from client.home import Home
    from client.ledger import open_ledger
    from common.crypto import load_key

    records = [json.loads(line) for line in (finished_run / "metrics.jsonl").read_text().splitlines()]
    for name in ("hospital-01", "hospital-02", "hospital-03"):
        home = Home(finished_run / "hospitals" / name)
        key = load_key(home.key)
        released = journal.entries(home.journal, key.verify_key)
        assert [entry.round for entry in released] == [0, 1, 2, 3]
        assert len(open_ledger(home.ledger, key).entries) == 4
        assert [entry.epsilon_after for entry in released] == [r["sites"][name]["epsilon_spent"] for r in records]
