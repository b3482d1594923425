"""`python -m simulations.benchmark NAME --json FILE`."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from simulations.benchmark import dp_step, federation
from simulations.benchmark.report import print_result, write_result

BENCHMARKS = {"dp-step": dp_step.measure, "federation": federation.measure}


def run(
    name: Annotated[str, typer.Argument(help=f"One of: {', '.join(BENCHMARKS)}.")],
    json: Annotated[Path | None, typer.Option(help="Write the result to this file too.")] = None,
) -> None:
    """Measure, print a table, and write the figures."""
    if name not in BENCHMARKS:
        print(f"error: Expected a benchmark among {', '.join(BENCHMARKS)}, got {name!r}.", file=sys.stderr)
        raise typer.Exit(2)
    result = BENCHMARKS[name]()
    print_result(result)
    if json is not None:
        write_result(result, json)


if __name__ == "__main__":
    typer.run(run)
