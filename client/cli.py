"""`fedmedgan-site`: what a hospital does with its agent's home. Enrolment and the relay come later."""

import logging
import signal
import sys
import threading
from pathlib import Path
from typing import Annotated, NoReturn

import typer
from pydantic import ValidationError
from rich.console import Console
from rich.table import Table

from client import journal, policy
from client.agent import open_site
from client.home import Home, SiteConfig, create_home, import_images
from client.intake.refusals import describe
from client.ledger import read_ledger
from client.policy import Policy
from client.serve import serve
from common.command import run_command
from common.crypto import load_key
from common.errors import ConfigError
from common.privacy import delta_warning

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode=None)

HomeArgument = Annotated[Path, typer.Argument(help="The site's home folder.")]


@app.command()
def init(
    home: HomeArgument,
    name: Annotated[str, typer.Option(help="The site's name, public.")],
    data: Annotated[Path, typer.Option(help="Folder of DICOM or PNG/JPEG, or an NPZ.")],
    patients: Annotated[
        int, typer.Option(min=1, help="The rounded number of patients that the site declares, public.")
    ],
    max_epsilon: Annotated[float, typer.Option(help="What may ever be spent on this data set.")] = 10.0,
    delta: Annotated[float, typer.Option(help="The delta of the guarantee.")] = 1e-5,
    label: Annotated[str, typer.Option(help="auto, none, tag:KEYWORD or column:NAME.")] = "auto",
) -> None:
    """Make a site's home: keys, policy, an empty ledger and journal."""
    try:
        rules = Policy(site=name, declared_patients=patients, max_epsilon=max_epsilon, delta=delta)
    except ValidationError as error:
        wrong = "; ".join(f"{item['loc'][0]}={item['input']!r}: {item['msg']}" for item in error.errors())
        raise ConfigError(f"Expected other values for the policy: {wrong}. Mend the flags.") from error
    if warning := delta_warning(delta, patients):
        print(f"warning: {warning}", file=sys.stderr)
    made = create_home(home, SiteConfig(data=str(data.absolute()), label=label), rules)
    print(f"home: {made.folder}; read and mend {made.policy} before the first run")


@app.command("import")
def import_(
    home: HomeArgument,
    classes: Annotated[str, typer.Option(help="Class names of the run, comma-separated, in its order.")],
    size: Annotated[int, typer.Option(help="Side of an image in pixels: 28, 32 or 64.")] = 32,
) -> None:
    """Read the site's images into its home, ready for a run; say what was refused and why."""
    opened = Home(home)
    minimum = policy.load(opened.policy).min_patients
    refused = import_images(opened, [name.strip() for name in classes.split(",")], size, minimum)
    print(f"imported; refused: {describe(refused) if refused else 'nothing'}")


@app.command("serve")
def serve_(
    home: HomeArgument,
    socket: Annotated[Path, typer.Option(help="The Unix socket to answer on.")],
) -> None:
    """Answer the relay's requests on a Unix socket until SIGTERM or Ctrl-C."""
    opened = Home(home)
    logging.basicConfig(filename=opened.log, level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda _number, _frame: stop.set())
    serve(open_site(opened), socket, stop)


@app.command("ledger")
def show_ledger(home: HomeArgument) -> None:
    """Verify the ledger and show what was charged and what is left."""
    opened, rules = Home(home), policy.load(Home(home).policy)
    ledger = read_ledger(opened.ledger, load_key(opened.key).verify_key)
    table = Table("time", "run", "round", "kind", "sigma", "q", "steps", title=f"ledger of {rules.site}")
    for entry in ledger.entries:
        asked, charge = entry.request, entry.charge
        cost = (f"{charge.noise_multiplier:.3f}", f"{charge.sample_rate:.4f}", str(charge.steps))
        table.add_row(entry.time, asked.run_id, str(asked.round), asked.kind.value, *cost)
    Console().print(table)
    spent = ledger.spent(rules.delta)
    print(f"verified; epsilon {spent:.3f} of {rules.max_epsilon:g} spent at delta {rules.delta:g}")


@app.command("journal")
def show_journal(home: HomeArgument) -> None:
    """Verify the journal and show every release."""
    opened = Home(home)
    entries = journal.entries(opened.journal, load_key(opened.key).verify_key)
    table = Table("time", "run", "round", "kind", "bytes", "sha256", "epsilon after", title="releases")
    for entry in entries:
        digest, after = entry.sha256[:16], f"{entry.epsilon_after:.3f}"
        table.add_row(
            entry.time, entry.run_id, str(entry.round), entry.kind.value, str(entry.size_bytes), digest, after
        )
    Console().print(table)
    print(f"verified; {len(entries)} releases")


def main(arguments: list[str] | None = None) -> NoReturn:
    """Run the command line."""
    run_command(app, arguments)


if __name__ == "__main__":
    main()
