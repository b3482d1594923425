"""What bad input gets: a message with what, value, bound and what to do, a documented exit code, nothing lost."""

import csv
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from simulations.cli import main

SMALL = ["--sites", "2", "--dry-run"]


def _run(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> tuple[int, str]:
    with pytest.raises(SystemExit) as stopped:
        main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err
    return int(stopped.value.code or 0), captured.err


def _npz(path: Path, patients: int = 60, **changes: object) -> Path:
    rng = np.random.default_rng(0)
    arrays: dict = {
        "images": rng.integers(0, 255, (patients, 28, 28), dtype=np.uint8),
        "labels": np.arange(patients) % 2,
        "patient_id": np.array([f"p{i}" for i in range(patients)]),
    } | changes
    np.savez(path, **{name: array for name, array in arrays.items() if array is not None})
    return path


def test_missing_path(capsys, tmp_path) -> None:
    code, text = _run(capsys, "--data", tmp_path / "none", *SMALL)
    assert code == 15
    assert "does not exist" in text


def test_a_start_for_a_run_without_classes(capsys, tmp_path) -> None:
    (tmp_path / "run.toml").write_text("[image]\nsize = 32\n")
    code, text = _run(capsys, "pretrain", tmp_path / "run.toml", "--out", tmp_path / "start")
    assert code == 3
    assert "Expected image.classes in" in text
    assert not (tmp_path / "start").exists()


def test_empty_folder(capsys, tmp_path) -> None:
    (tmp_path / "empty").mkdir()
    code, text = _run(capsys, "--data", tmp_path / "empty", *SMALL)
    assert code == 4
    assert "empty" in text.lower() or "no " in text.lower()


def test_all_files_unreadable(capsys, tmp_path) -> None:
    for number in range(3):
        (tmp_path / f"{number}.dcm").write_bytes(b"\0" * 128 + b"DICM" + b"\xff" * 50)
    code, text = _run(capsys, "--data", tmp_path, *SMALL)
    assert code == 4
    assert "3" in text


def test_no_patient_ids(capsys, tmp_path) -> None:
    code, text = _run(capsys, "--data", _npz(tmp_path / "a.npz", patient_id=None), *SMALL)
    assert code == 4
    assert "patient" in text


def test_labels_missing(capsys, tmp_path) -> None:
    code, text = _run(capsys, "--data", _npz(tmp_path / "a.npz", labels=None), *SMALL)
    assert code == 4
    assert "--label none" in text


def test_sizes_that_disagree(capsys, tmp_path) -> None:
    code, text = _run(capsys, "--data", _npz(tmp_path / "a.npz", labels=np.zeros(7)), *SMALL)
    assert code == 4
    assert "7" in text
    assert "60" in text


def test_one_patient(capsys, tmp_path) -> None:
    code, text = _run(
        capsys, "--data", _npz(tmp_path / "a.npz", 40, patient_id=np.array(["p"] * 40)), "--sites", "1", "--dry-run"
    )
    assert code == 4
    assert "found 1" in text


def test_fewer_patients_than_min_patients(capsys, tmp_path) -> None:
    data = _npz(tmp_path / "a.npz", patients=16)
    code, text = _run(capsys, "--data", data, "--sites", "2", "--partition", "iid", "--out", tmp_path / "run")
    assert code == 4
    assert "min_patients=20" in text
    assert "TOML" in text


def test_nan_pixels_are_counted_and_skipped(capsys, tmp_path) -> None:
    images = np.random.default_rng(0).random((60, 28, 28)).astype(np.float32)
    images[:3] = np.nan
    from client.intake import scan
    from tests.client.intake.pictures import read

    found = scan(_npz(tmp_path / "a.npz", images=images))
    dataset, refused = read(found, ("0", "1"), 28)
    assert len(dataset.images) == 57
    assert sum(refused.values()) == 3


def test_unreadable_png_is_skipped_and_the_rest_used(capsys, tmp_path) -> None:
    rows = []
    for number in range(50):
        Image.fromarray(np.full((30, 30), number * 5, np.uint8)).save(tmp_path / f"{number}.png")
        rows.append((f"{number}.png", f"p{number}", str(number % 2)))
    (tmp_path / "3.png").write_bytes(b"not a picture")
    with (tmp_path / "index.csv").open("w", newline="") as handle:
        csv.writer(handle).writerows([("file", "patient", "label"), *rows])
    code, text = _run(capsys, "--data", tmp_path, *SMALL)
    assert code == 0, text


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--epsilon", "0"], 3, ["privacy.epsilon=0", "greater than 0"]),
        (["--epsilon", "-2"], 3, ["privacy.epsilon=-2"]),
        (["--epsilon", "nan"], 3, ["privacy.epsilon"]),
        (["--delta", "1.5"], 3, ["privacy.delta=1.5"]),
        (["--size", "30"], 3, ["image.size=30", "28"]),
        (["--channels", "2"], 3, ["image.channels=2", "1 or 3"]),
        (["--sites", "0"], 3, ["simulation.sites=0"]),
        (["--partition", "diriclet:1"], 3, ["dirichlet:ALPHA"]),
        (["--model", "biggan"], 3, ["model.name", "dcgan"]),
        (["--epsilom", "3"], 2, ["--epsilon"]),
        (["--rounds", "many"], 2, ["--rounds"]),
        (["generat"], 2, ["generate"]),
    ],
)
def test_wrong_flags(capsys, arguments: list[str], code: int, words: list[str]) -> None:
    got, text = _run(capsys, *arguments)
    assert got == code, text
    for word in words:
        assert word in text


