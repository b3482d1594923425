"""`fedmedgan-site`: what a hospital does with its agent's home. Joining: client/membership; relay, `start`: operate."""

import json
import os
import signal
import sys
import threading
from functools import partial
from pathlib import Path
from typing import Annotated, NoReturn

import typer
from pydantic import ValidationError
from rich.console import Console
from rich.table import Table

from client import budget, images, journal, operate, policy
from client.agent import open_site
from client.doctor.command import doctor
from client.home import Home, create_home, require_books, require_images
from client.intake.records import parse_label
from client.joining import has_joined, load_pinned
from client.ledger import Ledger, read_ledger
from client.logs import log_to
from client.membership import HomeArgument, add_commands
from client.passphrase import ask_new, obtain
from client.paths import require_closed_home, require_home
from client.policy import Policy
from client.serve import LONGEST_REQUEST_S, serve
from client.site_config import SiteConfig, head_copy
from client.verify import export_journal, read_export, verify_home
from common.command import run_command
from common.config import Proposal
from common.config_text import build_config, read_config
from common.crypto import load_verify_key
from common.errors import ConfigError, ExitCode, IntakeError, StorageError, UnreadableSource
from common.files import require_outside, write_atomic
from common.lock import beside
from common.plan import delta_warning
from common.privacy import epsilon
from common.secure_sum import Cohort, parse_cohort

app = typer.Typer(
    add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode="markdown"
)

records = typer.Typer(no_args_is_help=True, help="Show, verify or export the record of every release.")
app.add_typer(records, name="journal")
add_commands(app)
app.registered_commands += operate.app.registered_commands
app.command("doctor")(doctor)
app.command("check")(images.check)
app.command("import")(images.import_)

_UNNAMED = ("all",)
"""The classes of a planned run whose configuration names none."""


@app.command()
def init(
    home: HomeArgument,
    name: Annotated[str, typer.Option(help="The site's name, public.")],
    data: Annotated[Path, typer.Option(help="Folder of DICOM or PNG/JPEG, or an NPZ.")],
    patients: Annotated[
        int, typer.Option(min=2, help="The rounded number of patients that the site declares, public.")
    ],
    max_epsilon: Annotated[float, typer.Option(help="What may ever be spent on this data set.")] = 10.0,
    delta: Annotated[float, typer.Option(help="The delta of the guarantee.")] = 1e-5,
    label: Annotated[str, typer.Option(help="auto, none, tag:KEYWORD, column:NAME or rules:FILE.")] = "auto",
    head_copy: Annotated[
        Path | None, typer.Option(help="File outside the home for a copy of the ledger's head: shows a roll-back.")
    ] = None,
    passphrase: Annotated[
        bool, typer.Option("--passphrase", help="Keep the identity key under one; asked twice.")
    ] = False,
) -> None:
    """Make a site's home: keys, policy, an empty ledger and journal."""
    try:
        rules = Policy(site=name, declared_patients=patients, max_epsilon=max_epsilon, delta=delta)
    except ValidationError as error:
        wrong = "; ".join(
            f"{item['loc'][0]}={item['input']!r}: {_said(item['type'], item['msg'])}" for item in error.errors()
        )
        raise ConfigError(f"Expected other values for the policy: {wrong}. Mend the flags.") from error
    if warning := delta_warning(delta, patients):
        print(f"warning: {warning}", file=sys.stderr)
    parse_label(label)
    if not data.exists():
        raise UnreadableSource(f"Found nothing at --data {data}. Name the folder of the site's images, or an NPZ.")
    copy = str(head_copy.absolute()) if head_copy is not None else None
    site = SiteConfig(data=str(data.absolute()), label=label, head_copy=copy)
    made = create_home(home, site, rules, ask_new() if passphrase else None)
    print(f"home: {made.folder}; read and mend {made.policy} before the first run")
    print(f"next: fedmedgan-site enrol {made.folder}, and send the coordinator the file that it writes")


@app.command("serve")
def serve_(
    home: HomeArgument,
    socket: Annotated[Path, typer.Option(help="The Unix socket to answer on.")],
    passphrase_fd: Annotated[int | None, typer.Option(hidden=True, min=3)] = None,  # a pipe of `start`
) -> None:
    """Answer the relay's requests on a Unix socket until SIGTERM or Ctrl-C.

    It answers what the pinned coordinator signed and nothing else: a site that has not joined, or has left, refuses.
    """
    opened = Home(home)
    load_verify_key(opened.key)  # a folder that is no home is told first
    require_closed_home(opened)
    coordinator = load_pinned(home).coordinator
    with beside(opened.serve_lock):
        site = open_site(opened, coordinator=coordinator, ask=partial(obtain, passphrase_fd))
        log_to(opened.log)
        stop = threading.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda _number, _frame: stop.set())
        serve(site, socket, stop, LONGEST_REQUEST_S)


