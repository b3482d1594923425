"""`python -m simulations.benchmark NAME --json FILE`."""

import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from common.command import run_command
from common.config_text import parse_changes
from common.errors import ConfigError
from simulations.benchmark import deployment, dp_step, federation, intake, quality
from simulations.benchmark.report import print_result, write_result
from simulations.benchmark.samples import as_table

BENCHMARKS = ("deployment", "dp-step", "federation", "intake", "quality")

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode="markdown")


@app.command()
def run(
    name: Annotated[str, typer.Argument(help=f"One of: {', '.join(BENCHMARKS)}.")],
    json: Annotated[
        Path | None, typer.Option(help="Write the result to this file too; quality goes on from it.")
    ] = None,
    device: Annotated[str, typer.Option(help="dp-step only: where D is trained, cpu or cuda.")] = "cpu",
    bf16: Annotated[bool, typer.Option(help="dp-step only: activations of plain and fast have eight bits.")] = False,
    config: Annotated[
        Path | None, typer.Option(help="quality only: a TOML file with the run and the table quality.")
    ] = None,
    data: Annotated[Path | None, typer.Option(help="quality only: the images. Default: phantoms.")] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="quality only: wins over the TOML file.")
    ] = None,
) -> None:
    """Measure, print a table, and write the figures."""
    if name not in BENCHMARKS:
        print(f"error: Expected a benchmark among {', '.join(BENCHMARKS)}, got {name!r}.", file=sys.stderr)
        raise typer.Exit(2)
    if json is not None and not json.absolute().parent.is_dir():
        raise ConfigError(f"Expected --json in a folder that is there, got {json}. Make the folder, or name another.")
    if name == "federation":
        result = federation.measure()
    elif name == "deployment":
        result = deployment.measure()
    elif name == "intake":
        result = intake.measure()
    elif name == "quality":
        result = quality.measure(config, data, json, parse_changes(set_ or []))
    else:
        result = dp_step.measure(replace(dp_step.FULL, device=device, bf16=bf16))
    print_result(as_table(result) if name == "quality" else result)
    if json is not None:
        write_result(result, json)


if __name__ == "__main__":
    run_command(app, interrupted="stopped; with --json, quality goes on from the rows in it by the same command")
