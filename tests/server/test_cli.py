"""The coordinator's listings."""

from pathlib import Path
from typing import get_args

import pytest

from common.config import IMAGE_SIZES, ModelName
from common.config_text import build_config
from common.errors import ExitCode
from common.lock import alone
from server.cli import main
from server.rounds import round_bytes


def test_models_lists_what_a_round_sends(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["models"])
    assert stopped.value.code == 0
    printed = capsys.readouterr().out
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in printed.splitlines() if line.startswith("│")]
    assert [(row[0], int(row[1])) for row in rows] == [
        (name, size) for name in get_args(ModelName) for size in IMAGE_SIZES
    ]
    together = {"train.algorithm": "secure-sum", "train.steps_per_round": 1}
    for name, size, *_, local, halved, sum_of_all in rows:
        changes = {"model.name": name, "image.size": int(size), "image.classes": ("a", "b")}
        assert int(local.replace(",", "")) == round_bytes(build_config({}, changes))
        half = build_config({}, changes | {"federation.transport": "float16"})
        assert int(halved.replace(",", "")) == round_bytes(half) == int(local.replace(",", "")) / 2
        assert int(sum_of_all.replace(",", "")) == round_bytes(build_config({}, changes | together))


def test_resume_says_where_there_is_nothing_to_go_on_with(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def resumed(folder: Path) -> str:
        with pytest.raises(SystemExit) as stopped:
            main(["resume", str(tmp_path / "hub"), str(folder)])
        assert stopped.value.code == ExitCode.RESUME
        return capsys.readouterr().err

    assert "is no folder of a run" in resumed(tmp_path)
    (tmp_path / "config.toml").touch()
    with alone(tmp_path / "run.lock", "run"):
        assert "is at work" in resumed(tmp_path)
    (tmp_path / "report.html").touch()
    assert "is complete" in resumed(tmp_path)