@app.command("pull", context_settings={"ignore_unknown_options": True}, add_help_option=False)
def pull_(arguments: Annotated[list[str] | None, typer.Argument(metavar="HOME --from NAME ...")] = None) -> None:
    """Fetch studies from a PACS into the inbox: a process of its own takes over, since this one has no network."""
    os.execv(sys.executable, [sys.executable, "-P", "-m", "client.entry", "pull", *(arguments or ())])  # noqa: S606


@app.command("ledger")
def show_ledger(home: HomeArgument) -> None:
    """Verify the ledger and show what was charged."""
    require_home(home)
    ledger, rules = _ledger(home), policy.load(Home(home).policy)
    table = Table("time", "run", "round", "kind", "sigma", "q", "steps", title=f"ledger of {rules.site}")
    for entry in ledger.entries:
        asked, charge = entry.request, entry.charge
        cost = (f"{charge.noise_multiplier:.3f}", f"{charge.sample_rate:.4f}", str(charge.steps))
        table.add_row(entry.time, asked.run_id, str(asked.round), asked.kind.value, *cost)
    _print(table)
    spent = ledger.spent(rules.delta)
    over = "; MORE than allowed: every request is refused" if spent > rules.max_epsilon else ""
    print(f"verified; epsilon {spent:.3f} of {rules.max_epsilon:g} spent at delta {rules.delta:g}{over}")


@app.command("budget")
def show_budget(
    home: HomeArgument,
    config: Annotated[Path | None, typer.Option(help="A planned run, as --print-config writes it.")] = None,
    cohort_sites: Annotated[int | None, typer.Option(min=1, help="Of a run with secure-sum: all its sites.")] = None,
    cohort_patients: Annotated[int | None, typer.Option(min=2, help="What they declare together.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the same as JSON to this file.")] = None,
) -> None:
    """Show what is spent, left and by run; with --config, what a planned run would cost and how far the budget goes.

    Exits 5 where this site can join nothing of the planned run, by its policy or its budget; else 4 where the images
    that the run asks for are not imported.
    """
    there: bool | None = None
    proposal, rules = _planned(config) if config is not None else None, policy.load(Home(home).policy)
    rules = policy.between_machines(rules) if has_joined(home) else rules
    cohort = None
    if proposal is not None and cohort_sites is not None and cohort_patients is not None:
        settings = Cohort(cohort_sites, cohort_patients).settings()
        cohort = parse_cohort(settings, rules.declared_patients, proposal.privacy.min_patients)
    found = budget.look_up(rules, _ledger(home).entries, proposal, cohort)
    table = Table("run", "releases", "epsilon alone", title=f"budget of {found.site}")
    for run in found.runs:
        table.add_row(run.run_id, str(run.releases), f"{run.epsilon:.3f}")
    _print(table)
    total = f"of {found.max_epsilon:g} at delta {found.delta:g}"
    print(f"spent: epsilon {found.spent:.3f} {total}; left: {found.left:.3f}")
    if proposal is not None and found.forecast is not None:
        missing = _missing_images(Home(home), proposal)
        _print_forecast(found.forecast, found.left, missing)
        there = None if proposal.image.classes == _UNNAMED else not missing
    if json_file is not None:
        require_outside(home, json_file)
        tree = found.as_json() | {"images_imported": there}
        write_atomic(json_file, (json.dumps(tree, indent=1) + "\n").encode())
    if found.forecast is not None and found.forecast.nothing:
        raise typer.Exit(ExitCode.PRIVACY)
    if there is False:
        raise typer.Exit(ExitCode.DATA)


@records.command("show")
def show_journal(home: HomeArgument) -> None:
    """Verify the journal and show every release."""
    require_home(home)
    require_books(Home(home))
    entries = journal.entries(Home(home).journal, load_verify_key(Home(home).key))
    table = Table("time", "run", "round", "kind", "bytes", "sha256", "epsilon after", title="releases")
    for entry in entries:
        digest, after = entry.sha256[:16], f"{entry.epsilon_after:.3f}"
        table.add_row(
            entry.time, entry.run_id, str(entry.round), entry.kind.value, str(entry.size_bytes), digest, after
        )
    _print(table)
    print(f"verified; {len(entries)} releases")