@pytest.mark.parametrize("with_data", [True, False])
def test_a_class_that_no_patient_has(capsys, tmp_path, with_data: bool) -> None:
    (tmp_path / "c.toml").write_text('[image]\nclasses = ["0", "nodule", "glioma"]\n')
    data = ["--data", _npz(tmp_path / "a.npz")] if with_data else []
    code, text = _run(capsys, "--config", tmp_path / "c.toml", "--out", tmp_path / "run", *data, "--sites", "2")
    assert code == 3
    absent = "'nodule', 'glioma'" if with_data else "'0', 'glioma'"
    assert f"got {absent}, which no patient has" in text
    assert ("The labels are '0', '1'." if with_data else "'clear'") in text
    assert not (tmp_path / "run").exists()


def test_unknown_key_in_the_toml(capsys, tmp_path) -> None:
    (tmp_path / "c.toml").write_text("[privacy]\nepsylon = 3\n")
    code, text = _run(capsys, "--config", tmp_path / "c.toml", "--dry-run")
    assert code == 3
    assert "privacy.epsilon" in text


def test_delta_above_one_over_n_is_a_warning_that_says_why(capsys, tmp_path) -> None:
    data = _npz(tmp_path / "a.npz")
    code, text = _run(capsys, "--data", data, "--sites", "1", "--partition", "iid", "--delta", "0.05", "--dry-run")
    assert code == 0
    assert "warning" in text
    assert "outright" in text


def test_resume_where_no_run_stands(capsys, tmp_path) -> None:
    code, text = _run(capsys, "--resume", "--out", tmp_path / "none")
    assert code == 6
    assert "without --resume" in text


def test_unwritable_folder(capsys, tmp_path) -> None:
    (tmp_path / "file").write_text("")
    code, text = _run(capsys, "--data", _npz(tmp_path / "a.npz"), "--sites", "1", "--out", tmp_path / "file" / "run")
    assert code == 7
    assert "Choose another folder" in text


def test_generate_from_no_run(capsys, tmp_path) -> None:
    code, text = _run(capsys, "generate", tmp_path, "--out", tmp_path / "images")
    assert code == 6
    assert "generator" in text


def test_set_changes_any_key_and_names_an_unknown_one(capsys) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["--set", "train.ema_decay=0.25", "--set", "privacy.epsilon=2", "--epsilon", "3", "--print-config"])
    told = capsys.readouterr().out
    assert stopped.value.code == 0
    assert "ema_decay = 0.25" in told
    assert "epsilon = 3.0" in told
    code, text = _run(capsys, "--set", "train.ema_deca=0.25", "--dry-run")
    assert code == 3
    assert "train.ema_decay" in text
    code, text = _run(capsys, "--set", "ema_decay=0.25", "--dry-run")
    assert code == 3
    assert "SECTION.KEY=VALUE" in text
