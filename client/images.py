"""`fedmedgan-site check` and `import`: what is there and would be used, and bringing it into the home."""

import json
import sys
import time
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from client import policy
from client.home import Home, forget_elsewhere, import_images, load_images, practice_of
from client.intake import Dataset, Form
from client.intake.cautions import GROUPING, Caution, cautions
from client.intake.chunks import chunk_images
from client.intake.cost import estimate
from client.intake.forgetting import Forgotten
from client.intake.importing import DECODED, Imported, Progress
from client.intake.page import make_page_folder, save_page
from client.intake.records import parse_label
from client.intake.refusals import Reason
from client.intake.report import Listing, Report, make_report
from client.intake.selection import Practice, other_labels, shown_labels
from client.intake.shortage import too_few
from client.intake.sources import require_usable
from client.intake.survey import survey
from client.intake.twins import Twins, counted_pairs
from client.policy import Policy
from common.config import IMAGE_SIZES
from common.errors import ConfigError
from common.files import require_outside, write_atomic
from common.wording import counted, duration

_LEAST: int = Policy.model_fields["min_patients"].default
_BLOCK = 1024
_EVERY_S = 0.5
_EVERY_S_IN_A_LOG = 30.0

ShowFiles = Annotated[
    bool, typer.Option("--show-files", help="Show names of files, and labels in a log too: they may name patients.")
]
JsonFile = Annotated[Path | None, typer.Option("--json", help="Write the same as JSON to this file.")]


def check(
    path: Annotated[Path, typer.Argument(help="Folder or file of the images.")],
    home: Annotated[Path | None, typer.Option(help="A site's home: its policy and its rules of reading.")] = None,
    label: Annotated[str, typer.Option(help="auto, none, tag:KEYWORD, column:NAME or rules:FILE.")] = "auto",
    classes: Annotated[str | None, typer.Option(help="Class names of a run; without, any label will do.")] = None,
    json_file: JsonFile = None,
    report: Annotated[Path, typer.Option(help="Folder for the page and the contact sheet.")] = Path("intake-report"),
    show_files: ShowFiles = False,
    ocr: Annotated[bool, typer.Option("--ocr", help="Look for text in some pictures, with tesseract.")] = False,
) -> None:
    """Read everything as `import` would and keep nothing: counts, reasons, warnings, and pictures to look at.

    Page and contact sheet show patients. Exits 4 where nothing is usable, 9 where a decoder is missing that can be
    installed, 14 with too few patients, 15 where the images cannot be reached, 7 where the report cannot be written.
    """
    _require_places(home, json_file, report)
    make_page_folder(report)
    practice, rules = _practice(path, home, label)
    minimum = _LEAST if rules is None else rules.min_patients
    names = [name.strip() for name in classes.split(",")] if classes is not None else None
    found = survey(practice, names, show_files, ocr, progress())
    cost = estimate(found.report.patients, None if rules is None else rules.declared_patients)
    said = replace(found.report, cost=cost, min_patients=minimum)
    print("\n".join(said.lines()))
    if said.classes is None and found.labels:
        terminal = sys.stdout.isatty()
        where = ", on this terminal alone" if terminal else ""
        print(f"by label{where}: {shown_labels(found.labels, terminal or show_files)}")
    for written in save_page(report, said, found.rows, str(path) if show_files else ""):
        print(f"to look at, and to delete then: {written}")
    _write_json(json_file, said)
    others = other_labels(found.found, names, _may_name(show_files)) if names is not None else ""
    if not said.usable and not others:
        require_usable(found.found)
    if said.patients < minimum:
        raise too_few(said.patients, minimum, {group.said: group.count for group in said.refused}, others)
    _warn_of_labels(others)


def import_(
    home: Annotated[Path, typer.Argument(help="The site's home folder.")],
    classes: Annotated[str, typer.Option(help="Class names of the run, comma-separated, in its order.")],
    size: Annotated[int, typer.Option(help="Side of an image in pixels: 28, 32, 64 or 128.")] = 32,
    channels: Annotated[int, typer.Option(help="1: grey, colour becomes luminance; 3: colour, grey stays grey.")] = 1,
    json_file: JsonFile = None,
    show_files: ShowFiles = False,
) -> None:
    """Bring the site's images into its home, ready for a run; say what was refused and why.

    Run again it reads what is new or changed, and forgets what is gone. Exits as `check`; 7 also with a full disk.
    """
    opened = Home(home)
    _require_places(home, json_file)
    rules = policy.load(opened.policy)
    minimum = rules.min_patients
    names = [name.strip() for name in classes.split(",")]
    if size in IMAGE_SIZES and size not in rules.allowed_image_sizes:
        allowed = ", ".join(map(str, rules.allowed_image_sizes))
        print(f"warning: the policy allows runs of {allowed} px, not of {size}: none may use this set", file=sys.stderr)
    with _stoppable(Form(tuple(names), size, channels), progress()) as telling:
        done = import_images(opened, names, size, minimum, channels, telling, _may_name(show_files))
    counts = dict(zip(names, done.labels, strict=True))
    print(f"imported {counted(done.images, 'image')} of {counted(len(done.patients), 'patient')}")
    forgotten = forget_elsewhere(opened, done, opened.vault(names, size, channels), minimum)
    print("\n".join(_what_changed(done, forgotten)))
    twins = twins_in(load_images(opened, names, size, channels))
    said = _report(done, practice_of(opened), twins, counts, show_files)
    print("\n".join(said.lines()))
    _write_json(json_file, said)
    _warn_of_labels(_others(done, names, _may_name(show_files)))
    if absent := [name for name, count in counts.items() if not count]:
        print(f"warning: no image here has the class {', '.join(absent)}; check the spelling", file=sys.stderr)