@records.command("verify")
def verify_journal(
    path: Annotated[Path, typer.Argument(help="A site's home folder, or a file that `journal export` wrote.")],
    key: Annotated[str | None, typer.Option(help="The public key that must have signed it.")] = None,
) -> None:
    """Verify chain and signatures; of a home also that ledger, journal and stored replies agree. Exits 0, 7 or 10."""
    if path.is_file():
        signer, entries = read_export(path)
        if key is not None and key.lower() != signer.to_bytes().hex():
            raise StorageError(f"The journal in {path} is signed by {signer.to_bytes().hex()}, not by --key {key}.")
        print(f"verified; {len(entries)} releases, signed by {signer.to_bytes().hex()}")
        return
    require_home(path)
    signer = load_verify_key(Home(path).key)
    if key is not None and key.lower() != signer.to_bytes().hex():
        raise StorageError(f"The home {path} signs as {signer.to_bytes().hex()}, not as --key {key}.")
    require_books(Home(path))
    found = verify_home(Home(path), signer)
    if found.findings:
        raise StorageError(f"The records of {path} do not agree: {'; '.join(found.findings)}.")
    print(f"verified; {found.releases} releases, {found.charges} charges, {found.replies} stored replies")
    if found.unreleased:
        print(f"{found.unreleased} charges without a release: an interrupted round leaves one, a cut journal more")


@records.command("export")
def export_(home: HomeArgument, file: Annotated[Path, typer.Argument(help="The file to write.")]) -> None:
    """Write the signed journal and the public key to a file that `journal verify FILE` checks anywhere."""
    require_home(home)
    verify_key = load_verify_key(Home(home).key)
    require_outside(home, file)
    write_atomic(file, export_journal(Home(home).journal, verify_key))
    print(f"{file}; tell the auditor the public key by another way: {verify_key.to_bytes().hex()}")


def _print(table: Table) -> None:
    """Print whole columns also where no terminal says how wide it is: a log, a pipe."""
    Console(width=None if sys.stdout.isatty() else 200).print(table)


def _said(kind: str, message: str) -> str:
    form = "expected at most 64 letters of ASCII, digits, dots, dashes and underscores, a letter or digit first"
    return form if kind == "string_pattern_mismatch" else message


def _ledger(home: Path) -> Ledger:
    opened = Home(home)
    return read_ledger(opened.ledger, load_verify_key(opened.key), head_copy(opened))


def _planned(path: Path) -> Proposal:
    planned = build_config(read_config(path))
    if planned.image.classes:
        return planned
    return build_config(planned.model_dump(), {"image.classes": _UNNAMED})  # they count in the bytes of a reply only


def _print_forecast(planned: budget.Forecast, left: float, missing: str) -> None:
    agreed = planned.plan
    noises = (("warm-up", agreed.warmup_noise_multiplier), ("training", agreed.train_noise_multiplier))
    noise = ", ".join(f"noise of the {name} {sigma:.3f}" for name, sigma in noises if sigma is not None)
    print(f"planned run: sample rate {agreed.sample_rate:.4f}, {noise}, {agreed.steps} steps")
    print(f"planned run alone: epsilon {agreed.epsilon:.3f}")
    print(f"policy: {budget.verdict(planned)}")
    joined = budget.extent(planned)
    if missing and not planned.nothing:
        joined = f"nothing until its images are imported, then {joined}"
    print(f"this site can join: {joined}; then spent: epsilon {planned.epsilon_after:.3f}")
    if planned.warmup is False and planned.refusal is None:
        alone = epsilon([agreed.charge_of_warmup()] * planned.warmup_releases, agreed.delta)
        print(f"over budget: the warm-up alone asks for epsilon {alone:.3f}, {left:.3f} is left")


def _missing_images(home: Home, proposal: Proposal) -> str:
    """Say whether the images that a run asks for are imported, and return why not; empty where they are."""
    image = proposal.image
    if image.classes == _UNNAMED:
        print("images: not looked for, since the run names no classes")
        return ""
    try:
        require_images(home, image.classes, image.size, image.channels)
    except IntakeError as error:
        print(f"images: NOT imported. {error}")
        return str(error)
    print("images: imported")
    return ""


_ORDER: tuple[str, ...] = (
    *("init", "enrol", "join", "check", "import", "doctor", "budget", "start", "status", "ledger"),
    *("renew", "leave", "passphrase", "pull", "serve", "relay"),
)
"""Of the commands in the help: as a site comes to need them."""
app.registered_commands.sort(key=lambda one: _ORDER.index(one.name or getattr(one.callback, "__name__", "")))


def main(arguments: list[str] | None = None) -> NoReturn:
    """Run the command line."""
    run_command(app, arguments, name="fedmedgan-site")


if __name__ == "__main__":
    main()
