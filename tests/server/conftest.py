"""A coordinator's home with a link that answers as a test wants it."""

from contextlib import nullcontext
from pathlib import Path

import pytest

from server import control
from server.control import RunStatus
from tests.coordinator_home import enrol, make_home


@pytest.fixture
def runs() -> list[RunStatus]:
    """Return what the link of `hub` lists; a test may change it."""
    return []


@pytest.fixture
def hub(tmp_path: Path, runs: list[RunStatus], monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make a home with one site and a link that says that run-0001 is under way."""
    consortium = make_home(tmp_path / "hub")
    enrol(consortium, "st-mary")
    runs.append(RunStatus(7, "running", "", "", consortium.runs / "run-0001", "2026-11-27T07:00:00+00:00"))
    monkeypatch.setattr(control, "connect", lambda _: nullcontext())
    monkeypatch.setattr(control, "list_runs", lambda *_: list(runs))
    (tmp_path / "run.toml").write_text('[image]\nclasses = ["a"]\n')
    return consortium.folder
