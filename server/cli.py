"""`fedmedgan-coordinator`: what a coordinator does. Enrolment is in server/membership.

Torch and the accountant take seconds to import: only the commands that need them do.
"""

import json
import math
import os
import shlex
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
from common.errors import ConfigError, ExitCode, FederationError, ResumeError
from common.flower_environment import flower_environment
from common.lock import is_held
from server import control
from server.consortium import Consortium, enrolled, load_consortium
from server.membership import add_commands
from server.run_folder import RunFolder, is_complete, next_folder, prepare_run
from server.status import COMPLETED, runs_of_files, stand, under_way, without_process
from server.status_text import failure, tables
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


@app.command()
def run(
    home: HomeArgument,
    config: Annotated[Path, typer.Argument(help="A TOML file of the run.")],
    detach: Annotated[bool, typer.Option("--detach", help="Do not follow the run.")] = False,
) -> None:
    """Start a run with the enrolled sites and follow it. Ctrl-C ends the following, not the run."""
    consortium = load_consortium(home.absolute())
    sites = [name for name, site in enrolled(consortium).items() if not site.revoked]
    if not sites:
        raise ConfigError(f"No site is enrolled. Enrol one: fedmedgan-coordinator enrol {home} FILE")
    proposed = build_config(read_config(config), {"simulation.sites": len(sites)})
    if not proposed.image.classes:
        raise ConfigError("Expected image.classes: sites have to know what to import. Name them in the configuration.")
    _require_idle_sites(consortium)
    folder = next_folder(consortium.runs)
    _start_run(consortium, prepare_run(folder, proposed), folder, resume=False, detach=detach)


@app.command()
def resume(
    home: HomeArgument,
    folder: Annotated[Path, typer.Argument(help="The run that ended early: its name or its folder.")],
    detach: Annotated[bool, typer.Option("--detach", help="Do not follow the run.")] = False,
) -> None:
    """Go on with a run from its last whole round, and follow it."""
    consortium = Consortium(home.absolute())
    path = _folder_of(consortium, folder)
    _require_resumable(path)
    _require_idle_sites(load_consortium(consortium.folder), but=path)
    begun = (path / "run.json").exists()  # else it ended before it had an id: it begins anew
    _start_run(load_consortium(consortium.folder), path / "config.toml", path, resume=begun, detach=detach)


def _folder_of(consortium: Consortium, run: Path) -> Path:
    """Return the folder of a run that is given by its name or by a path to its folder."""
    return consortium.runs / run if run.parent == Path() and not (run / "config.toml").exists() else run.absolute()


def _finished(home: Path, run: Path) -> Path:
    """Return the folder of a run whose results stand in it."""
    path = _folder_of(Consortium(home.absolute()), run)
    _require_run(path)
    if not (path / "privacy.json").exists():
        raise unfinished(Consortium(home.absolute()), path, run)
    return path


def _require_run(path: Path) -> None:
    if not (path / "config.toml").exists():
        raise ResumeError(f"{path} is no folder of a run. `fedmedgan-coordinator status HOME` names the runs.")


def _require_resumable(path: Path) -> None:
    _require_run(path)
    if is_complete(path):
        raise ResumeError(f"The run of {path} is complete: see its report.html. There is nothing to go on with.")
    if is_held(RunFolder(path, "").lock):
        raise ResumeError(f"The run of {path} is at work. `stop` it first, or wait for its end.")


def _require_idle_sites(consortium: Consortium, but: Path | None = None) -> None:
    """Refuse a second run beside one under way: each would wait for the other's sites, and both spend budget."""
    with control.connect(consortium) as client:
        runs = control.list_runs(client, consortium.folder)
    others = [one.name for one in under_way(runs, without_process(consortium, runs)) if one.folder != but]
    if others:
        home = shlex.quote(str(consortium.folder))
        raise FederationError(
            f"{others[0]} is under way with these sites. Wait for its end (fedmedgan-coordinator status {home}), or "
            f"end it: fedmedgan-coordinator stop {home} {others[0]}"
        )


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


@app.command()
def stop(
    home: HomeArgument,
    run: Annotated[
        Path | None, typer.Argument(help="One run, its name or folder; all when left out.", show_default=False)
    ] = None,
) -> None:
    """Stop the runs under way; `resume` goes on with them.

    A run goes on from its last whole round.
    """
    consortium = load_consortium(home.absolute())
    with control.connect(consortium) as client:
        active = [one for one in control.list_runs(client, consortium.folder) if one.status != control.FINISHED]
        chosen = [one for one in active if run is None or one.folder == _folder_of(consortium, run)]
        if run is not None and not chosen:
            raise ResumeError(f"{run} is not under way. `fedmedgan-coordinator status {home}` lists the runs.")
        for one in chosen:
            control.stop_run(client, one.run_id)
            print(f"stopped {one.name}; to go on: fedmedgan-coordinator resume {home} {one.name}")
    if not chosen:
        print("no run is under way")


def _start_run(consortium: Consortium, config: Path, folder: Path, *, resume: bool, detach: bool) -> None:
    with control.connect(consortium) as client:
        run_id = control.submit(client, consortium.folder, config, folder, resume)
        print(f"{folder.name} in {folder}", flush=True)
        if detach:
            return
        try:
            for text in control.follow(client, run_id):
                print(text, end="", flush=True)
        except KeyboardInterrupt:
            home = consortium.folder
            print(f"\nthe run goes on; to end it: fedmedgan-coordinator stop {home} {folder.name}", file=sys.stderr)
            raise typer.Exit(ExitCode.INTERRUPTED) from None
        ended = control.read_run(client, consortium.folder, run_id)
    if ended.outcome != COMPLETED and not is_complete(folder):  # a stop may come when the results are written
        (standing,) = stand([], [ended], time.time())[1]
        raise failure(standing, consortium.folder)


def main(arguments: list[str] | None = None) -> NoReturn:
    """Run the command line."""
    run_command(app, arguments)


if __name__ == "__main__":
    main()
