"""`python -m simulations.benchmark NAME --json FILE`."""

import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from simulations.benchmark import dp_step, federation
from simulations.benchmark.report import print_result, write_result

BENCHMARKS = ("dp-step", "federation")


def run(
    name: Annotated[str, typer.Argument(help=f"One of: {', '.join(BENCHMARKS)}.")],
    json: Annotated[Path | None, typer.Option(help="Write the result to this file too.")] = None,
    device: Annotated[str, typer.Option(help="dp-step only: where D is trained, cpu or cuda.")] = "cpu",
    bf16: Annotated[bool, typer.Option(help="dp-step only: activations of plain and fast have eight bits.")] = False,
) -> None:
    """Measure, print a table, and write the figures."""
    if name not in BENCHMARKS:
        print(f"error: Expected a benchmark among {', '.join(BENCHMARKS)}, got {name!r}.", file=sys.stderr)
        raise typer.Exit(2)
    if name == "federation":
        result = federation.measure()
    else:
        result = dp_step.measure(replace(dp_step.FULL, device=device, bf16=bf16))
    print_result(result)
    if json is not None:
        write_result(result, json)


if __name__ == "__main__":
    typer.run(run)
