"""The run folder: where a run's files are, and whether a run may start or go on in it.

config.toml             the whole effective configuration
run.json                the run's id and state
handshake.json          what each site said before it was asked: versions, how many rounds it will join
cohort.json             with secure-sum: who takes part, with the declared patients
looks.json              what each release of the warm-up looks at, as it was first asked
start/                  the generator that the run starts from, if it was trained on public data before
checkpoints/            one file a round, the last three
metrics.jsonl           one line a round
failed.jsonl            what sites released in attempts at a round that too few answered: charged all the same
now.txt                 with a coordinator, while the run is at work: what it does at this moment
declared.json           with a coordinator: what each site spent, as it declared with its newest release
samples/                sheets of the same latents over the first fit and the rounds
generator.safetensors   the result, with generator.json
privacy.json            the guarantee, per site
report.html             everything to look at, in one file
"""

import json
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, final

from common.config import Config
from common.config_text import build_config, read_config, to_toml
from common.errors import FedmedganError, ResumeError, WireError
from common.files import make_folder, read_bounded, write_atomic

MAX_NOTE_BYTES = 65_536
MAX_FIXED_BYTES = 4 * 2**20
FIXED_VERSION = 1
STORAGE_MATTER = "storage: "
"""So begins why a run failed whose files could not be read or written."""
FREE_SECTIONS = frozenset({"run", "performance"})
"""Sections that may change between start and resume, since they change where and how fast, never what."""

Fixed = TypeVar("Fixed", int, str)


@final
@dataclass(frozen=True)
class RunFolder:
    """A run's folder and id."""

    path: Path
    run_id: str

    @property
    def lock(self) -> Path:
        """Return the path of the lock that a run between machines holds."""
        return self.path / "run.lock"

    @property
    def checkpoints(self) -> Path:
        """Return the folder of the checkpoints."""
        return self.path / "checkpoints"

    @property
    def metrics(self) -> Path:
        """Return the path of the round records."""
        return self.path / "metrics.jsonl"

    @property
    def looks(self) -> Path:
        """Return the path of what the releases of the warm-up look at."""
        return self.path / "looks.json"

    @property
    def failed(self) -> Path:
        """Return the path of the records of attempts that changed nothing, but were paid for."""
        return self.path / "failed.jsonl"

    @property
    def now(self) -> Path:
        """Return the path of the line that says what a run between machines does at this moment."""
        return self.path / "now.txt"

    @property
    def declared(self) -> Path:
        """Return the path of what sites declared to a run between machines with their newest releases."""
        return self.path / "declared.json"

    @property
    def samples(self) -> Path:
        """Return the folder of the sample sheets."""
        return self.path / "samples"


def write_fixed(path: Path, key: str, values: Mapping[str, Any]) -> None:
    """Keep what a run fixes before it asks anybody, so that every later question is the same.

    Raises:
        StorageError: The file cannot be written.
    """
    write_atomic(path, json.dumps({"version": FIXED_VERSION, key: values}).encode())


def read_fixed(path: Path, key: str, kind: type[Fixed]) -> dict[str, Fixed]:
    """Return what a run has fixed, by name; nothing where there is no file.

    Raises:
        ResumeError: The file does not read, or is of another version.
    """
    if not path.exists():
        return {}
    try:
        stored = json.loads(read_bounded(path, MAX_FIXED_BYTES))
        if stored["version"] != FIXED_VERSION:
            raise ResumeError(
                f"Expected {path.name} of version {FIXED_VERSION}. Resume with the release that wrote it."
            )
        return {str(name): kind(value) for name, value in stored[key].items()}
    except (WireError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ResumeError(
            f"{path.name} of the run folder does not read. If no site has been asked yet, delete it; else start anew."
        ) from error


def is_complete(path: Path) -> bool:
    """Return whether a run's results stand in its folder: the report is written last."""
    return (path / "report.html").exists()


def read_now(path: Path) -> str:
    """Return what the run in a folder does at this moment, in words; nothing where it does not say."""
    return _text(RunFolder(path, "").now).strip()


def site_run_id(path: Path) -> str:
    """Return the id by which the sites' ledgers and journals name the run in a folder; empty before it has begun."""
    try:
        return str(json.loads(_text(path / "run.json"))["run_id"])
    except (ValueError, KeyError, TypeError):
        return ""


def _text(path: Path) -> str:
    try:
        return read_bounded(path, MAX_NOTE_BYTES).decode(errors="replace")
    except (FedmedganError, OSError):
        return ""


def next_folder(parent: Path) -> Path:
    """Return the path of the next run folder (run-0001, run-0002, …) below `parent`."""
    numbers = [int(path.name[4:]) for path in parent.glob("run-[0-9]*") if path.name[4:].isdigit()]
    return parent / f"run-{max(numbers, default=0) + 1:04d}"


def latest_folder(parent: Path) -> Path:
    """Return the newest run folder below `parent`.

    Raises:
        ResumeError: There is none.
    """
    folders = sorted(parent.glob("run-[0-9]*"))
    if not folders:
        raise ResumeError(f"No run stands in {parent}. Name the folder with --out, or start without --resume.")
    return folders[-1]


def stored_tree(path: Path) -> dict[str, Any]:
    """Return the configuration that a run started with, as plain values.

    Raises:
        ResumeError: No run stands there.
    """
    if not (path / "config.toml").exists() or not (path / "run.json").exists():
        raise ResumeError(f"No run stands in {path}. Name a run folder with --out, or start without --resume.")
    return read_config(path / "config.toml")


def open_run(path: Path, config: Config, resume: bool) -> RunFolder:
    """Start a run in a folder, or take up the one that stands there.

    Args:
        path: The folder; made when it does not exist.
        config: The whole effective configuration.
        resume: Take up instead of start.

    Raises:
        ResumeError: A run stands there and `resume` is false; or none stands there, or it has another configuration.
        StorageError: The folder cannot be written.
    """
    if resume:
        _check_same(path, config)
        run_id = json.loads((path / "run.json").read_text(encoding="utf-8"))["run_id"]
        return RunFolder(make_folder(path), run_id)
    if (path / "run.json").exists():
        raise ResumeError(f"A run stands in {path} already. Add --resume to go on with it, or choose another --out.")
    folder = RunFolder(make_folder(path), secrets.token_hex(8))
    make_folder(folder.checkpoints)
    make_folder(folder.samples)
    write_atomic(path / "config.toml", to_toml(config).encode())
    write_atomic(path / "run.json", json.dumps({"version": 1, "run_id": folder.run_id}).encode())
    return folder


def prepare_run(path: Path, config: Config) -> Path:
    """Write the configuration of a run that another process shall start, and return the file.

    Args:
        path: The run folder; made.
        config: The whole effective configuration.

    Raises:
        StorageError: The folder cannot be written.
    """
    write_atomic(make_folder(path) / "config.toml", to_toml(config).encode())
    return path / "config.toml"


def _check_same(path: Path, config: Config) -> None:
    stored = build_config(stored_tree(path))
    different = [
        f"{section}.{key} = {_short(old)} there, {_short(getattr(getattr(config, section), key))} here"
        for section in Config.model_fields
        if section not in FREE_SECTIONS
        for key, old in getattr(stored, section)
        if old != getattr(getattr(config, section), key)
    ]
    if different:
        raise ResumeError(
            f"The run in {path} has another configuration: {'; '.join(different)}. "
            "Resume without these flags, or start a new run with another --out."
        )


def _short(value: Mapping[str, Any] | Any) -> str:
    return json.dumps(value, default=str)
