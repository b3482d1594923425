"""`fedmedgan-simulate`: a whole federation of virtual hospitals on this machine."""

import os
import signal
import sys
import threading
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.table import Table

from client.intake.refusals import describe
from common.artefact import load_generator
from common.command import run_command
from common.config import MAX_SITES, Config
from common.config_text import build_config, parse_changes, read_config, to_toml
from common.errors import ConfigError, ExitCode
from common.generate import generate
from common.plan import delta_warning, plans_of
from common.sheets import save_sheet
from server.app import Job
from server.lens import foretell
from server.report import write_report
from server.rounds import round_bytes
from server.run_folder import RunFolder, latest_folder, next_folder, open_run, stored_tree
from server.start import save_start
from simulations.engines import check_engine, run_job
from simulations.evaluate import evaluate, save_evaluation
from simulations.gallery import save_gallery
from simulations.hospitals import (
    Federation,
    build_hospitals,
    declared_patients,
    draw_federation,
    held_out_images,
    patients_in,
    site_name,
)
from simulations.pretrain import pretrain

RUNS = Path("runs")

app = typer.Typer(
    add_completion=False,
    no_args_is_help=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
)

KEYS = {
    "data": "simulation.data",
    "label": "simulation.label",
    "sites": "simulation.sites",
    "partition": "simulation.partition",
    "holdout": "simulation.holdout",
    "start": "simulation.start",
    "rounds": "federation.rounds",
    "seed": "federation.seed",
    "epsilon": "privacy.epsilon",
    "delta": "privacy.delta",
    "model": "model.name",
    "size": "image.size",
    "channels": "image.channels",
    "engine": "performance.engine",
    "out": "run.out",
    "resume": "run.resume",
    "dry_run": "run.dry_run",
}
"""The TOML key of each flag."""


@app.callback(invoke_without_command=True)
def simulate(
    context: typer.Context,
    data: Annotated[
        str | None,
        typer.Option(help="A DICOM folder, an NPZ, or a folder of PNG/JPEG with a CSV index. Default: phantoms."),
    ] = None,
    label: Annotated[
        str | None, typer.Option(help="auto, none, tag:KEYWORD (DICOM) or column:NAME (CSV, NPZ).")
    ] = None,
    sites: Annotated[int | None, typer.Option(help="Number of virtual hospitals.")] = None,
    partition: Annotated[str | None, typer.Option(help="iid, dirichlet:ALPHA or by-site-column.")] = None,
    holdout: Annotated[float | None, typer.Option(help="Part of the patients that no hospital gets.")] = None,
    start: Annotated[
        str | None, typer.Option(help="none, or phantoms: chest X-rays learned before, from no one.")
    ] = None,
    rounds: Annotated[int | None, typer.Option(help="Rounds after the first release.")] = None,
    epsilon: Annotated[float | None, typer.Option(help="Budget per patient for the whole run.")] = None,
    delta: Annotated[float | None, typer.Option(help="The delta of the guarantee.")] = None,
    model: Annotated[str | None, typer.Option(help="dcgan, mlp, resnet, unet or vae.")] = None,
    size: Annotated[int | None, typer.Option(help="Side of an image in pixels: 28, 32, 64 or 128.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of the whole simulation.")] = None,
    channels: Annotated[int | None, typer.Option(help="1: grey images, 3: colour.")] = None,
    engine: Annotated[str | None, typer.Option(help="local (this process) or flower (Ray).")] = None,
    config: Annotated[Path | None, typer.Option(help="A TOML file; flags win over it.")] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Any key of the TOML; flags win over it.")
    ] = None,
    out: Annotated[str | None, typer.Option(help="Run folder. Default: the next runs/run-NNNN.")] = None,
    resume: Annotated[bool | None, typer.Option("--resume", help="Go on with a run; default the newest.")] = None,
    dry_run: Annotated[bool | None, typer.Option("--dry-run", help="Print the plan and stop.")] = None,
    print_config: Annotated[bool, typer.Option("--print-config", help="Print the configuration and stop.")] = False,
) -> None:
    """Let virtual hospitals train one image generator together under patient-level differential privacy.

    Without flags: phantom radiographs as DICOM files, four hospitals, about two minutes. Every flag is also a key of
    the TOML that --print-config writes.
    """
    if context.invoked_subcommand is not None:
        return
    flags = {key: value for key, value in locals().items() if key in KEYS and value is not None}
    changes = parse_changes(set_ or []) | {KEYS[key]: value for key, value in flags.items()}
    effective = effective_config(config, changes)
    if print_config:
        print(to_toml(effective), end="")
        return
    federation = draw_federation(effective)
    _warn(federation)
    if federation.config.run.dry_run:
        _print_plan(federation)
        return
    _run(federation)


app.command()(generate)


@app.command()
def gallery(
    run: Annotated[Path, typer.Argument(help="A finished run folder.")],
    out: Annotated[Path, typer.Option(help="The PNG to write.")],
) -> None:
    """Draw the first, the best and the worst of 200 images of each class; nobody picks them."""
    save_gallery(run, out)
    print(f"gallery: {out}")


@app.command("pretrain")
def pretrain_start(
    config: Annotated[Path, typer.Argument(help="The TOML file of the run that shall start from it.")],
    out: Annotated[Path, typer.Option(help="The folder to write.")],
) -> None:
    """Train a generator on phantoms alone, for a run between machines to start from: its `--start`."""
    wanted = build_config(read_config(config), {"simulation.sites": MAX_SITES})  # nobody counts them here
    if not wanted.image.classes:
        raise ConfigError(f"Expected image.classes in {config}: those of the run.")
    generator = pretrain(wanted)
    save_start(out, generator, wanted)
    save_sheet(out / "samples.png", generator, wanted)
    print(f"generator: {out}; what it draws: {out / 'samples.png'}")


