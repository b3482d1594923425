"""Pulls from a real Orthanc, each in a process of its own as a person starts it."""

import os
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest
from pydicom import Dataset, dcmread

from tests.real_pacs import (
    NEEDS_ORTHANC,
    REPOSITORY,
    Orthanc,
    command,
    instance_uids,
    kept,
    leftovers,
    make_files,
    pulled,
    run_pull,
    write_home,
    write_list,
)

pytestmark = [NEEDS_ORTHANC, pytest.mark.slow, pytest.mark.e2e]


def home_of(orthanc: Orthanc, folder: Path, **more: object) -> Path:
    home = folder / "home"
    home.mkdir()
    return write_home(home, get=orthanc.dimse(**more), move=orthanc.move(**more), web=orthanc.web(home, **more))


@pytest.mark.parametrize("kind", ["get", "move", "web"])
def test_pull_brings_what_is_asked_for_and_nothing_else(kind: str, orthanc: Orthanc, tmp_path: Path) -> None:
    home = home_of(orthanc, tmp_path)
    asked = write_list(tmp_path / "list.csv", "CANARY-ACC-1", "CANARY-ACC-2", "CANARY-ACC-9")
    ran = run_pull(home, kind, "--list", str(asked))
    assert ran.returncode == 4, ran.stdout + ran.stderr  # the PACS has nothing for the third line
    assert "not-found" in ran.stdout
    assert "(line 4)" in ran.stdout
    assert "expected 11 instances of 3 series; 0 were here, 11 received" in ran.stdout
    found = pulled(home)
    assert sorted(found) == sorted([*instance_uids("CANARY-ACC-1"), *instance_uids("CANARY-ACC-2")])
    stored = {str(dcmread(path).SOPInstanceUID): dcmread(path) for path in make_files(tmp_path)}
    for uid, path in found.items():
        assert dcmread(path).file_meta.TransferSyntaxUID == stored[uid].file_meta.TransferSyntaxUID  # RLE stays RLE
        assert differing(dcmread(path), stored[uid]) in ([], ["(FFFC,FFFC)"])  # padding, which Orthanc drops
    assert leftovers(home) == []
    assert_nothing_told(home, ran.stdout + ran.stderr)


def differing(one: Dataset, other: Dataset) -> list[str]:
    return [str(tag) for tag in one.keys() | other.keys() if one.get(tag) != other.get(tag)]


def assert_nothing_told(home: Path, said: str) -> None:
    """No identifier in what was printed, logged or noted, nor in the names of files; no password either."""
    notes = [path for path in home.rglob("*") if path.is_file() and path.suffix in (".log", ".json")]
    assert {path.name for path in notes} >= {"pull.log"}
    names = [str(path.relative_to(home)) for path in home.rglob("*")]
    for text in (said, *names, *(path.read_text() for path in notes)):
        assert not re.search(r"canary|1\.2\.826|HOSPITAL", text, re.IGNORECASE), text


@pytest.mark.parametrize("kind", ["move", "web"])
def test_pull_that_was_killed_goes_on_and_brings_nothing_twice(kind: str, orthanc: Orthanc, tmp_path: Path) -> None:
    home = home_of(orthanc, tmp_path, per_minute=600)
    asked = write_list(tmp_path / "list.csv", "CANARY-ACC-2", "CANARY-ACC-3")
    process = subprocess.Popen(command(home, kind, "--list", str(asked)), cwd=REPOSITORY, stdout=subprocess.DEVNULL)
    end = time.monotonic() + 30
    while len(kept(home)) < 6 and time.monotonic() < end:
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    before = {uid: path.stat() for uid, path in pulled(home).items()}
    assert 6 <= len(before) < 26
    write_home(home, get=orthanc.dimse(), move=orthanc.move(), web=orthanc.web(home))
    ran = run_pull(home, kind, "--list", str(asked))
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert f"expected 26 instances of 2 series; {len(before)} were here, {26 - len(before)} received" in ran.stdout
    after = pulled(home)
    assert len(after) == 26
    for uid, stat in before.items():
        assert (after[uid].stat().st_ino, after[uid].stat().st_mtime_ns) == (stat.st_ino, stat.st_mtime_ns)
    assert leftovers(home) == []


def test_dry_run_counts_and_echo_answers(orthanc: Orthanc, tmp_path: Path) -> None:
    home = home_of(orthanc, tmp_path)
    rows = ("CANARY-PAT-A,HOSPITAL,CT,2024-01-01,2024-01-02", "CANARY-PAT-B,HOSPITAL,,,")
    asked = write_list(tmp_path / "list.csv", *rows, header="patient,issuer,modality,from,to")
    ran = run_pull(home, "web", "--list", str(asked), "--dry-run", "--show-ids")
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert "line 2 (CANARY-PAT-A): 1 series, 6 instances, 0 of them here" in ran.stdout
    assert pulled(home) == {}
    echoed = run_pull(home, "move", "--echo")
    assert echoed.returncode == 0
    assert f"C-ECHO answered by ORTHANC at 127.0.0.1:{orthanc.dicom}" in echoed.stdout
    assert_nothing_told(home, echoed.stdout)
