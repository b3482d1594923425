"""Pulls from a real Orthanc, each in a process of its own as a person starts it."""

from pathlib import Path

import pytest
from pydicom import dcmread

from tests.real_pacs import (
    NEEDS_ORTHANC,
    SERIES,
    Orthanc,
    instance_uids,
    leftovers,
    pulled,
    run_pull,
    write_home,
    write_list,
)

pytestmark = [NEEDS_ORTHANC, pytest.mark.slow, pytest.mark.e2e]

KINDS = ("get", "move", "web")


def home_of(orthanc: Orthanc, folder: Path, **more: object) -> Path:
    home = folder / "home"
    home.mkdir()
    sources = {
        "get": orthanc.dimse(**more),
        "move": orthanc.move(**more),
        "web": orthanc.web(home, **more),
    }
    return write_home(home, **sources)


@pytest.mark.parametrize("kind", KINDS)
def test_pull_brings_what_is_asked_for_and_nothing_else(kind: str, orthanc: Orthanc, tmp_path: Path) -> None:
    home = home_of(orthanc, tmp_path)
    asked = write_list(tmp_path / "list.csv", "CANARY-ACC-1", "CANARY-ACC-2", "CANARY-ACC-9")
    ran = run_pull(home, kind, "--list", str(asked))
    assert ran.returncode == 4, ran.stdout + ran.stderr  # the PACS has nothing for the third line
    assert "not-found" in ran.stdout
    assert "line 4" in ran.stdout
    assert "expected 11 instances of 3 series; 0 were here, 11 received" in ran.stdout
    wanted = [*instance_uids("CANARY-ACC-1"), *instance_uids("CANARY-ACC-2")]
    assert sorted(pulled(home)) == sorted(wanted)
    assert leftovers(home) == []