def effective_config(path: Path | None, changes: dict[str, Any]) -> Config:
    """Build the configuration from a TOML file and flags; a resumed run starts from its own.

    Raises:
        ConfigError: A key or value is wrong.
        ResumeError: `resume` is set and no run stands there.
    """
    tree = read_config(path) if path is not None else {}
    wished = build_config(tree, changes)
    if wished.simulation.data:  # absolute, so that a run can be resumed from anywhere
        changes = changes | {"simulation.data": os.fspath(Path(wished.simulation.data).absolute())}
        wished = build_config(tree, changes)
    if not wished.run.resume:
        return wished
    folder = Path(wished.run.out) if wished.run.out else latest_folder(RUNS)
    stored = stored_tree(folder)
    given = {f"{name}.{key}": v for name, section in tree.items() for key, v in section.items()} | changes
    return build_config(stored, given | {"run.out": os.fspath(folder), "run.resume": True})


def main(arguments: list[str] | None = None) -> NoReturn:
    """Run the command line."""
    run_command(
        app, arguments, interrupted="stopped; go on with: fedmedgan-simulate --resume", name="fedmedgan-simulate"
    )


def _run(federation: Federation) -> None:
    config = federation.config
    check_engine(config)
    path = Path(config.run.out) if config.run.out else next_folder(RUNS)
    folder = open_run(path, config, config.run.resume)
    print(f"run folder: {path}", flush=True)
    try:
        _carry_out(federation, folder)
    except KeyboardInterrupt:
        print(f"stopped; go on with: fedmedgan-simulate --resume --out {path}", file=sys.stderr)
        sys.exit(ExitCode.INTERRUPTED)


def _carry_out(federation: Federation, folder: RunFolder) -> None:
    config, path = federation.config, folder.path
    if federation.refused:
        print(f"not usable in the data: {describe(federation.refused)}", flush=True)
    for line in build_hospitals(federation, path):
        print(line, flush=True)
    job = Job(config, folder)
    previous = signal.signal(signal.SIGINT, _stopper(job.stop, path))
    try:
        run_job(job)
    finally:
        signal.signal(signal.SIGINT, previous)
    if not (path / "generator.json").exists():
        print(f"stopped after a whole round; go on with: fedmedgan-simulate --resume --out {path}")
        sys.exit(ExitCode.INTERRUPTED)
    held_out = held_out_images(config, path)
    if held_out is not None:
        print("training classifiers on synthetic images, to test them on patients of no hospital ...", flush=True)
        generator, _ = load_generator(path)
        evaluation = evaluate(config, generator, held_out)
        save_evaluation(path / "evaluation.json", evaluation)
        auc = f", AUC {evaluation.tstr_auc:.3f}" if evaluation.tstr_auc is not None else ""
        print(
            f"classifier trained on {evaluation.synthetic_images} synthetic images, tested on "
            f"{evaluation.held_out_patients} patients of no hospital: accuracy {evaluation.tstr_accuracy:.3f}{auc}"
        )
    print(f"report: {write_report(path)}")


def _stopper(stop: threading.Event, path: Path) -> Any:
    def on_interrupt(number: int, frame: Any) -> None:
        del number, frame
        if stop.is_set():
            raise KeyboardInterrupt
        stop.set()
        print(
            f"\nfinishing the round under way; press Ctrl-C again to stop at once. "
            f"Either way `fedmedgan-simulate --resume --out {path}` goes on.",
            file=sys.stderr,
            flush=True,
        )

    return on_interrupt


def _warn(federation: Federation) -> None:
    largest = max(declared_patients(patients_in(part)) for part in federation.sites)
    warning = delta_warning(federation.config.privacy.delta, largest)
    if warning:
        print(f"warning: {warning}", file=sys.stderr)


def _print_plan(federation: Federation) -> None:
    config = federation.config
    table = Table(title=f"Plan: {config.federation.rounds} rounds, delta {config.privacy.delta:g}")
    for column in ("site", "patients", "images", "declared", "q", "sigma warm-up", "sigma", "steps", "epsilon"):
        table.add_column(column, justify="left" if column == "site" else "right")
    plans = plans_of(config, _taking_part(federation))
    coming = iter(plans)
    for index, part in enumerate(federation.sites):
        declared = declared_patients(patients_in(part))
        cells = [site_name(index), str(patients_in(part)), str(len(part.records)), str(declared)]
        if declared < config.privacy.min_patients:
            table.add_row(*cells, "takes no part: fewer than privacy.min_patients")
            continue
        agreed = next(coming)
        noise = [
            f"{sigma:.3f}" if sigma else "-"
            for sigma in (agreed.warmup_noise_multiplier, agreed.train_noise_multiplier)
        ]
        table.add_row(*cells, f"{agreed.sample_rate:.4f}", *noise, str(agreed.steps), f"{agreed.epsilon:g}")
    if federation.refused:
        print(f"not usable in the data: {describe(federation.refused)}")
    console = Console(width=None if sys.stdout.isatty() else 120)
    console.print(table)
    weights_bytes = round_bytes(config)
    if config.warmup.share > 0 and plans:
        console.print(foretell(config, plans))
    console.print(f"held out: {patients_in(federation.held_out)} patients")
    console.print(f"bytes per round and site: {weights_bytes:,} down, {weights_bytes:,} up")


def _taking_part(federation: Federation) -> list[int]:
    """Return the declared patients of the hospitals that have enough."""
    sizes = [declared_patients(patients_in(part)) for part in federation.sites]
    return [size for size in sizes if size >= federation.config.privacy.min_patients]


if __name__ == "__main__":
    main()
