"""`fedmedgan-coordinator`: what a coordinator does. Enrolment is in server/membership, runs in server/operate.

Torch and the accountant take seconds to import: only the commands that need them do.
"""

import json
import math
import os
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, NoReturn, get_args

import typer
from rich.console import Console
from rich.table import Table

from common import generate_options as options
from common.command import run_command
from common.config import IMAGE_SIZES, ImageConfig, ModelConfig, ModelName
from common.config_text import build_config, read_config
from common.errors import FederationError
from common.flower_environment import flower_environment
from server import control, operate
from server.consortium import enrolled, load_consortium
from server.membership import add_commands
from server.operate import folder_of, require_run
from server.status import runs_of_files, stand, without_process
from server.status_text import tables
from server.unfinished import unfinished

app = typer.Typer(
    add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode="markdown"
)
add_commands(app)
HomeArgument = Annotated[Path, typer.Argument(help="The coordinator's home.")]
RunArgument = Annotated[Path, typer.Argument(help="The run: its name or its folder.")]


@app.command()
def generate(
    home: HomeArgument,
    run: RunArgument,
    out: options.Out,
    count: options.Count = 64,
    labels: options.Labels = "all",
    seed: options.Seed = 0,
    format: options.Form = "png",
) -> None:
    """Draw synthetic images from a finished run."""
    from common.generate import generate_images

    written = generate_images(_finished(home, run), out, count, labels, seed, format)
    print(f"{count} synthetic images in {written}")


@app.command()
def report(home: HomeArgument, run: RunArgument) -> None:
    """Write report.html of a finished run anew."""
    from server.report import write_report

    print(write_report(_finished(home, run)))


@app.command("plan")
def print_plan(
    patients: Annotated[list[int], typer.Argument(help="The declared cohort size of each site.")],
    config: Annotated[Path | None, typer.Option(help="A TOML file of the run.")] = None,
) -> None:
    """Print what a run would ask of sites of these sizes.

    Sample rate, noise, steps, bytes.
    """
    from common.plan import delta_warning, plans_of
    from server.lens import foretell
    from server.rounds import round_bytes

    proposed = build_config(read_config(config) if config is not None else {})
    if not proposed.image.classes:
        proposed = build_config(proposed.model_dump(), {"image.classes": ("all",)})
    plans = plans_of(proposed, patients)
    table = Table(title=f"epsilon {proposed.privacy.epsilon:g} at delta {proposed.privacy.delta:g}")
    for column in ("declared patients", "sample rate", "sigma warm-up", "sigma", "steps"):
        table.add_column(column, justify="right")
    for declared, agreed in zip(patients, plans, strict=True):
        noises = (agreed.warmup_noise_multiplier, agreed.train_noise_multiplier)
        cells = [f"{noise:.3f}" if noise else "-" for noise in noises]
        table.add_row(str(declared), f"{agreed.sample_rate:.4f}", *cells, str(agreed.steps))
        if warning := delta_warning(proposed.privacy.delta, declared):
            print(f"warning: {warning}", file=sys.stderr)
    Console().print(table)
    if proposed.train.algorithm == "secure-sum":
        shares = plans[0].noise_shares
        print(f"secure-sum of these {len(plans)} sites; of the noise of a release each adds one part in {shares}")
    if proposed.privacy.colluding_sites != "all":
        print(f"in simulation only: `run` refuses privacy.colluding_sites; {operate.UNMASKED}")
    if proposed.warmup.share > 0:
        print(foretell(proposed, plans))
    print(f"bytes per round and site: {round_bytes(proposed):,} down and as many up")


@app.command("models")
def print_models() -> None:
    """Print the weights of every model and the bytes of a round: default widths, grey images of two classes.

    Bytes go to a site, and as many come back: both networks with train.algorithm = local, half of it with
    federation.transport = float16; the discriminator alone, and whole numbers of its length back, with secure-sum.
    """
    from common.models import outline
    from common.weights import weight_shapes

    table = Table(title="Weights, and bytes of a round", pad_edge=False)
    for column in ("model", "pixels", "G weights", "D weights", "local", "float16", "secure-sum"):
        table.add_column(column, justify="left" if column == "model" else "right")
    for name in get_args(ModelName):
        for size in IMAGE_SIZES:
            pair = outline(ModelConfig(name=name), ImageConfig.model_validate({"size": size}), 2)
            g, d = (
                sum(math.prod(shape) for shape in weight_shapes(pair, (network,)).values())
                for network in ("generator", "discriminator")
            )
            table.add_row(name, str(size), f"{g:,}", f"{d:,}", f"{4 * (g + d):,}", f"{2 * (g + d):,}", f"{4 * d:,}")
    Console().print(table)


@app.command()
def start(home: HomeArgument) -> None:
    """Serve the federation until Ctrl-C or SIGTERM.

    One public port for the sites, all else on loopback. It says when it is ready.
    """
    consortium = load_consortium(home.absolute())
    arguments = [sys.executable, "-P", "-m", "server.supervise", str(consortium.folder)]
    os.execve(sys.executable, arguments, flower_environment(consortium.folder))  # noqa: S606 - without torch from here


operate.add_commands(app)


def _finished(home: Path, run: Path) -> Path:
    """Return the folder of a run whose results stand in it."""
    consortium = load_consortium(home.absolute())
    path = folder_of(consortium, run)
    require_run(path)
    if not (path / "privacy.json").exists():
        raise unfinished(consortium, path, run)
    return path


@app.command()
def status(
    home: HomeArgument, as_json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False
) -> None:
    """Print where sites and runs stand.

    Who is connected, what each site has spent, as it declared, and the last runs, a row each.
    """
    consortium, away = load_consortium(home.absolute()), None
    known = enrolled(consortium).values()
    try:
        with control.connect(consortium) as client:
            nodes, runs = control.list_nodes(client), control.list_runs(client, consortium.folder)
    except FederationError as error:  # what the files say is said all the same
        away = error
        nodes = [control.NodeStatus(site.name, 0, None, None) for site in known if not site.revoked]
        runs = runs_of_files(consortium)
    now = time.time()
    revoked = [site.name for site in known if site.revoked]
    sites, latest = stand(nodes, runs, now, without_process(consortium, runs), revoked)
    if as_json:
        tree = {"sites": [asdict(site) for site in sites], "runs": [asdict(one) for one in latest]}
        print(json.dumps(tree, default=str))
    else:
        console = Console()
        for part in tables(sites, latest, now, consortium.folder):
            console.print(part)
    if away is not None:
        raise away


def main(arguments: list[str] | None = None) -> NoReturn:
    """Run the command line."""
    run_command(app, arguments, name="fedmedgan-coordinator")


if __name__ == "__main__":
    main()
