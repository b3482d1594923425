"""`fedmedgan-coordinator`: what a coordinator does beside the round loop. Enrolment is in server/membership."""

import math
import sys
from pathlib import Path
from typing import Annotated, NoReturn, get_args

import typer
from rich.console import Console
from rich.table import Table

from common.command import run_command
from common.config import IMAGE_SIZES, ImageConfig, ModelConfig, ModelName
from common.config_text import build_config, read_config
from common.models import outline
from common.plan import delta_warning, plans_of
from common.weights import weight_shapes
from server.lens import foretell
from server.membership import add_commands
from server.report import write_report
from server.rounds import round_bytes

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode=None)
add_commands(app)


@app.command()
def report(run: Annotated[Path, typer.Argument(help="A run folder.")]) -> None:
    """Write report.html of a run folder anew."""
    print(write_report(run))


@app.command("plan")
def print_plan(
    patients: Annotated[list[int], typer.Argument(help="The declared cohort size of each site.")],
    config: Annotated[Path | None, typer.Option(help="A TOML file of the run.")] = None,
) -> None:
    """Print what a run would ask of sites of these sizes: sample rate, noise, steps, bytes."""
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

    Bytes go to a site, and as many come back: both networks with train.algorithm = local, the discriminator alone, and
    whole numbers of its length back, with secure-sum.
    """
    table = Table()
    for column in ("model", "pixels", "G weights", "D weights", "local, bytes", "secure-sum, bytes"):
        table.add_column(column, justify="left" if column == "model" else "right")
    for name in get_args(ModelName):
        for size in IMAGE_SIZES:
            pair = outline(ModelConfig(name=name), ImageConfig.model_validate({"size": size}), 2)
            g, d = (
                sum(math.prod(shape) for shape in weight_shapes(pair, (network,)).values())
                for network in ("generator", "discriminator")
            )
            table.add_row(name, str(size), f"{g:,}", f"{d:,}", f"{4 * (g + d):,}", f"{4 * d:,}")
    Console().print(table)


def main(arguments: list[str] | None = None) -> NoReturn:
    """Run the command line."""
    run_command(app, arguments)


if __name__ == "__main__":
    main()