def _what_changed(done: Imported, forgotten: Sequence[Forgotten]) -> list[str]:
    taken_up = f", and {done.taken_up} that an earlier import had decoded" if done.taken_up else ""
    unopened = f"{counted(done.unchanged, 'file')} that were not opened"
    said = [f"new or changed: {counted(done.added, 'image')}{taken_up}; unchanged: {unopened}"]
    if done.gone[0]:
        images, files = counted(done.gone[0], "image"), counted(done.gone[1], "file")
        said.append(f"gone: {images} of {files} no longer there or no longer used")
    if done.held:
        said.append(f"kept: {counted(done.held, 'file')} out of reach; mend the permissions and import again")
    for other in forgotten:
        state = "" if other.usable else "; too few patients are left for its use, import it again"
        named = f"{other.form.size} px x {other.form.channels} ({', '.join(other.form.classes)})"
        images = counted(other.images, "image")
        said.append(f"also gone: {images} of the set of {named}, whose files are gone or changed{state}")
    return said


def _may_name(show_files: bool) -> bool:
    """Return whether an error or a warning may name labels: where it goes to a terminal, or that was asked for."""
    return show_files or sys.stderr.isatty()


def _others(done: Imported, names: Sequence[str], show: bool) -> str:
    if (said := other_labels(done.found, names, show)) or not (count := done.refused.get(Reason.OTHER_LABEL, 0)):
        return said
    images = f"{counted(count, 'image')} {'has a label' if count == 1 else 'have labels'}"
    return f"{images} that no class of the run is, in files that were not opened again; `check --classes` shows which."


def _warn_of_labels(others: str) -> None:
    """Say which labels are no class: neither the JSON nor the page holds them."""
    if others:
        print(f"warning: {others}", file=sys.stderr)


def twins_in(dataset: Dataset) -> int:
    """Count pairs of nearly the same pictures of two patients in a training set."""
    twins = Twins()
    for start in range(0, len(dataset.images), _BLOCK):
        for place, square in enumerate(dataset.images[start : start + _BLOCK], start):
            twins.add(square, int(dataset.patients[place]), place)
    return len(twins.pairs())


def _report(done: Imported, practice: Practice, twins: int, classes: Mapping[str, int], show_files: bool) -> Report:
    partial = bool(done.unchanged or done.held)
    warnings = [Caution(GROUPING), *cautions(done.found.records, done.choice, practice, partial)]
    if twins:
        said = f"{counted_pairs(twins)} of nearly the same pictures under two patients: one person with two ids?"
        warnings.append(Caution(f"{said} See `check`."))
    root = practice.source if practice.source.is_dir() else practice.source.parent
    listing = Listing(done.found, root, show_files)
    return make_report(done.found, done.choice, done.lost, done.patients, classes, done.refused, warnings, listing)


def _practice(path: Path, home: Path | None, label: str) -> tuple[Practice, Policy | None]:
    parse_label(label)
    if home is None:
        return Practice(path, label), None
    practice = practice_of(Home(home))
    chosen = practice.label if label == "auto" else label
    return replace(practice, source=path, label=chosen), policy.load(Home(home).policy)


def _require_places(home: Path | None, json_file: Path | None, report: Path | None = None) -> None:
    """Refuse places for what is written before hours of reading, and all that stand in the home.

    Raises:
        ConfigError: One stands in the home, or the JSON file cannot stand where it is asked for.
    """
    for place in (json_file, report):
        if home is not None and place is not None:
            require_outside(home, place)
    if json_file is not None and json_file.is_dir():
        raise ConfigError(f"Expected --json {json_file} to be a file, it is a folder. Name a file in it.")
    if json_file is not None and not json_file.parent.is_dir():
        raise ConfigError(f"Expected the folder of --json {json_file} to be there. Make it first.")


def _write_json(path: Path | None, report: Report) -> None:
    if path is None:
        return
    tree: Mapping[str, Any] = report.as_json()
    write_atomic(path, (json.dumps(tree, indent=1, ensure_ascii=False) + "\n").encode(errors="backslashreplace"), 0o600)


def progress() -> Progress:
    """Return what tells on stderr how far reading is and how long it will take; the clock starts anew with each phase.

    Guarantees:
        - each_phase_has_its_clock: What was done before a phase makes it look neither slower nor longer.
    """
    terminal = sys.stderr.isatty()
    phase, before, began, last = "", 0, 0.0, 0.0

    def tell(what: str, done: int, total: int) -> None:
        nonlocal phase, before, began, last
        now = time.monotonic()
        if what != phase:
            phase, before, began, last = what, done - 1, now, now
        finished = done == total and terminal
        if not finished and now - last < (_EVERY_S if terminal else _EVERY_S_IN_A_LOG):
            return
        last = now
        rate = (done - before) / max(now - began, 1e-3)
        left = f" of {total}, {rate:.0f} a second, {duration((total - done) / rate)} left" if total else ""
        line = f"{what}: {done}{left or f', {rate:.0f} a second'}"
        print(f"\r{line:<70}" if terminal else line, end="" if terminal and not finished else "\n", file=sys.stderr)

    return tell


@contextmanager
def _stoppable(form: Form, progress: Progress) -> Generator[Progress]:
    """Say on Ctrl-C how much of an import is kept."""
    decoded, of = 0, 0

    def tell(what: str, done: int, total: int) -> None:
        nonlocal decoded, of
        if what == DECODED:
            decoded, of = done, total
        progress(what, done, total)

    try:
        yield tell
    except KeyboardInterrupt:
        kept = "no image had been read"
        if decoded:
            kept = f"{decoded} of {of} images were read, and are kept but for the last {chunk_images(form)} at most"
        print(f"\n{kept}; run the same command again to go on", file=sys.stderr)
        raise
